"""The module that stands where a linear layer was: its matrix is packed, and stays packed while it is multiplied by.

Shapes: M = rows of the input, O = out_features, I = in_features.
"""

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn

from prunus.errors import UserError
from prunus.runtime.arena import Arena
from prunus.runtime.entry import BIAS, SCALE, Entry
from prunus.runtime.multiply import Multiplier
from prunus.runtime.operator import handle_of, packed_linear
from prunus.runtime.packed import Packed
from prunus.runtime.together import Readers


class PackedLinear(nn.Module):
    """x W^T + b. Its buffers are the tensors of the file; `prepare` has to be called once they are filled."""

    weight: Tensor
    bias: Tensor | None

    def __init__(self, entry: Entry, device: torch.device | str = "meta") -> None:
        super().__init__()
        self.entry, self.in_features, self.out_features = entry, entry.columns, entry.rows
        self.register_buffer(BIAS, None)
        for name, (shape, dtype) in entry.shapes.items():
            self.register_buffer(name, torch.empty(shape, dtype=dtype, device=device))
        self.readers = Readers()
        self._multiplier: Multiplier | None = None
        self._handle: Tensor | None = None

    @classmethod
    def holding(cls, packed: Packed) -> Self:
        """The layer of a matrix that is in memory already; without a bias."""
        module = cls(Entry.of(packed))
        for name, part in packed.parts.items():
            setattr(module, name, part)
        if packed.scale_O is not None:
            setattr(module, SCALE, packed.scale_O)
        module.prepare()
        return module

    @property
    def packed(self) -> Packed:
        """The matrix, in the buffers' own memory."""
        parts = {name: getattr(self, name) for name in self.entry.parts}
        return Packed(self.entry.layout, self.entry.rows, self.entry.columns, parts, getattr(self, SCALE, None))

    @property
    def multiplier(self) -> Multiplier:
        """What multiplies by the matrix; made anew after the tensors have moved."""
        return self._multiplier or self.prepare()

    def prepare(self) -> Multiplier:
        """Have every part looked at once, so that kernels may trust them. Raises UserError for a damaged matrix."""
        if self.weight.device.type != "cpu":
            raise UserError(f"packed models run on the CPU, and this one lies on {self.weight.device}; move it back.")
        self._multiplier, self._handle = Multiplier(self.packed), handle_of(self)
        return self._multiplier

    def move(self, moved: Callable[[Tensor], Tensor]) -> None:
        """Put the tensors elsewhere in memory."""
        self._buffers |= {name: moved(buffer) for name, buffer in self._buffers.items() if buffer is not None}
        self._multiplier = self._handle = None

    def multiply(self, x_MI: Tensor) -> Tensor:
        """x W^T (M, O), without the bias and without a gradient."""
        return self.multiplier(x_MI)

    def forward(self, x: Tensor) -> Tensor:
        """(..., I) -> (..., O), in the dtype of the input."""
        watched = torch.compiler.is_compiling() or x.requires_grad
        y_MO = self._watched(x.reshape(-1, self.in_features)) if watched else self.readers.product(self, x)
        if self.bias is not None:
            y_MO = y_MO + self.bias.to(y_MO.dtype)
        return y_MO.view(*x.shape[:-1], self.out_features)

    def _watched(self, x_MI: Tensor) -> Tensor:
        """The same product, where the compiler or the gradient has to know of it."""
        if self._handle is None:
            outside: Any = torch.compiler.disable  # untyped in torch
            outside(self.prepare)()
        y_MO: Tensor = packed_linear(x_MI, self._handle, self.out_features)
        return y_MO

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, {self.entry.layout}, {self.entry.type}"
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """`model.to(...)`: tensors move, but their types are the format's. What holds their addresses is made anew."""
        for name, buffer in self._buffers.items():
            if buffer is None:
                continue
            address = buffer.data_ptr()
            moved = fn(buffer)
            moved = moved if moved.dtype == buffer.dtype else buffer.to(moved.device)
            if moved.is_meta or moved.data_ptr() != address:
                self._multiplier = self._handle = None
            self._buffers[name] = moved
        return self

    def _load_from_state_dict(self, *args: Any, **options: Any) -> None:
        """Other tensors, which nobody has looked at yet."""
        super()._load_from_state_dict(*args, **options)
        self._multiplier = self._handle = None

    def __getstate__(self) -> dict[str, Any]:
        """A copy holds tensors of its own."""
        return {**self.__dict__, "_multiplier": None, "_handle": None}


def gather(model: nn.Module) -> None:
    """Give a model's packed matrices memory of their own: together, and in large pages.

    A file that they are mapped to may change after it was looked at, and takes no large pages.
    """
    packed = [module for module in model.modules() if isinstance(module, PackedLinear)]
    arena = Arena(buffer for module in packed for buffer in module.buffers())
    for module in packed:
        module.move(arena.copy)


def optimize_decoding(model: nn.Module) -> None:
    """What a whole model gains beside its matrices: they read together, and one token goes by kernels of ours."""
    # these need all of transformers, which imports this while it loads
    from prunus.runtime.attention import attend_natively
    from prunus.runtime.block import decode_in_blocks

    read_together(model)
    attend_natively(model)
    decode_in_blocks(model)


def read_together(model: nn.Module) -> None:
    """Let the packed modules of a model know of each other."""
    readers = Readers()
    for module in model.modules():
        if isinstance(module, PackedLinear):
            module.readers = readers
