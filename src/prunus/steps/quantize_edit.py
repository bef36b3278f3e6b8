"""The edit that quantizes one group of matrices, and the table of facts it leaves behind."""

import time
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from prunus.calibration import Tensors
from prunus.models.spec import BlockSpec, Group, LinearSpec, Stage
from prunus.quantizing import Quantized, Quantizer, prepare, quantize_matrix
from prunus.sparsity import Statistics, reconstruction_error
from prunus.steps.quantize_plan import QuantizePlan


@dataclass
class QuantizeEdit:
    """An Edit of the block pass: puts every matrix on its grid and appends one row for each to `matrices`.

    The scales of the block that is being edited wait in `scales`, laid out like the parameters they belong to.
    """

    method: Quantizer
    plan: QuantizePlan
    matrices: list[dict[str, Any]] = field(default_factory=list)
    scales: dict[str, Tensor] = field(default_factory=dict)

    def needs_at(self, block: BlockSpec, stage: Stage) -> Collection[str]:
        return self.method.needs

    def __call__(
        self, block: BlockSpec, group: Group, weights_OI: list[Tensor], statistics: Statistics, tensors: Tensors
    ) -> list[Tensor]:
        if self.method.needs and not statistics.num_tokens:
            statistics = Statistics.of_nothing(weights_OI[0].shape[1], weights_OI[0].device)
        start = time.perf_counter()
        prepared = prepare(self.method, statistics)
        shared = (time.perf_counter() - start) / len(weights_OI)
        solved = []
        for linear, weight_OI in zip(group.linears, weights_OI, strict=True):
            start = time.perf_counter()
            found = quantize_matrix(self.method, weight_OI, self.plan.scheme, statistics, prepared, self.plan.pattern)
            seconds = shared + time.perf_counter() - start
            self._keep_scales(block, linear, tensors, found.scale_OG)
            self.matrices.append(self._row(block, linear, weight_OI, found, statistics, seconds))
            solved.append(found.values_OI)
        return solved

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
            "notes": found.notes,
        }
