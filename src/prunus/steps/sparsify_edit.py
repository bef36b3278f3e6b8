"""The edit that sparsifies one group of matrices, and the table of facts it leaves behind."""

import time
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from prunus.models.spec import BlockSpec, Group, LinearSpec
from prunus.sparsity import Method, Pattern, PruneResult, Statistics, prepare, prune, reconstruction_error
from prunus.steps.plan import Plan


@dataclass
class SparsifyEdit:
    """An Edit of the block pass: prunes what the plan says and appends one row per matrix to `matrices`."""

    method: Method
    options: object
    plan: Plan
    matrices: list[dict[str, Any]] = field(default_factory=list)

    @property
    def notices(self) -> list[str]:
        """What a user should hear of the work afterwards."""
        unseen = [row["name"] for row in self.matrices if row["tokens"] == 0]
        if not self.method.needs or not unseen:
            return []
        return [
            f"{len(unseen)} matrices, such as {unseen[0]}, met no calibration token and were pruned as if all their "
            "inputs were alike; give more, or more varied, calibration text."
        ]

    @property
    def needs(self) -> Collection[str]:
        return self.method.needs

    def __call__(
        self, block: BlockSpec, group: Group, weights_OI: list[Tensor], statistics: Statistics
    ) -> list[Tensor]:
        wanted = [self.plan.pattern_of(block, linear) for linear in group.linears]
        if not any(wanted):
            return weights_OI
        if self.method.needs and not statistics.num_tokens:
            statistics = self._all_alike(weights_OI[0])
        start = time.perf_counter()
        prepared = prepare(self.method, statistics, self.options)
        shared = (time.perf_counter() - start) / sum(pattern is not None for pattern in wanted)
        solved = []
        for linear, weight_OI, pattern in zip(group.linears, weights_OI, wanted, strict=True):
            if pattern is None:
                solved.append(weight_OI)
                continue
            start = time.perf_counter()
            result = prune(self.method, weight_OI, statistics, pattern, self.options, prepared)
            seconds = shared + time.perf_counter() - start
            self.matrices.append(_row(block, linear, pattern, weight_OI, result, statistics, seconds))
            solved.append(result.weight_OI)
        return solved

    def _all_alike(self, weight_OI: Tensor) -> Statistics:
        """For an expert that no token was routed to: zeros would let the position of a weight decide."""
        ones_I = torch.ones(weight_OI.shape[1], device=weight_OI.device)
        gram_II = ones_I.diag() if "gram" in self.needs else None
        return Statistics(num_tokens=0, input_sq_norm_I=ones_I, gram_II=gram_II)


def _row(
    block: BlockSpec,
    linear: LinearSpec,
    pattern: Pattern,
    weight_OI: Tensor,
    result: PruneResult,
    statistics: Statistics,
    seconds: float,
) -> dict[str, Any]:
    size = weight_OI.numel()
    return {
        "name": block.full_name(linear),
        "block": int(block.name.rpartition(".")[2]) if block.name else None,
        "projection": linear.projection,
        "shape": list(linear.shape),
        "pattern": str(pattern),
        "sparsity_requested": pattern.num_pruned(linear.shape) / size,
        "sparsity": int((result.weight_OI == 0).sum()) / size,
        "error": reconstruction_error(weight_OI, result.weight_OI, statistics),
        "tokens": statistics.num_tokens,
        "seconds": round(seconds, 4),
        "notes": result.notes,
    }
