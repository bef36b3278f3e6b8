"""Everything of a model but its decoder blocks: run the model's own forward with stand-ins where the blocks were.

The stand-ins see what each block would be called with (hidden states, rotary embeddings, masks, which differ per layer
in some families) and decide what the rest of the model gets back. So embedding, masks, final norm and head are always
the model's own code, for every family, and no block has to be in memory.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn


@dataclass(frozen=True, slots=True)
class BlockCall:
    """What one decoder block was called with."""

    hidden_BTH: Tensor
    args: tuple[Any, ...]  # the positional arguments after the hidden states
    kwargs: dict[str, Any]

    def run(self, block: nn.Module, hidden_BTH: Tensor) -> Any:
        """Call the real block on other hidden states of the same length."""
        return block(hidden_BTH, *self.args, **self.kwargs)


# (index of the block, its call) -> what the block is to return
StandIn = Callable[[int, BlockCall], Any]


@contextmanager
def blocks_replaced(blocks: nn.ModuleList, stand_in: StandIn) -> Iterator[None]:
    """Within the context, calling block i calls `stand_in(i, call)` instead."""

    def forward_of(index: int) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            hidden_BTH, *rest = args or (kwargs.pop("hidden_states"),)
            return stand_in(index, BlockCall(hidden_BTH, tuple(rest), kwargs))

        return forward

    before = [block.__dict__.pop("forward", None) for block in blocks]
    for index, block in enumerate(blocks):
        block.__dict__["forward"] = forward_of(index)  # an instance attribute shadows the class's method
    try:
        yield
    finally:
        for block, forward in zip(blocks, before, strict=True):
            del block.__dict__["forward"]
            if forward is not None:  # a packed model has its own (runtime/block.py)
                block.__dict__["forward"] = forward
