"""`prunus.bench`: how fast a model is on a named engine, interleaved with the dense model it came from."""

from pathlib import Path
from typing import Any

from prunus.benchmark import measure, measure_exported
from prunus.benchmark.prompts import Prompt, chosen_prompts
from prunus.benchmark.requests import Request, check_same, tokenised
from prunus.checkpoint import add_to_record, open_checkpoint, read_record
from prunus.errors import UserError
from prunus.exporting import FORMATS
from prunus.exporting.exported import Exported, find_exported
from prunus.models.streamed import load_tokenizer
from prunus.settings import BenchSettings
from prunus.steps.done import done_before, mark
from prunus.steps.export import export
from prunus.steps.keep import results_survive

IN_PROCESS = ("dtype", "device")  # what an export has settled already


def bench(
    model: str | Path, *, skip_done: bool = False, trust_remote_code: bool = False, **settings: Any
) -> dict[str, Any]:
    """Measure latency, throughput and memory; `settings` are the fields of `BenchSettings`.

    A model directory runs in transformers, what `prunus export` made in its own engine. There, `against` may be the
    dense model's export, or the dense model: it is then exported alike first, beside `model`, as MODEL.dense.

    In a directory that prunus made, the result is added to `prunus.json`; with `skip_done`, a result of the same
    settings that is already there is returned instead. Raises UserError for anything the user can mend.
    """
    checked = BenchSettings.check(**settings)
    prompts = chosen_prompts(checked.prompts, checked.mix)
    exported = find_exported(model)
    _check_engine(str(model), exported, checked)
    path = exported.directory if exported else open_checkpoint(model, trust_remote_code=trust_remote_code).path
    if skip_done and (found := done_before(read_record(path), "benchmarks", checked)):
        return found[0]
    if exported:
        result = _in_engine(exported, checked, prompts, trust_remote_code)
    else:
        result = _in_transformers(path, checked, prompts, trust_remote_code)
    with results_survive(path):
        add_to_record(path, "benchmarks", mark([result], checked))
    return result


def _check_engine(model: str, exported: Exported | None, settings: BenchSettings) -> None:
    runs_in = exported.engine.name if exported else "transformers"
    if settings.engine not in (None, runs_in):
        advice = "" if exported else "; export it first, and bench what `prunus export` made"
        raise UserError(f"{model} runs in {runs_in}, and engine {settings.engine!r} was asked for{advice}.")
    fields = BenchSettings.model_fields
    given = [name for name in IN_PROCESS if getattr(settings, name) != fields[name].default]
    if exported and given:
        raise UserError(f"{given[0]} is for transformers; {model} is {exported.target}, as it was exported.")


def _in_transformers(
    path: Path, settings: BenchSettings, prompts: list[Prompt], trust_remote_code: bool
) -> dict[str, Any]:
    against = settings.against
    dense = open_checkpoint(against, trust_remote_code=trust_remote_code).path if against else None
    requests = _requests([path, *([dense] if dense else [])], settings, prompts, trust_remote_code)
    values = settings.model_dump(exclude={"against", "engine", "mix", "prompts"})
    return measure(path, against=dense, requests=requests, trust_remote_code=trust_remote_code, **values)


def _in_engine(
    exported: Exported, settings: BenchSettings, prompts: list[Prompt], trust_remote_code: bool
) -> dict[str, Any]:
    dense = _dense(exported, settings.against, trust_remote_code) if settings.against else None
    sides = [one for one in (exported, dense) if one is not None and prompts]
    readers = [one.load if one.load.is_dir() else one.source for one in sides]
    requests = _requests(readers, settings, prompts, trust_remote_code)
    values = settings.model_dump(exclude={"against", "engine", "mix", "prompts", *IN_PROCESS})
    return measure_exported(exported, dense, requests=requests, **values)


def _requests(
    readers: list[Path], settings: BenchSettings, prompts: list[Prompt], trust_remote_code: bool
) -> list[Request]:
    """The prompts in tokens, by the tokenizer of the model; none when there are no prompts.

    `readers` are the directories with the tokenizers of the model and of the dense one. What an export's engine makes
    of text was compared with the tokenizer of its source when it was proved.
    """
    if not prompts:
        return []
    sizes = {"prompt_tokens": settings.prompt_tokens, "new_tokens": settings.new_tokens}
    both = [
        tokenised(prompts, load_tokenizer(open_checkpoint(reader, trust_remote_code=trust_remote_code)), **sizes)
        for reader in readers
    ]
    check_same(both[0], both[-1], str(settings.against))
    return both[0]


def _dense(exported: Exported, against: str, trust_remote_code: bool) -> Exported:
    """The dense model in the same engine. Of another type, as named, it is compared all the same."""
    dense = find_exported(against)
    if dense is None:
        beside = exported.directory.with_name(f"{exported.directory.name}.dense")
        keeps = FORMATS[exported.step["format"]].types[exported.step["type"]].keeps
        to = exported.step["format"] if keeps else exported.target  # the dense model has no scheme to keep
        export(against, beside, to=to, trust_remote_code=trust_remote_code)
        dense = find_exported(beside)
    assert dense is not None
    if dense.engine.name != exported.engine.name:
        raise UserError(
            f"{exported.directory} runs in {exported.engine.name}, {against} in {dense.engine.name}; compare "
            "within one engine."
        )
    return dense
