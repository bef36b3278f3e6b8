"""The edit that sparsifies one group of matrices, and the table of facts it leaves behind."""

import time
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from prunus.calibration import Tensors
from prunus.models.spec import BlockSpec, Group, LinearSpec, Stage
from prunus.sparsity import Method, Pattern, PruneResult, Statistics, prepare, prune, reconstruction_error
from prunus.steps.plan import Plan


@dataclass
class SparsifyEdit:
    """An Edit of the block pass: prunes what the plan says and appends one row per matrix to `matrices`."""

    method: Method
    options: object
    plan: Plan
    matrices: list[dict[str, Any]] = field(default_factory=list)

    def needs_at(self, block: BlockSpec, stage: Stage) -> Collection[str]:
        return self.method.needs

    def __call__(
        self, block: BlockSpec, group: Group, weights_OI: list[Tensor], statistics: Statistics, tensors: Tensors
    ) -> list[Tensor]:
        wanted = [self.plan.pattern_of(block, linear) for linear in group.linears]
        if not any(wanted):
            return weights_OI
        if self.method.needs and not statistics.num_tokens:
            statistics = Statistics.of_nothing(weights_OI[0].shape[1], weights_OI[0].device)
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


def notes_of_unseen(needs: Collection[str], rows: list[dict[str, Any]], treated: str = "pruned") -> list[str]:
    """What a user should hear afterwards of matrices that no token reached."""
    unseen = [row["name"] for row in rows if row["tokens"] == 0]
    if not needs or not unseen:
        return []
    return [
        f"{len(unseen)} matrices, such as {unseen[0]}, met no calibration token and were {treated} as if all their "
        "inputs were alike; give more, or more varied, calibration text."
    ]
