"""Which modules a decoder block is made of, read off one token that it takes on trial; and whether a stand-in agrees.

A block is of the common kind when it calls norm, q, k, v, o, norm, gate, up and down in that order, perhaps with norms
on q and k, and does between them what such a block does: the very operations, counted, with the same result on random
numbers. An operation too many, as caps, clips and multipliers are, and the block is left alone.
"""

from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from threading import get_ident
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from prunus.runtime.linear import PackedLinear

KINDS = ("nmmmmnmmm", "nmnmnmmnmmm")  # norms and matrices as they are called, without and with norms of heads
MOVING = {  # operations that move or make tensors and change no number
    *("_to_copy", "_unsafe_view", "alias", "clone", "contiguous", "copy_", "detach", "empty", "expand", "lift_fresh"),
    *("new_empty", "randn", "normal_", "reshape", "select", "slice", "squeeze", "t", "transpose", "unsqueeze", "view"),
}
POSITIONS = 5  # before the new token
SMALL = 0.1  # hidden states on trial, so that what the block adds to them is most of the result
TOLERANCE = 0.02  # of what the block adds: int8 inputs that are rounded to a neighbour move it by less


@dataclass(frozen=True, kw_only=True, slots=True)
class Parts:
    """The modules of a block, and what its attention is told."""

    norms: tuple[nn.Module, ...]  # before the attention, perhaps of queries and of keys, and before the MLP
    linears: tuple[PackedLinear, ...]  # q, k, v, o, gate, up, down
    attention: nn.Module
    scaling: float
    layer: int  # what the cache calls it
    head_width: int


@dataclass(frozen=True, slots=True)
class Trial:
    """One token that the block took, and what it made of it."""

    parts: Parts
    hidden_BTD: Tensor
    cos: Tensor
    sin: Tensor
    result_BTD: Tensor


class StandIn(Protocol):
    def __call__(self, hidden_BTD: Tensor, cos: Tensor, sin: Tensor, cache: Any, mask: Tensor | None) -> Tensor: ...


@torch.inference_mode(False)  # in which operations reach `_Operations` whole, and under other names
@torch.no_grad()
def try_block(block: nn.Module, hidden_BTD: Tensor, kwargs: dict[str, Any]) -> Trial | None:
    """Have it take a random token in place of this one. None for a block of another kind."""
    numbers, past = torch.Generator().manual_seed(0), Past()
    given = (hidden_BTD, *kwargs["position_embeddings"])
    if len({one.dtype for one in given}) > 1:
        return None
    hidden, cos, sin = (torch.randn(1, *one.shape[1:], generator=numbers).to(one.dtype) for one in given)
    hidden = SMALL * hidden
    own = {**kwargs, "past_key_values": past, "position_embeddings": (cos, sin), "attention_mask": None}
    own.pop("hidden_states", None)
    try:
        for module in block.modules():
            if isinstance(module, PackedLinear):
                _ = module.multiplier  # looks at every part first, which is not what the block does
        with _calls_of(block) as calls, _Operations() as seen:
            result = type(block).forward(block, hidden, **own)
    except Exception:  # whatever fails inside the block's own code means: not of the common kind
        return None
    parts = _parts(block, calls, past, cos)
    if parts is None or not isinstance(result, Tensor) or seen.counted != _expected(parts):
        return None
    return Trial(parts, hidden, cos, sin, result)


def agree(stand_in: StandIn, trial: Trial) -> bool:
    """Whether it makes the same of the token."""
    found = stand_in(trial.hidden_BTD, trial.cos, trial.sin, Past(), None)
    off, added = (trial.result_BTD.double() - one.double() for one in (found, trial.hidden_BTD))
    return bool(off.norm() <= TOLERANCE * added.norm())


def are_watched(modules: Iterable[nn.Module]) -> bool:
    """Whether one of them has to be called, since somebody waits for that or has put something in its place."""
    return any(one._forward_hooks or one._forward_pre_hooks or "forward" in one.__dict__ for one in modules)


def weight_of(norm: nn.Module) -> Tensor:
    weight: Tensor = norm.weight  # type: ignore[assignment]
    return weight


def epsilon_of(norm: nn.Module) -> float | None:
    """What a norm adds under its root; None where nobody knows."""
    found = getattr(norm, "variance_epsilon", getattr(norm, "eps", None))
    return found if isinstance(found, float) else None


class Past:
    """A cache of a few random keys and values, the same ones each time."""

    layer = -1

    def update(self, key: Tensor, value: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        self.layer, generator = layer, torch.Generator().manual_seed(1)
        shape = (*key.shape[:2], POSITIONS, key.shape[-1])
        before = [torch.randn(shape, generator=generator).to(key.dtype) for _ in range(2)]
        return torch.cat([before[0], key], 2), torch.cat([before[1], value], 2)


class _Operations(TorchDispatchMode):  # type: ignore[misc]
    """Counts what torch computes."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.counted: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if (name := func.overloadpacket.__name__) not in MOVING:
            self.counted[name] += 1
        return func(*args, **(kwargs or {}))


def _expected(parts: Parts) -> Counter[str]:
    """Of a block of the common kind: norms, the rotation of q and k, the gate, two sums, and what `Past` joins."""
    norms, biases = len(parts.norms), sum(one.bias is not None for one in parts.linears)
    each = {"pow": norms, "mean": norms, "rsqrt": norms, "neg": 2, "cat": 4, "silu": 1}
    return Counter({**each, "mul": 2 * norms + 5, "add": norms + 4 + biases})


@contextmanager
def _calls_of(block: nn.Module) -> Iterator[list[str]]:
    """Names of the modules with tensors of their own, as this thread calls them."""
    calls: list[str] = []
    here = get_ident()
    named = [(name, one) for name, one in block.named_modules() if one._parameters or isinstance(one, PackedLinear)]

    def note(name: str) -> None:
        if get_ident() == here:
            calls.append(name)

    handles = [one.register_forward_hook(lambda *_, name=name: note(name)) for name, one in named]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def _parts(block: nn.Module, calls: list[str], past: "Past", cos: Tensor) -> Parts | None:
    modules = [block.get_submodule(name) for name in calls]
    linears = tuple(one for one in modules if isinstance(one, PackedLinear))
    norms = tuple(one for one in modules if not isinstance(one, PackedLinear))
    kinds = "".join("m" if isinstance(one, PackedLinear) else "n" for one in modules)
    attention = block.get_submodule(calls[1].rpartition(".")[0]) if kinds in KINDS else block
    scaling = getattr(attention, "scaling", None)
    if kinds not in KINDS or past.layer < 0 or not isinstance(scaling, float):
        return None
    parts = Parts(
        norms=norms,
        linears=linears,
        attention=attention,
        scaling=scaling,
        layer=past.layer,
        head_width=cos.shape[-1],
    )
    return parts if _fit(parts, cos.dtype) else None


def _fit(parts: Parts, dtype: torch.dtype) -> bool:
    """Whether all sizes are those that the kernels will read."""
    q, k, v, o, gate, up, down = (one.entry for one in parts.linears)
    width, inner, head = q.columns, gate.rows, parts.head_width
    around = {(one.columns, width) for one in (k, v, gate, up)} | {(o.rows, width), (down.rows, width)}
    inside = {(v.rows, k.rows), (o.columns, q.rows), (up.rows, inner), (down.columns, inner), (q.rows % k.rows, 0)}
    heads = {(q.rows % head, 0), (k.rows % head, 0), (head % 2, 0)}
    norms = [(one, width if one in (parts.norms[0], parts.norms[-1]) else head) for one in parts.norms]
    return all(one == other for one, other in around | inside | heads) and all(_is_norm(*one, dtype) for one in norms)


def _is_norm(module: nn.Module, width: int, dtype: torch.dtype) -> bool:
    weight = getattr(module, "weight", None)
    told = isinstance(weight, Tensor) and weight.shape == (width,) and weight.is_contiguous() and weight.dtype == dtype
    return told and epsilon_of(module) is not None
