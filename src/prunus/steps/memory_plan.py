"""How much memory and disk a sparsify step takes, from shapes alone, and how many sequences may wait in memory."""

from collections.abc import Collection
from dataclasses import dataclass

import psutil

from prunus.errors import UserError
from prunus.models import StreamedModel
from prunus.models.limits import kv_cache_values
from prunus.settings import CalibratedSettings
from prunus.text.self_generated import sequences_at_once

GRAM_COPIES = 5  # a solver keeps the Gram, its damped twin, an inverse, and working copies
SOLVER_COPIES = 6  # fp32: the weight, targets, duals and masks of a solver
SCORE_COPIES = 4  # fp32: the weight, its scores, their order, the mask
WALKED = 32  # hidden states of so many sequences are resident while the block pass walks over them
# Of waiting sequences in memory, where the user sets no limit: less memory for some time, see docs/log.md
WAITING_BYTES = 256 << 20


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """What the step will take. Bytes on disk are needed for a while, beside the result."""

    sequences: int
    sequences_in_memory: int
    memory_bytes: int
    disk_bytes: int  # hidden states, and the sequences that wait on disk


def plan_memory(
    model: StreamedModel, needs: Collection[str], settings: CalibratedSettings, max_memory: int | None
) -> MemoryPlan:
    """The plan of a step whose method needs these statistics. Raises UserError when `max_memory` bytes are too few."""
    sequences = settings.samples if needs else 0
    each = _sequence_bytes(model, settings.length)
    hidden = _hidden_bytes(model, settings.length)
    base = int(psutil.Process().memory_info().rss)
    block = base + max(_block_bytes(model, i, needs) for i in range(len(model.spec.blocks)))
    fixed = block + min(sequences, WALKED) * hidden
    phases = {f"one block, its statistics and one sequence of {settings.length} tokens": fixed + each}
    if sequences:
        phases["the embedding and the output head"] = base + _outer_bytes(model)
    if sequences and settings.samples_itself:
        phases["the whole model, which samples its own text (a text file needs no such thing),"] = base + _sampling(
            model, settings
        )
    _check_fits(phases, max_memory)
    budget = WAITING_BYTES if max_memory is None else max_memory - fixed
    in_memory = min(sequences, max(budget // each, 1))
    return MemoryPlan(
        sequences=sequences,
        sequences_in_memory=in_memory,
        memory_bytes=max(fixed + in_memory * each, *phases.values()),
        disk_bytes=2 * sequences * hidden + (sequences - in_memory) * each,
    )


def _check_fits(phases: dict[str, int], max_memory: int | None) -> None:
    what, needed = max(phases.items(), key=lambda phase: phase[1])
    if max_memory is not None and needed > max_memory:
        raise UserError(
            f"max memory of {max_memory / 2**30:.2f} GiB is too small: {what} take about {needed / 2**30:.2f} GiB."
        )


def _block_bytes(model: StreamedModel, index: int, needs: Collection[str]) -> int:
    """The block as stored, the copy that runs, its widest statistics, and the solver's working set."""
    infos = [model.checkpoint.tensors[key] for key in model.block_keys()[index]]
    stored = sum(info.num_bytes for info in infos)
    running = sum(info.num_elements for info in infos) * model.dtype.itemsize
    widest = max(linear.shape[1] for linear in model.spec.blocks[index].linears)
    largest = max(linear.shape[0] * linear.shape[1] for linear in model.spec.blocks[index].linears)
    grams = max(len(stage.groups) for stage in model.spec.blocks[index].stages) - 1 + GRAM_COPIES
    solver = grams * widest**2 * 4 if "gram" in needs else 0
    copies = SOLVER_COPIES if "gram" in needs else SCORE_COPIES
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


def _outer_bytes(model: StreamedModel) -> int:
    """Embedding, final norm and head, as they run and, one at a time, as they are stored."""
    infos = [model.checkpoint.tensors[key] for key in model.names.keys_of(model.outer_parameters())]
    running = sum(info.num_elements for info in infos) * model.dtype.itemsize
    return running + max((info.num_bytes for info in infos), default=0)


def _sampling(model: StreamedModel, settings: CalibratedSettings) -> int:
    """All weights in the forward dtype, and the key-value cache of the sequences that grow together."""
    together = sequences_at_once(settings.samples, settings.length) * settings.length
    values = model.checkpoint.num_parameters + together * kv_cache_values(model.config)
    return values * model.dtype.itemsize
