"""`prunus.sparsify`: model directory in, sparse model directory out, one decoder block in memory at a time."""

from collections.abc import Collection
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

from prunus.checkpoint import Checkpoint, OutputDirectory, open_dense
from prunus.machine_choice import choose_device, choose_dtype, parse_memory
from prunus.models import StreamedModel
from prunus.result import Run
from prunus.settings import SparsifySettings
from prunus.sparsity import METHODS
from prunus.sparsity.methods import make_options
from prunus.steps.allocate import SparsifyTo, sparsify_allocated
from prunus.steps.block_job import BlockJob
from prunus.steps.estimate import Estimate, estimate_sparsify
from prunus.steps.identity import identity
from prunus.steps.length import fit_length
from prunus.steps.notices import notices
from prunus.steps.plan import Plan, make_plan
from prunus.steps.sparsify_edit import SparsifyEdit, notes_of_unseen
from prunus.text.batches import TokenBatch


def sparsify(
    model: str | Path,
    out: str | Path,
    *,
    max_memory: str | int | None = None,
    trust_remote_code: bool = False,
    **settings: Any,
) -> Run:
    """Write a sparse copy of `model` to `out`.

    `settings` are the fields of `SparsifySettings`: method, pattern, overrides, protect, calibration, samples, ... The
    same call again goes on where an interrupted one stopped, and returns at once when `out` is already its result.
    `max_memory` ("4GiB") bounds what waits in memory between stages; the rest waits on disk beside `out`: other times,
    the same result. Raises UserError for anything the user can mend.
    """
    step, limit = _step(model, trust_remote_code, settings), parse_memory(max_memory)
    output = OutputDirectory(Path(out), step.model.checkpoint, identity(step.settings))
    if output.is_done:
        return Run.open(output.out, reused=True)
    with output:
        if step.settings.allocation == "uniform":
            BlockJob(step.model, step, limit).run(output)
        else:
            another = _another(step.model.checkpoint, limit)
            sparsify_allocated(step.model, output.out, step.settings, output.fingerprint, another, limit)
    return Run.open(output.out)


def estimate(
    model: str | Path, *, max_memory: str | int | None = None, trust_remote_code: bool = False, **settings: Any
) -> Estimate:
    """What `sparsify` with these arguments would cut, and the memory and time it would take; touches nothing."""
    step = _step(model, trust_remote_code, settings)
    return estimate_sparsify(step.model, step.plan, step.method, step.settings, parse_memory(max_memory))


def _step(model: str | Path, trust_remote_code: bool, settings: dict[str, Any]) -> "SparsifyStep":
    checked = SparsifySettings.check(**settings)
    checkpoint = open_dense(model, trust_remote_code=trust_remote_code)
    return SparsifyStep(fit_length(checked, checkpoint.config) if checked.reads_text else checked, checkpoint)


def _another(checkpoint: Checkpoint, max_memory: int | None) -> SparsifyTo:
    """Sparsify the same model with other settings to another place."""

    def sparsify_to(out: Path, settings: SparsifySettings) -> None:
        output = OutputDirectory(out, checkpoint, identity(settings))
        if not output.is_done:
            step = SparsifyStep(settings, checkpoint)
            with output:
                BlockJob(step.model, step, max_memory).run(output)

    return sparsify_to


class SparsifyStep:
    """What sparsifying does to the blocks: a `BlockStep`."""

    verb = "sparsify"
    prepares = False
    sizes = None

    def __init__(self, settings: SparsifySettings, checkpoint: Checkpoint) -> None:
        self.settings = settings
        self.method = METHODS[settings.method]
        self.options = make_options(self.method.options, settings.options)
        device = choose_device(settings.device)
        width = int(checkpoint.config.get_text_config(decoder=True).hidden_size)
        self.model = StreamedModel(checkpoint, dtype=choose_dtype(settings.dtype, device, width), device=device)
        self.plan: Plan = make_plan(
            self.model.spec, self.method, settings.pattern, settings.overrides, settings.protect, settings.head
        )
        self.title = f"Sparsify, {settings.method}"
        self.needs: Collection[str] = self.method.needs
        self.propagate = settings.propagate
        self.edits_head = settings.head
        self.notices = notices(self.plan.patterns.values())

    def prepare(self, batch: TokenBatch, rows: list[dict[str, Any]]) -> None:
        raise AssertionError("matrices are pruned one after the other")

    def edit(self, rows: list[dict[str, Any]]) -> SparsifyEdit:
        return SparsifyEdit(self.method, self.options, self.plan, rows)

    def finished(self, index: int, state: dict[str, Tensor]) -> dict[str, Tensor]:
        return state

    def stored(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return tensors

    def outer(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        return state

    def config(self) -> None:
        return None

    def remarks(self, rows: list[dict[str, Any]]) -> list[str]:
        return notes_of_unseen(self.method.needs, rows)

    def facts(self, rows: list[dict[str, Any]], num_zeros: int) -> dict[str, Any]:
        parameters = self.model.checkpoint.num_parameters
        return {
            "options": asdict(self.options),
            "allocation": self.settings.allocation,
            "parameters": parameters,
            "sparsity": achieved(rows, num_zeros, parameters),
            "matrices": rows,
        }


def achieved(matrices: list[dict[str, Any]], num_zeros: int, num_parameters: int) -> dict[str, float]:
    """Fraction of zeros over the matrices that this step pruned, and over all parameters of the model."""
    sizes = [row["shape"][0] * row["shape"][1] for row in matrices]
    zeros = sum(round(row["sparsity"] * size) for row, size in zip(matrices, sizes, strict=True))
    return {"pruned_matrices": zeros / max(sum(sizes), 1), "all_parameters": num_zeros / max(num_parameters, 1)}
