"""What makes the inputs of matrices, where it could make them smaller: found by watching the model run.

A norm multiplies its output, channel by channel, by its weight; a projection whose output is multiplied by something,
and by nothing else, makes each channel of the product with one of its rows. Weights that read such a tensor can be made
larger, channel by channel, when the source is made smaller by as much: the model stays the same function. That holds
only where nobody else reads the tensor, which no list of families says: so every use of it on the way is counted.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves
from transformers import PretrainedConfig

from prunus.models.scales import added_by_norms
from prunus.models.skeleton import build_skeleton, restore_buffers
from prunus.models.trace import find_blocks, trace_model

PRODUCTS: tuple[Any, ...] = (Tensor.mul, torch.mul)  # what `a * b` calls, too
LOOKS = ("__get__", "size", "dim")  # functions that read no value


@dataclass(frozen=True, slots=True)
class Source:
    """What makes one tensor: `parameters`, whose first dimension runs over its channels; and who reads it.

    `matrix` is the one among them that is a projection's weight, and empty where a norm makes the tensor.
    """

    parameters: tuple[str, ...]
    matrix: str
    readers: frozenset[str]  # modules


@dataclass
class _Made:
    """A tensor that was seen: kept, so that no other gets its address."""

    tensor: Tensor
    module: str
    readers: list[str] = field(default_factory=list)  # linear modules
    passed_on: "_Made | None" = None  # the product, where it is a factor of one


class _Watch(TorchFunctionMode):
    """Counts what reads each tensor that a norm or a linear module of the blocks has made."""

    def __init__(self) -> None:
        super().__init__()
        self.made: dict[int, _Made] = {}
        self.reads: Counter[int] = Counter()

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        known = [id(leaf) for leaf in tree_leaves((args, kwargs)) if id(leaf) in self.made]
        if known and getattr(func, "__name__", "") not in LOOKS:
            self.reads.update(known)
            if func in PRODUCTS:
                self.made[known[-1]].passed_on = self.note(result, self.made[known[-1]].module)
        return result

    def note(self, tensor: Tensor, module: str) -> _Made:
        return self.made.setdefault(id(tensor), _Made(tensor, module))

    def read(self, module: str, tensor: Tensor) -> None:
        """Of a linear module, which goes on to call one function with it."""
        if id(tensor) in self.made:
            self.made[id(tensor)].readers.append(module)

    def only_read_by_linears(self, made: _Made) -> bool:
        return bool(made.readers) and self.reads[id(made.tensor)] == len(made.readers)


def find_sources(config: PretrainedConfig, *, trust_remote_code: bool = False) -> dict[str, Source]:
    """The source of the inputs of every linear module that has one, by the module's full name."""
    model = build_skeleton(config, trust_remote_code=trust_remote_code)
    restore_buffers(model)
    plain = {name for name, added in added_by_norms(model).items() if added == 0}
    with _watching(model) as watch:
        trace_model(model)
    found: dict[str, Source] = {}
    for made in watch.made.values():
        tensor = made.passed_on if made.passed_on and watch.reads[id(made.tensor)] == 1 else made
        if watch.only_read_by_linears(tensor):
            source = _source(model, made, tensor, plain)
            found |= dict.fromkeys(source.readers, source) if source else {}
    return found


def _source(model: Any, made: _Made, tensor: _Made, plain_norms: set[str]) -> Source | None:
    module, weight = model.get_submodule(made.module), f"{made.module}.weight"
    linear = isinstance(module, nn.Linear)
    if linear != (tensor is not made) or not (linear or weight in plain_norms):
        return None  # a projection makes a product, a norm what it gives out
    parameters = tuple(f"{made.module}.{name}" for name, _ in module.named_parameters())
    return Source(parameters, weight if linear else "", frozenset(tensor.readers))


@contextmanager
def _watching(model: Any) -> Iterator[_Watch]:
    """Within the context, what the blocks' norms and linear modules make and read is noted."""
    watch, list_name = _Watch(), find_blocks(model)[0]
    handles = []
    for name, module in model.named_modules():
        inside = name.startswith(f"{list_name}.")
        if inside and isinstance(module, nn.Linear):
            handles.append(module.register_forward_pre_hook(lambda _m, args, name=name: watch.read(name, args[0])))
        if inside and (isinstance(module, nn.Linear) or "norm" in type(module).__name__.lower()):
            handles.append(module.register_forward_hook(lambda _m, _args, out, name=name: _note(watch, out, name)))
    try:
        with watch:
            yield watch
    finally:
        for handle in handles:
            handle.remove()


def _note(watch: _Watch, output: Any, module: str) -> None:
    """Returns nothing: what a hook returns stands in for the output."""
    watch.note(output, module)
