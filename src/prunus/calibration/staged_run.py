"""One sequence's way through one decoder block, stopping at each stage until the matrices there are solved.

The block's own forward code runs in a greenlet. When it reaches the first matrix of a stage (qkv, o, gate/up, down) it
hands that matrix's input over and sleeps; once the stage is pruned it wakes and goes on with the pruned weights. So
every statistic comes from truly sequential inputs at the price of one forward pass, for every family whose blocks
can be traced, without a line of architecture code.

Shapes: T = tokens, H = hidden, I = in_features.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from io import BufferedRandom
from typing import Any

import greenlet
from torch import Tensor, nn

from prunus.calibration.spill import Spilled, held_storages
from prunus.models import StreamedModel
from prunus.models.spec import Stage

# For each group of a stage: its input (T, I), and which tokens of the sequence these are (None = all, in order)
StageInputs = list[tuple[Tensor, Tensor | None]]


class StagedRun:
    """`advance()` runs to the next stage and returns its inputs; after the last stage it returns None."""

    def __init__(self, model: StreamedModel, index: int, hidden_1TH: Tensor) -> None:
        self.output_1TH: Tensor | None = None
        self._spilled: Spilled | None = None
        self._greenlet = greenlet.greenlet(lambda: model.run_block(index, hidden_1TH))

    def spill(self, *, keep: "StagedRun", file: BufferedRandom) -> None:
        """Wait on disk: give up the memory of all that the waiting forward pass holds.

        What `keep`, another sequence at the same stage, holds as well is shared (weights, rotary tables, masks, caches
        that the model's code made on its first call) and stays.
        """
        shared = held_storages(keep._greenlet.gr_frame)
        own = held_storages(self._greenlet.gr_frame)
        self._spilled = Spilled([own[address] for address in own if address not in shared], file)

    def advance(self) -> StageInputs | None:
        if self._spilled is not None:
            self._spilled.restore()
            self._spilled = None
        result = self._greenlet.switch()
        if self._greenlet.dead:
            self.output_1TH = result
            return None
        return list(result)


def _hand_over(inputs: StageInputs) -> None:
    parent = greenlet.getcurrent().parent
    if parent is not None:  # None: the block is run plainly, nobody waits for its inputs
        parent.switch(inputs)


@contextmanager
def stops_at_stages(block: nn.Module, stages: Sequence[Stage]) -> Iterator[None]:
    """Within the context, a StagedRun through `block` stops at each of these stages."""
    handles = []
    banks: dict[str, set[str | None]] = {}  # of experts: at which of their fused tensors to stop
    for stage in stages:
        if stage.weight is None:
            handles.append(block.get_submodule(stage.module).register_forward_pre_hook(_stop_at_linear))
        else:
            banks.setdefault(stage.module, set()).add(stage.weight)
    for name, weights in banks.items():
        bank: Any = block.get_submodule(name)
        bank.observe_experts = partial(_stop_at_experts, weights)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for module in block.modules():
            module.__dict__.pop("observe_experts", None)


def _stop_at_linear(_module: nn.Module, args: tuple[Any, ...]) -> None:
    _hand_over([(args[0].flatten(0, -2), None)])


def _stop_at_experts(wanted: set[str | None], weight: str, inputs: list[tuple[Tensor, Tensor]]) -> None:
    if weight in wanted:
        _hand_over(list(inputs))
