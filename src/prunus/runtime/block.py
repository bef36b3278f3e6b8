"""A decoder block of the common kind takes one new token in two calls of the kernels, with the attention between them.

Through torch that is some sixty small operations, which for a small model take longer than its weights (docs/log.md).
No table says which blocks these are: the first token shows what a block does, and ours stands in for it where both give
the same (`block_parts.py`). Everything else, prefill and training among it, stays with the block itself.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from prunus.runtime.block_parts import agree, are_watched, try_block
from prunus.runtime.block_plan import Plan
from prunus.runtime.linear import PackedLinear
from prunus.runtime.multiply import FEW
from prunus.runtime.native import RUNS_IN, kernels


def decode_in_blocks(model: Any) -> None:
    """For a whole model; what cannot stays as it is."""
    for block in _listed(model):
        if kernels() and any(isinstance(module, PackedLinear) for module in block.modules()):
            block.__dict__["forward"] = BlockDecoder(block)  # an instance attribute shadows the class's method


def _listed(module: nn.Module) -> Iterator[nn.Module]:
    """What the outermost lists of modules hold, which is where decoders keep their blocks."""
    for child in module.children():
        yield from child if isinstance(child, nn.ModuleList) else _listed(child)


class BlockDecoder:
    """What a block's `forward` is instead: the kernels' for one new token, the block's own for the rest."""

    def __init__(self, block: nn.Module) -> None:
        self.block = block
        self._plan: Plan | None = None
        self._refused = False  # for good: the block does something else

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        hidden_BTD: Any = args[0] if args else kwargs.get("hidden_states")
        if len(args) < 2 and not self._refused and _is_decoding(self.block, hidden_BTD, kwargs):
            plan = self._plan_for(hidden_BTD, kwargs)
            if plan is not None and plan.takes(hidden_BTD, *kwargs["position_embeddings"]):
                asked = (*kwargs["position_embeddings"], kwargs["past_key_values"], kwargs.get("attention_mask"))
                return plan(hidden_BTD, *asked)
        return type(self.block).forward(self.block, *args, **kwargs)

    @property
    def stands_in(self) -> bool:
        """Whether the kernels were found to do what the block does."""
        return self._plan is not None

    def _plan_for(self, hidden_BTD: Tensor, kwargs: dict[str, Any]) -> Plan | None:
        """Made at the first token, and again after tensors or modules are others."""
        if self._plan is None or not self._plan.holds():
            if are_watched([*self.block.modules()][1:]):
                return None
            trial = try_block(self.block, hidden_BTD, kwargs)
            plan = None if trial is None else Plan(self.block, trial.parts, hidden_BTD.dtype)
            self._plan = plan if plan is not None and trial is not None and agree(plan, trial) else None
            self._refused = self._plan is None
        return self._plan

    def __getstate__(self) -> dict[str, Any]:
        """A copy holds tensors of its own."""
        return {**self.__dict__, "_plan": None}


def _is_decoding(block: nn.Module, hidden_BTD: Any, kwargs: dict[str, Any]) -> bool:
    """Whether this is one new token of a few texts, and nobody looks at what happens on the way."""
    if not isinstance(hidden_BTD, Tensor) or hidden_BTD.ndim != 3 or hidden_BTD.shape[1] != 1 or len(hidden_BTD) > FEW:
        return False
    if torch.compiler.is_compiling() or torch.is_grad_enabled() or torch.is_autocast_enabled("cpu") or block.training:
        return False
    if hidden_BTD.dtype not in RUNS_IN or hidden_BTD.device.type != "cpu":
        return False
    angles, cache = kwargs.get("position_embeddings"), kwargs.get("past_key_values")
    return isinstance(angles, tuple) and len(angles) == 2 and cache is not None and not kwargs.get("output_attentions")
