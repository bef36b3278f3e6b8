"""The two sublayers of a decoder block, attention and MLP, and what stands where a block has lost one.

They are told apart by what they take: attention is the child with matrices that is handed an attention mask. Families
that keep the matrices of one in the block itself (OPT's MLP) are refused.
"""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import Cache

from prunus.checkpoint.per_layer import Fields
from prunus.errors import UserError
from prunus.models.trace import find_blocks, trace_model

KINDS = ("attention", "mlp")


@dataclass(frozen=True, slots=True)
class Sublayer:
    """`module` is its name in the block; `outputs` how many things it returns in a tuple, 0 for a bare tensor."""

    module: str
    outputs: int


class Absent(nn.Module):
    """Gives zeros in the form that the sublayer gave its output, so the residual passes it by.

    Where the sublayer filled a KV cache, a key and a value of one number keep count of the tokens there: the length of
    what a cache holds is read off one of its layers, which may be this one.
    """

    def __init__(self, outputs: int, layer: int) -> None:
        super().__init__()
        self.outputs, self.layer = outputs, layer

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        given = [*args, *kwargs.values()]
        hidden_BTH = args[0] if args else kwargs["hidden_states"]
        for cache in (value for value in given if isinstance(value, Cache)):
            mark_B1T1 = hidden_BTH.new_zeros(*hidden_BTH.shape[:-1], 1)[:, None]
            cache.update(mark_B1T1, mark_B1T1, self.layer)
        zeros_BTH = torch.zeros_like(hidden_BTH)
        return (zeros_BTH, *[None] * (self.outputs - 1)) if self.outputs else zeros_BTH


def find_sublayers(model: Any) -> list[dict[str, Sublayer]]:
    """Of each block of a model on the meta device, buffers excepted. Raises UserError for a block that has none."""
    blocks = find_blocks(model)[1]
    names = [_names(block, model.config.model_type) for block in blocks]
    outputs: dict[tuple[int, str], int] = {}
    handles = [
        blocks[layer].get_submodule(name).register_forward_hook(partial(_note, outputs, (layer, kind)))
        for layer, found in enumerate(names)
        for kind, name in found.items()
    ]
    trace_model(model)
    for handle in handles:
        handle.remove()
    return [
        {kind: Sublayer(name, outputs[layer, kind]) for kind, name in found.items()}
        for layer, found in enumerate(names)
    ]


def _note(outputs: dict[tuple[int, str], int], key: tuple[int, str], _module: nn.Module, _args: Any, out: Any) -> None:
    outputs[key] = len(out) if isinstance(out, tuple) else 0


def _names(block: nn.Module, family: str) -> dict[str, str]:
    """Of each kind the name of the child that is the sublayer."""
    with_matrices = {n: child for n, child in block.named_children() if any(p.ndim > 1 for p in child.parameters())}
    attention = [n for n, c in with_matrices.items() if "attention_mask" in inspect.signature(c.forward).parameters]
    others = [name for name in with_matrices if name not in attention]
    if len(attention) != 1 or len(others) != 1:
        raise UserError(
            f"attention or MLP of {family} cannot go alone: its blocks do not hold them in a module each; shrink "
            "another axis instead."
        )
    return dict(zip(KINDS, (attention[0], others[0]), strict=True))


def stated(sublayers: dict[str, Sublayer]) -> Fields:
    """What the config says of a layer without these."""
    return {kind: {"module": one.module, "outputs": one.outputs} for kind, one in sublayers.items()}


def take_away(block: nn.Module, layer: int, without: Fields) -> None:
    """Replace by nothing what a layer is `stated` to be without."""
    for one in without.values():
        setattr(block, one["module"], Absent(one["outputs"], layer))


@contextmanager
def silenced(block: nn.Module, sublayer: Sublayer) -> Iterator[None]:
    """Within the context, the sublayer gives zeros."""

    def zeros(_module: nn.Module, _args: Any, out: Any) -> Any:
        return (torch.zeros_like(out[0]), *out[1:]) if isinstance(out, tuple) else torch.zeros_like(out)

    handle = block.get_submodule(sublayer.module).register_forward_hook(zeros)
    try:
        yield
    finally:
        handle.remove()
