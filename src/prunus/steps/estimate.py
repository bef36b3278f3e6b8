"""What a sparsify step will cost, from shapes and a short measurement of this machine."""

from dataclasses import asdict, dataclass
from typing import Any

import psutil

from prunus.errors import UserError
from prunus.machine_choice import product_seconds
from prunus.models import StreamedModel
from prunus.settings import SparsifySettings
from prunus.sparsity import Method
from prunus.steps.plan import Plan, candidates

GRAM_COPIES = 4  # a solver keeps the Gram, its factor or inverse, and working copies
SOLVER_COPIES = 6  # fp32: the weight, targets, duals and masks of a solver
SCORE_COPIES = 4  # fp32: the weight, its scores, their order, the mask
# Of waiting sequences in memory, where the user sets no limit: less memory for some time, see docs/log.md
WAITING_BYTES = 400 << 20


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
    sequences = settings.samples if method.needs else 0
    fixed = (
        _process_bytes()
        + sequences * _hidden_bytes(model, settings.length)
        + max(_block_bytes(model, i, method) for i in range(len(model.spec.blocks)))
    )
    each = _sequence_bytes(model, settings.length)
    in_memory = min(sequences, max(WAITING_BYTES // each, 1))
    if max_memory is not None:
        in_memory = min(sequences, (max_memory - fixed) // each)
    if max_memory is not None and sequences and in_memory < 1:
        raise UserError(
            f"max memory of {max_memory / 2**30:.2f} GiB is too small: one block, its statistics and one sequence of "
            f"{settings.length} tokens take about {(fixed + each) / 2**30:.2f} GiB."
        )
    weights = [
        linear.shape[0] * linear.shape[1]
        for b, linear in candidates(model.spec, head=True)
        if plan.pattern_of(b, linear)
    ]
    return Estimate(
        matrices=len(weights),
        weights=sum(weights),
        zeros=plan.num_pruned(model.spec),
        parameters=model.checkpoint.num_parameters,
        sequences=sequences,
        sequences_in_memory=int(in_memory),
        disk_bytes=int(2 * sequences * _hidden_bytes(model, settings.length) + (sequences - in_memory) * each),
        memory_bytes=int(fixed + in_memory * each),
        seconds=round(_flops(model, method, settings) / _flops_per_second(model), 1),
        by_projection=_by_projection(model, plan),
    )


def _process_bytes() -> int:
    return int(psutil.Process().memory_info().rss)


def _block_bytes(model: StreamedModel, index: int, method: Method) -> int:
    """The block as stored, the copy that runs, its widest statistics, and the solver's working set."""
    infos = [model.checkpoint.tensors[key] for key in model.block_keys()[index]]
    stored = sum(info.num_bytes for info in infos)
    running = sum(info.num_elements for info in infos) * model.dtype.itemsize
    widest = max(linear.shape[1] for linear in model.spec.blocks[index].linears)
    largest = max(linear.shape[0] * linear.shape[1] for linear in model.spec.blocks[index].linears)
    grams = max(len(stage.groups) for stage in model.spec.blocks[index].stages) - 1 + GRAM_COPIES
    solver = grams * widest**2 * 4 if "gram" in method.needs else 0
    copies = SOLVER_COPIES if "gram" in method.needs else SCORE_COPIES
    return stored + running + solver + copies * largest * 4


def _sequence_bytes(model: StreamedModel, length: int) -> int:
    """What a waiting forward pass holds: the residual, the last normed input, and the input of the widest matrix.

    At the attention output it is about as much: residual, normed input, q, k, v, and what attention gave.
    """
    widest = max(linear.shape[1] for _, linear in model.spec.matrices)
    return 2 * _hidden_bytes(model, length) + length * widest * model.dtype.itemsize


def _hidden_bytes(model: StreamedModel, length: int) -> int:
    """The hidden states of one sequence between two blocks."""
    return length * int(model.config.get_text_config(decoder=True).hidden_size) * model.dtype.itemsize


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
