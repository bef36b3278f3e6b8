"""`prunus.recover`: train a pruned model until it is close to its dense parent again; zeros stay zeros."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from prunus.benchmark.machine import reset_peak_resident
from prunus.checkpoint import OutputDirectory
from prunus.machine_choice import DTYPES, parse_memory
from prunus.models.limits import max_length
from prunus.models.whole import load_whole
from prunus.recovery.data import TrainingText, training_text
from prunus.result import Run
from prunus.settings import RecoverSettings
from prunus.steps.history import record_of
from prunus.steps.identity import identity
from prunus.steps.recover_blocks import train_blocks
from prunus.steps.recover_setup import Setup, make_plan, set_up
from prunus.steps.recover_whole import train_whole
from prunus.text.self_generated import self_generator
from prunus.text.sources import parse_source


def recover(
    model: str | Path,
    out: str | Path,
    *,
    max_memory: str | int | None = None,
    trust_remote_code: bool = False,
    tensorboard: str | Path | None = None,
    **settings: Any,
) -> Run:
    """Train `model`, a pruned one, to be close to `teacher` again, and write the result to `out`.

    `settings` are the fields of `RecoverSettings`: teacher, data, tokens, method, loss, lr, ... The same call again
    goes on where an interrupted one stopped, and returns at once when `out` is already its result. Every weight that is
    zero in a pruned matrix is zero in the result. Under `accelerate launch` the work is shared among processes.
    `max_memory` ("8GiB") is what the training may take; `tensorboard` names a folder for its event files. Raises
    UserError for anything the user can mend.
    """
    setup = set_up(model, RecoverSettings.check(**settings), parse_memory(max_memory), trust_remote_code)
    output = OutputDirectory(Path(out), setup.checkpoint, _identity(setup))
    if output.is_done:
        return Run.open(output.out, reused=True)
    setup.processes.wait()  # nobody writes before everybody has seen what is there
    with setup.processes.main_only(output):
        _run(setup, output, tensorboard)
    setup.processes.close()
    return Run.open(output.out)


def _identity(setup: Setup) -> dict[str, Any]:
    """What decides the content of the result: the teacher's weights too, and what the record tells of its blocks."""
    layers = {"teacher_layers": list(setup.plan.layers)} if setup.plan.layers else {}
    return {**identity(setup.settings), "teacher_sha256": setup.teacher.sha256 if setup.teacher else None, **layers}


def _run(setup: Setup, output: OutputDirectory, tensorboard: str | Path | None) -> None:
    """Train from where `output` stands, then give the directory its name."""
    reset_peak_resident()
    saved = output.progress()
    if saved is not None:
        dtype = DTYPES[saved["dtype"]]
        setup = replace(
            setup, dtype=dtype, plan=make_plan(setup.settings, setup.plan.layers, setup.processes.count, dtype)
        )
    elif setup.processes.is_main:
        setup.shards.check_space(output, 0)
    with setup.processes.main_first():
        text = _text(setup)
    if setup.settings.method == "block-wise":
        facts = train_blocks(setup, output, text, saved)
    else:
        facts = train_whole(setup, output, text, saved, tensorboard)
    if setup.processes.is_main:
        output.finish(record_of(output, "recover", setup.settings, _facts(setup, text, facts)))


def _text(setup: Setup) -> TrainingText:
    settings, tokenizer, teacher = setup.settings, setup.model.tokenizer, setup.teacher
    return training_text(
        [parse_source(one) for one in settings.data],
        tokenizer,
        windows=setup.plan.steps * setup.plan.sequences,
        held_out=settings.held_out,
        length=settings.length,
        seed=settings.seed,
        max_length=max_length(setup.checkpoint.config),
        generate=None
        if teacher is None
        else self_generator(
            lambda: load_whole(teacher, setup.dtype, setup.processes.device),
            tokenizer,
            identity=f"{teacher.sha256} {setup.dtype}",
        ),
    )


def _facts(setup: Setup, text: TrainingText, facts: dict[str, Any]) -> dict[str, Any]:
    teacher = None if setup.teacher is None else {"path": str(setup.teacher.path), "sha256": setup.teacher.sha256}
    return {
        "teacher": teacher,
        "teacher_layers": list(setup.plan.layers),
        "method": setup.settings.method,
        "lr": setup.settings.learning_rate,
        "dtype": str(setup.dtype).removeprefix("torch."),
        "device": str(setup.processes.device),
        "processes": {"count": setup.processes.count, "kind": setup.processes.kind},
        "data": text.description,
        "parameters": setup.checkpoint.num_parameters,
        **facts,
    }
