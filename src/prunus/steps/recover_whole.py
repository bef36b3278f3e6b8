"""Recovery with the whole model in memory: all weights, or masked LoRA adapters that are merged at the end."""

from collections.abc import Callable
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recompute

from prunus.checkpoint import OutputDirectory
from prunus.errors import UserError
from prunus.models.trace import find_blocks
from prunus.models.whole import load_whole
from prunus.progress import progress as progress_bar
from prunus.recovery.adapters import adapter_names, add_adapters, merged
from prunus.recovery.data import TrainingText
from prunus.recovery.keep_masks import KeepMasks, count_zeros, num_weights
from prunus.recovery.progress_files import Metrics, Progress, ProgressFiles, Tensors
from prunus.recovery.teacher import HELD_OUT, TRAIN, Teacher, TeacherInMemory, teacher_on_disk
from prunus.recovery.trainer import Trainer, thinned
from prunus.steps.recover_result import Result, Trained, say_guessed_masks, zeros_facts
from prunus.steps.recover_setup import Setup


def train_whole(
    setup: Setup,
    output: OutputDirectory,
    text: TrainingText,
    saved: dict[str, Any] | None,
    tensorboard: str | Path | None,
) -> dict[str, Any]:
    """Train, write the weight files, and return what the record says of it; {} in every process but the first."""
    also = _nobody if tensorboard is None else _tensorboard(Path(tensorboard))
    lora = setup.settings.method == "lora"
    student = load_whole(setup.checkpoint, setup.dtype if lora else torch.float32, setup.processes.device)
    weights = {name: parameter.detach() for name, parameter in student.named_parameters()}
    aliases = _aliases(student)
    masks, pruned = setup.masks.find(weights)
    say_guessed_masks(setup, pruned)
    before = count_zeros(pruned, weights)
    adapted = list(dict.fromkeys(block.full_parameter(one) for block, one in setup.model.spec.matrices)) if lora else []
    if lora:
        add_adapters(student, adapted, masks, setup.settings.lora_rank, setup.settings.lora_alpha, setup.settings.seed)
    if setup.settings.gradient_checkpointing:
        _recompute_blocks(student)
    trainer = Trainer(
        student,
        _teacher(setup, text),
        masks,
        text,
        setup.plan,
        weight_decay=setup.settings.weight_decay,
        processes=setup.processes,
    )
    progress = _progress(saved, setup)
    files = ProgressFiles(output.partial, output.save_progress if setup.processes.is_main else None)
    metrics = Metrics(output.partial, resumed_at=progress.step, writes=setup.processes.is_main, also=also)
    with progress_bar(f"Recover, {setup.settings.method}", setup.plan.steps, progress.step) as advance:
        trainer.train(progress, files, metrics, advance)
    if not setup.processes.is_main:
        return {}
    best = files.weights(progress.best_step)
    result = Result(setup, output, pruned)
    result.write_all(_merged(setup, best, adapted, masks) if lora else lambda name: best.get(aliases[name]))
    zeros = zeros_facts(
        before, {**before, **result.zeros}, result.all_zeros, num_weights(pruned), setup.checkpoint.num_parameters
    )
    return {**_facts(progress, text, setup), **zeros}


def _nobody(_row: dict[str, Any]) -> None:
    return None


def _tensorboard(folder: Path) -> Callable[[dict[str, Any]], None]:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise UserError("--tensorboard needs the extra 'train': pip install 'prunus[train]'.") from None
    writer = SummaryWriter(str(folder))

    def write(row: dict[str, Any]) -> None:
        values = {f"held_out/{name}": value for name, value in row.get("held_out", {}).items()}
        values |= {f"train/{name}": value for name, value in row.items() if name not in ("step", "held_out")}
        for name, value in values.items():
            writer.add_scalar(name, value, row["step"])
        writer.flush()

    return write


def _aliases(model: nn.Module) -> dict[str, str]:
    """Every name of each parameter, tied ones included, to the one name it is trained under."""
    first: dict[int, str] = {}
    return {name: first.setdefault(id(p), name) for name, p in model.named_parameters(remove_duplicate=False)}


def _recompute_blocks(model: nn.Module) -> None:
    """Gradient checkpointing: a block keeps its input alone and runs again in backward."""
    for block in find_blocks(model)[1]:
        block.__dict__["forward"] = partial(recompute, block.forward, use_reentrant=False)


def _teacher(setup: Setup, text: TrainingText) -> Teacher | None:
    """In memory, or on disk with --top-k; in memory too where it is asked on held-out text alone."""
    teacher, settings = setup.teacher, setup.settings
    if teacher is None:
        return None
    load = partial(load_whole, teacher, setup.dtype, setup.processes.device)
    if settings.top_k is None:
        return TeacherInMemory(load())
    with setup.processes.main_first():
        return teacher_on_disk(
            {TRAIN: text.train_NT, HELD_OUT: text.held_out_NT},
            checkpoint=teacher,
            load=load,
            k=settings.top_k,
            temperature=settings.temperature,
            dtype=setup.dtype,
            device=setup.processes.device,
        )


def _progress(saved: dict[str, Any] | None, setup: Setup) -> Progress:
    if saved is None:
        return Progress(dtype=str(setup.dtype).removeprefix("torch."))
    return Progress(**{field.name: saved[field.name] for field in fields(Progress)})


def _merged(setup: Setup, factors: Tensors, adapted: list[str], masks: KeepMasks) -> Trained:
    """The adapted matrices, merged in fp32 with the weights as the checkpoint has them."""
    scale = setup.settings.lora_alpha / setup.settings.lora_rank

    def trained(name: str) -> Tensor | None:
        if name not in adapted:
            return None
        original = setup.model.names.load([name], setup.checkpoint.read)[name]
        a, b = (factors[factor] for factor in adapter_names(name))
        keep = masks.keep.get(name)
        return merged(original, None if keep is None else keep.cpu(), a, b, scale)

    return trained


def _facts(progress: Progress, text: TrainingText, setup: Setup) -> dict[str, Any]:
    first, best = progress.evaluations[0], next(e for e in progress.evaluations if e["step"] == progress.best_step)
    tokens = progress.step * setup.plan.sequences * text.train_NT.shape[1]
    return {
        "seconds": round(progress.seconds, 2),
        "peak_memory_bytes": progress.peak_memory_bytes,
        "steps": progress.step,
        "tokens": tokens,
        "tokens_per_second": round(tokens / max(progress.train_seconds, 1e-9), 1),
        "seconds_by_part": {part: round(seconds, 2) for part, seconds in progress.parts.items()},
        "held_out_before": _told(first, setup),
        "held_out_after": _told(best, setup),
        "best_step": progress.best_step,
        "stopped": progress.stopped,
        "evaluations": progress.evaluations,
        "curve": thinned(progress.curve),
    }


def _told(evaluation: dict[str, Any], setup: Setup) -> dict[str, Any]:
    """Held-out losses with what was measured: KL over the likeliest tokens alone is lower than over all."""
    over = (
        "all tokens" if setup.settings.top_k is None else f"the teacher's {setup.settings.top_k} likeliest and the rest"
    )
    losses = {name: value for name, value in evaluation.items() if name != "step"}
    return {**losses, **({"kl_over": over} if "kl" in losses else {})}
