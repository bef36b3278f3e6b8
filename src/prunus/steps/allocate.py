"""Non-uniform sparsity over layers: find an allocation, prune with it and without it, keep what is better held out.

Allocations that help one method or model hurt another, so one is only accepted when its KL to the dense model, on
calibration windows that pruning never saw, beats that of uniform sparsity. Both runs are ordinary sparsify steps in
`OUT.allocation/`, so an interrupted search goes on where it stopped.

Shapes: N = windows, T = tokens, O = out_features, I = in_features.
"""

import fnmatch
import json
import shutil
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from prunus.calibration import BlockPass, HiddenStates, Tensors, embed_all, hidden_shape
from prunus.checkpoint.output import sync_directory, trials_of
from prunus.checkpoint.record import RECORD_NAME, read_record, write_json
from prunus.errors import UserError
from prunus.models import StreamedModel
from prunus.models.spec import BlockSpec, Group, LinearSpec, Stage
from prunus.progress import progress
from prunus.settings import SparsifySettings
from prunus.sparsity import METHODS, Statistics, Unstructured, parse_pattern
from prunus.sparsity.allocation import (
    Counts,
    apportion,
    as_patterns,
    by_sensitivity,
    dlp,
    one_threshold,
    outlier_ratio,
    owl,
)
from prunus.sparsity.patterns import Compare
from prunus.steps.calibration_text import calibration_batch
from prunus.steps.held_out import held_out_kl, held_out_windows, spread
from prunus.steps.sensitivity import sensitivity_of_windows
from prunus.text.batches import TokenBatch

# Writes a model with these settings to this directory.
SparsifyTo = Callable[[Path, SparsifySettings], object]


def sparsify_allocated(
    model: StreamedModel,
    out: Path,
    settings: SparsifySettings,
    fingerprint: str,
    sparsify_to: SparsifyTo,
    max_memory: int | None,
) -> None:
    """Make OUT the better of the asked allocation and the uniform one, and record both KLs. Raises UserError.

    A search killed at any moment goes on: a model whose record says that it was chosen only waits for its name.
    """
    place = trials_of(out)
    _check_ours(place, settings)
    chosen = [place / name for name in ("uniform", settings.allocation) if _fingerprint(place / name) == fingerprint]
    better = chosen[0] if chosen else _search(model, place, settings, fingerprint, sparsify_to, max_memory)
    for other in set(place.iterdir()) - {better}:
        shutil.rmtree(other) if other.is_dir() else other.unlink()
    better.rename(out)
    sync_directory(out.parent)
    place.rmdir()


def _check_ours(place: Path, settings: SparsifySettings) -> None:
    """Refuse a directory that holds anything but trials, because it is cleared in the end."""
    trials = {"uniform", settings.allocation}
    known = {*trials, *(f"{name}.partial" for name in trials), f"{settings.allocation}.json"}
    strange = [file.name for file in place.iterdir() if file.name not in known] if place.exists() else []
    if strange:
        raise UserError(
            f"{place} is in the way: it holds {strange[0]}, no trial of this run; move it or choose another OUT."
        )


def _search(
    model: StreamedModel,
    place: Path,
    settings: SparsifySettings,
    fingerprint: str,
    sparsify_to: SparsifyTo,
    max_memory: int | None,
) -> Path:
    """Make both models; the better one's record then says that it is what was asked for."""
    pattern = parse_pattern(settings.pattern)
    assert isinstance(pattern, Unstructured)
    uniform = settings.model_copy(update={"allocation": "uniform"})
    sparsify_to(place / "uniform", uniform)
    found = _allocation(model, settings, pattern, place)
    sparsify_to(place / settings.allocation, uniform.model_copy(update={"overrides": found["overrides"]}))
    held_out = held_out_windows(model, settings)
    kls = {name: held_out_kl(model, place / name, held_out, max_memory) for name in ("uniform", settings.allocation)}
    winner = min(kls, key=lambda name: (kls[name], name != "uniform"))
    windows = len(held_out.tokens_NT)
    facts = {"asked": settings.allocation, "used": winner, "held_out_kl": kls, "held_out_windows": windows}
    _record_choice(place / winner, settings, fingerprint, facts, found["sensitivity"])
    return place / winner


def _allocation(model: StreamedModel, settings: SparsifySettings, pattern: Unstructured, place: Path) -> dict[str, Any]:
    """`overrides`, the pattern of every matrix, and `sensitivity`, the rows it was decided from where it was measured.

    Kept on disk, so that a search that goes on uses the same.
    """
    file = place / f"{settings.allocation}.json"
    if not file.exists():
        protected = _protected(model, settings)
        matrices = [(b, linear) for b, linear in model.spec.matrices if b.full_name(linear) not in protected]
        found = ALLOCATIONS[settings.allocation](model, settings, pattern, matrices)
        shapes = {block.full_name(linear): linear.shape for block, linear in matrices}
        patterns = as_patterns(shapes, found.counts, _comparison_group(settings, pattern))
        overrides = {name: str(wanted) for name, wanted in patterns.items()}
        write_json(file, {"overrides": overrides, "sensitivity": found.sensitivity})
    kept: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return kept


def _comparison_group(settings: SparsifySettings, pattern: Unstructured) -> Compare:
    """What was asked for; else the method's own, as in the papers, which allocate and leave the rest to the method.

    One threshold over the model is itself a ranking of whole matrices.
    """
    own: Compare = "matrix" if settings.allocation == "model" else METHODS[settings.method].compare
    return pattern.compare or own


def _protected(model: StreamedModel, settings: SparsifySettings) -> set[str]:
    names = [block.full_name(linear) for block, linear in model.spec.matrices]
    return {name for glob in settings.protect for name in fnmatch.filter(names, glob)}


Matrices = list[tuple[BlockSpec, LinearSpec]]


@dataclass(frozen=True, slots=True)
class Allocated:
    """How many weights each matrix loses, and the measured rows that this was decided from, where there are any."""

    counts: Counts
    sensitivity: list[dict[str, Any]] = field(default_factory=list)


def _sizes(matrices: Matrices) -> dict[str, int]:
    return {block.full_name(linear): linear.shape[0] * linear.shape[1] for block, linear in matrices}


def _per_block(
    model: StreamedModel,
    settings: SparsifySettings,
    matrices: Matrices,
    fact: Callable[[Tensor], float],
) -> dict[str, float]:
    """For every matrix, the mean of `fact(score)` over the matrices of its block, as the papers allocate."""
    values: dict[str, list[float]] = {}
    for (block, _), (_, score_OI) in zip(matrices, Scores(model, settings, matrices), strict=True):
        values.setdefault(block.name, []).append(fact(score_OI))
    return {block.full_name(ln): sum(values[block.name]) / len(values[block.name]) for block, ln in matrices}


def _by_owl(model: StreamedModel, settings: SparsifySettings, pattern: Unstructured, matrices: Matrices) -> Allocated:
    sizes, ratios = _sizes(matrices), _per_block(model, settings, matrices, outlier_ratio)
    return Allocated(owl(sizes, ratios, pattern.sparsity))


def _by_dlp(model: StreamedModel, settings: SparsifySettings, pattern: Unstructured, matrices: Matrices) -> Allocated:
    sizes = _sizes(matrices)
    medians = _per_block(model, settings, matrices, lambda score_OI: float(score_OI.median()))
    return Allocated(dlp(sizes, medians, pattern.sparsity))


def _by_one_threshold(
    model: StreamedModel, settings: SparsifySettings, pattern: Unstructured, matrices: Matrices
) -> Allocated:
    return Allocated(one_threshold(Scores(model, settings, matrices), pattern.sparsity))


def _by_measured_sensitivity(
    model: StreamedModel, settings: SparsifySettings, pattern: Unstructured, matrices: Matrices
) -> Allocated:
    seen = calibration_batch(model, settings)  # not the windows that judge the result
    rows = sensitivity_of_windows(model, spread(seen, range(len(seen.tokens_NT))).tokens_NT, pattern, by="block")
    harm = {row["name"]: max(row["kl"], 1e-9) for row in rows}
    sizes = _sizes(matrices)
    block_sizes: dict[str, int] = {}
    for block, linear in matrices:
        block_sizes[block.name] = block_sizes.get(block.name, 0) + linear.shape[0] * linear.shape[1]
    counts = by_sensitivity(block_sizes, {name: harm[name] for name in block_sizes}, pattern.sparsity)
    wanted = {block.full_name(ln): counts[block.name] / block_sizes[block.name] for block, ln in matrices}
    return Allocated(apportion(sizes, wanted, pattern.sparsity), rows)


ALLOCATIONS = {
    "model": _by_one_threshold,
    "owl": _by_owl,
    "dlp": _by_dlp,
    "sensitivity": _by_measured_sensitivity,
}


@dataclass
class Norms:
    """An Edit that changes nothing and keeps the mean squared inputs of every matrix."""

    sq_norms: dict[str, Tensor] = field(default_factory=dict)

    def needs_at(self, block: BlockSpec, stage: Stage) -> Collection[str]:
        return ("input_sq_norm",)

    def __call__(
        self, block: BlockSpec, group: Group, weights_OI: list[Tensor], statistics: Statistics, tensors: Tensors
    ) -> list[Tensor]:
        for linear in group.linears:
            self.sq_norms[block.full_name(linear)] = statistics.sq_norm()
        return weights_OI


class Scores:
    """(name, |W| * ||x||) of every matrix, one in memory at a time, as often as it is gone through."""

    def __init__(self, model: StreamedModel, settings: SparsifySettings, matrices: Matrices) -> None:
        self._model, self._matrices = model, matrices
        blind = settings.method == "magnitude"  # it looks at weights alone, so its scores do too
        self._sq_norms = {} if blind else input_norms(model, calibration_batch(model, settings))

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        parameter, stored = "", torch.empty(0)
        for block, linear in self._matrices:
            wanted = f"{block.name}.{linear.parameter}"
            if wanted != parameter:  # a bank of experts is read once for all of them
                parameter, stored = wanted, self._model.names.load([wanted], self._model.checkpoint.read)[wanted]
            score_OI = linear.view(stored).float().abs()
            name = block.full_name(linear)
            yield name, score_OI * self._sq_norms[name].sqrt().cpu() if self._sq_norms else score_OI


def input_norms(model: StreamedModel, batch: TokenBatch) -> dict[str, Tensor]:
    """Mean squared inputs of every matrix of the dense model."""
    hidden = HiddenStates.scratch(hidden_shape(model, batch.tokens_NT), model.dtype)
    embed_all(model, batch.tokens_NT, hidden)
    edit = Norms()
    with progress("Input norms", len(model.spec.blocks) * len(batch.tokens_NT)) as advance:
        run = BlockPass(model=model, real_NT=batch.real_NT, edit=edit, propagate="dense", advance=advance)
        for index in range(len(model.spec.blocks)):
            run.run_block(index, hidden, hidden)
    return edit.sq_norms


def _fingerprint(directory: Path) -> str | None:
    record = read_record(directory)
    return record["history"][-1]["fingerprint"] if record else None


def _record_choice(
    directory: Path,
    settings: SparsifySettings,
    fingerprint: str,
    facts: dict[str, Any],
    measured: list[dict[str, Any]],
) -> None:
    """Give the record the settings that were asked for, and what was measured of the input on the way."""
    record = read_record(directory)
    assert record is not None
    entry = record["history"][-1]
    entry |= {
        "sensitivity": [*entry["sensitivity"], *measured],
        "settings": settings.model_dump(mode="json"),
        "fingerprint": fingerprint,
        "allocation": facts,
    }
    write_json(directory / RECORD_NAME, record)
