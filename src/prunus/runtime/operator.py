"""`prunus::packed_linear`: what torch.compile and autograd see of a packed matrix.

An operator takes tensors and numbers, so a matrix goes by a handle: a number in a tensor, lest every matrix be compiled
anew. The gradient is that of the input alone; packed weights do not learn.

Shapes: M = rows of the input, O = out_features, I = in_features.
"""

import itertools
from typing import Any, Protocol
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from prunus.runtime import unpack
from prunus.runtime.packed import Packed


class Holder(Protocol):
    """What has a packed matrix and multiplies by it."""

    @property
    def packed(self) -> Packed: ...

    def multiply(self, x_MI: Tensor) -> Tensor: ...


_HOLDERS: WeakValueDictionary[int, Holder] = WeakValueDictionary()
_numbers = itertools.count()


def handle_of(holder: Holder) -> Tensor:
    """A number for it, as long as it lives."""
    number = next(_numbers)
    _HOLDERS[number] = holder
    return torch.tensor(number)


@torch.library.custom_op("prunus::packed_linear", mutates_args=())
def packed_linear(x_MI: Tensor, handle: Tensor, rows: int) -> Tensor:
    """x W^T (M, O)."""
    return _HOLDERS[int(handle)].multiply(x_MI)


@packed_linear.register_fake
def _(x_MI: Tensor, handle: Tensor, rows: int) -> Tensor:
    return x_MI.new_empty(x_MI.shape[0], rows)


@torch.library.custom_op("prunus::packed_linear_back", mutates_args=())
def packed_linear_back(gradient_MO: Tensor, handle: Tensor, columns: int) -> Tensor:
    """The gradient by the input (M, I)."""
    return gradient_MO @ unpack(_HOLDERS[int(handle)].packed).to(gradient_MO.dtype)


@packed_linear_back.register_fake
def _(gradient_MO: Tensor, handle: Tensor, columns: int) -> Tensor:
    return gradient_MO.new_empty(gradient_MO.shape[0], columns)


def _keep(ctx: Any, inputs: tuple[Tensor, Tensor, int], output: Tensor) -> None:
    ctx.handle, ctx.columns = inputs[1], inputs[0].shape[1]


def _back(ctx: Any, gradient_MO: Tensor) -> tuple[Tensor, None, None]:
    return packed_linear_back(gradient_MO, ctx.handle, ctx.columns), None, None


packed_linear.register_autograd(_back, setup_context=_keep)
