"""What a sparsify step will cost, from shapes and a short measurement of this machine."""

import math
from dataclasses import asdict, dataclass
from typing import Any

from prunus.machine_choice import product_seconds
from prunus.models import StreamedModel
from prunus.settings import SparsifySettings
from prunus.sparsity import Method
from prunus.steps.memory_plan import plan_memory
from prunus.steps.plan import Plan, candidates
from prunus.text.self_generated import sequences_at_once

READ_BYTES_PER_SECOND = 8e9  # what a small machine reads from memory: a decoding step reads every weight once


@dataclass(frozen=True, slots=True)
class Estimate:
    """A dry run: what will be cut, and what it will take. `seconds` is a guess within a factor of two."""

    matrices: int
    weights: int
    zeros: int
    parameters: int
    sequences: int
    sequences_in_memory: int
    disk_bytes: int  # for a while, beside the result: hidden states, and the sequences that wait on disk
    memory_bytes: int
    seconds: float
    by_projection: list[dict[str, Any]]

    def summary(self) -> dict[str, Any]:
        return {"step": "sparsify", "dry_run": True, **asdict(self)}


def estimate_sparsify(
    model: StreamedModel, plan: Plan, method: Method, settings: SparsifySettings, max_memory: int | None
) -> Estimate:
    """Return the estimate. Raises UserError when not even one sequence fits into `max_memory` bytes."""
    weights = [
        linear.shape[0] * linear.shape[1]
        for b, linear in candidates(model.spec, head=True)
        if plan.pattern_of(b, linear)
    ]
    rate = _flops_per_second(model)
    return Estimate(
        matrices=len(weights),
        weights=sum(weights),
        zeros=plan.num_pruned(model.spec),
        parameters=model.checkpoint.num_parameters,
        **asdict(plan_memory(model, method.needs, settings, max_memory)),
        seconds=round(_flops(model, method, settings) / rate + _sampling_seconds(model, method, settings, rate), 1),
        by_projection=_by_projection(model, plan),
    )


def _flops(model: StreamedModel, method: Method, settings: SparsifySettings) -> float:
    tokens = settings.samples * settings.length if method.needs else 0
    total = 0.0
    for block in model.spec.blocks:
        for stage in block.stages:
            for group in stage.groups:
                outs = sum(linear.shape[0] for linear in group.linears)
                width = group.linears[0].shape[1]
                share = 1 / len(stage.groups)  # experts share the tokens
                gram = 1.125 * width**2 if "gram" in method.needs else 0  # upper triangle: 9/16 of 2 d^2
                total += tokens * share * (2 * outs * width + gram) + _solve_flops(method, outs, width)
    return total


def _solve_flops(method: Method, outs: int, width: int) -> float:
    """A factorisation and a few dozen products with the Gram for solvers, a sort for the others."""
    return 10 * width**3 + 100 * outs * width**2 if "gram" in method.needs else 200 * outs * width


def _sampling_seconds(model: StreamedModel, method: Method, settings: SparsifySettings, rate: float) -> float:
    """The model's own samples, unless they are cached: a decoding step per token, for many sequences at once."""
    if not method.needs or not settings.samples_itself:
        return 0.0
    together = sequences_at_once(settings.samples, settings.length)
    steps = math.ceil(settings.samples / together) * settings.length
    weights = model.checkpoint.num_parameters
    each = weights * model.dtype.itemsize / READ_BYTES_PER_SECOND + 2 * weights * together / rate
    return 1.5 * steps * each


def _flops_per_second(model: StreamedModel) -> float:
    width = int(model.config.get_text_config(decoder=True).hidden_size)
    bare = 2 * 512 * width**2 / product_seconds(model.dtype, str(model.device), width)
    return 0.7 * bare  # a whole pass reaches about 70% of a bare product's rate


def _by_projection(model: StreamedModel, plan: Plan) -> list[dict[str, Any]]:
    table: dict[tuple[str, str], dict[str, Any]] = {}
    for block, linear in candidates(model.spec, head=True):
        pattern = plan.pattern_of(block, linear)
        key = (linear.projection, str(pattern) if pattern else "dense")
        row = table.setdefault(
            key, {"projection": key[0], "pattern": key[1], "shape": list(linear.shape), "matrices": 0, "zeros": 0}
        )
        row["matrices"] += 1
        row["zeros"] += pattern.num_pruned(linear.shape) if pattern else 0
    return list(table.values())
