"""The edit that quantizes one group of matrices, and the table of facts it leaves behind."""

import time
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from prunus.calibration import Tensors
from prunus.models.sources import Source
from prunus.models.spec import BlockSpec, Group, LinearSpec, Stage
from prunus.quantizing import Quantized, Quantizer, prepare, quantize_matrix
from prunus.sparsity import Statistics, reconstruction_error
from prunus.sparsity.methods import Notes
from prunus.steps.quantize_plan import QuantizePlan

SCALED = "inputs_scaled"  # among the notes on a matrix: whether it could get scales of its inputs


@dataclass(frozen=True, slots=True)
class Fold:
    """Columns of `matrices` (parameters) that are stored `scale_I` times as large, and what makes up for it."""

    matrices: tuple[str, ...]
    source: Source
    scale_I: Tensor


@dataclass
class QuantizeEdit:
    """An Edit of the block pass: puts every matrix on its grid and appends one row for each to `matrices`.

    The scales of the block that is being edited wait in `scales`, laid out like the parameters they belong to. Factors
    on inputs wait in `folds`: while the pass is in the block, its inputs are as they were, and the matrices fit them.
    """

    method: Quantizer
    plan: QuantizePlan
    sources: Mapping[str, Source] = field(default_factory=dict)
    matrices: list[dict[str, Any]] = field(default_factory=list)
    scales: dict[str, Tensor] = field(default_factory=dict)
    folds: list[Fold] = field(default_factory=list)

    def needs_at(self, block: BlockSpec, stage: Stage) -> Collection[str]:
        return self.method.needs

    def __call__(
        self, block: BlockSpec, group: Group, weights_OI: list[Tensor], statistics: Statistics, tensors: Tensors
    ) -> list[Tensor]:
        if self.method.needs and not statistics.num_tokens:
            statistics = Statistics.of_nothing(weights_OI[0].shape[1], weights_OI[0].device)
        start = time.perf_counter()
        prepared = prepare(self.method, statistics)
        scale_I = self._input_scale(block, group, weights_OI, statistics)
        shared = (time.perf_counter() - start) / len(weights_OI)
        solved = []
        for linear, weight_OI in zip(group.linears, weights_OI, strict=True):
            start = time.perf_counter()
            found = self._quantized(weight_OI, scale_I, statistics, prepared)
            seconds = shared + time.perf_counter() - start
            self._keep_scales(block, linear, tensors, found.scale_OG)
            self.matrices.append(self._row(block, linear, weight_OI, found, statistics, seconds))
            solved.append(found.values_OI)
        return solved

    def _quantized(self, weight_OI: Tensor, scale_I: Tensor | None, statistics: Statistics, prepared: Any) -> Quantized:
        """The matrix as it multiplies inputs that nothing has scaled yet."""
        scheme, pattern = self.plan.scheme, self.plan.pattern
        if scale_I is None:
            return quantize_matrix(self.method, weight_OI, scheme, statistics, prepared, pattern)
        found = quantize_matrix(self.method, weight_OI * scale_I, scheme, statistics, prepared, pattern)
        return replace(found, values_OI=found.values_OI / scale_I)  # exact, as is its inverse: powers of two

    def fold(self, state: dict[str, Tensor]) -> None:
        """Make the block's tensors what is stored: matrices larger, what makes their inputs smaller by as much."""
        for one in self.folds:
            for name in one.matrices:
                state[name] *= one.scale_I.to(state[name])
            for name in one.source.parameters:
                _divide_rows(state[name], one.scale_I)
            if one.source.matrix in self.scales:
                _divide_rows(self.scales[one.source.matrix], one.scale_I)
        self.folds.clear()

    def _input_scale(
        self, block: BlockSpec, group: Group, weights_OI: list[Tensor], statistics: Statistics
    ) -> Tensor | None:
        """What each input's weights are multiplied by (I), in their dtype; None where nothing could make up for it."""
        source = self.sources.get(block.full_name(group.linears[0]))
        if self.method.input_scales is None or source is None:
            return None
        scale_I = self.method.input_scales(weights_OI, self.plan.scheme, statistics)
        self.folds.append(Fold(tuple(map(block.full_parameter, group.linears)), source, scale_I.cpu()))
        return scale_I.to(weights_OI[0].dtype)

    def _notes(self, block: BlockSpec, linear: LinearSpec) -> Notes:
        return {} if self.method.input_scales is None else {SCALED: block.full_name(linear) in self.sources}

    def _keep_scales(self, block: BlockSpec, linear: LinearSpec, tensors: Tensors, scale_OG: Tensor) -> None:
        name = block.full_parameter(linear)
        if linear.expert is None:
            self.scales[name] = scale_OG.cpu()
            return
        if name not in self.scales:
            self.scales[name] = torch.empty(len(tensors[name]), *scale_OG.shape, dtype=scale_OG.dtype)
        self.scales[name][linear.expert] = scale_OG

    def _row(
        self,
        block: BlockSpec,
        linear: LinearSpec,
        weight_OI: Tensor,
        found: Quantized,
        statistics: Statistics,
        seconds: float,
    ) -> dict[str, Any]:
        size, itemsize, scheme = weight_OI.numel(), weight_OI.element_size(), self.plan.scheme
        zeros = int((found.values_OI == 0).sum())
        return {
            "name": block.full_name(linear),
            "block": int(block.name.rpartition(".")[2]),
            "projection": linear.projection,
            "shape": list(linear.shape),
            "scheme": scheme.name,
            "sparsity": zeros / size,
            "error": reconstruction_error(weight_OI, found.values_OI, statistics),
            "tokens": statistics.num_tokens,
            "zeros_before": int((weight_OI == 0).sum()),
            "zeros_after": zeros,
            "bytes_before": size * itemsize,
            "bytes_after": scheme.num_bytes(linear.shape, itemsize),
            "seconds": round(seconds, 4),
            "notes": {**found.notes, **self._notes(block, linear)},
        }


def notes_of_unscaled(rows: Iterable[dict[str, Any]]) -> list[str]:
    """What is said of matrices whose inputs nothing could scale."""
    asked = [row for row in rows if SCALED in row["notes"]]
    left = [row for row in asked if not row["notes"][SCALED]]
    projections = ", ".join(dict.fromkeys(row["projection"] for row in left))
    return [
        f"{len(left)} of {len(asked)} matrices were rounded to nearest, since nothing before them can make their "
        f"inputs smaller: {projections}."
    ] * bool(left)


def _divide_rows(tensor: Tensor, scale_I: Tensor) -> None:
    tensor /= scale_I.to(tensor).reshape(-1, *[1] * (tensor.ndim - 1))
