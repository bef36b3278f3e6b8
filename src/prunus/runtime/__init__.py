"""Packed matrices that make zeros fast on a CPU: layouts, kernels, and the module that transformers runs."""

import torch
from torch import Tensor

from prunus.errors import UserError
from prunus.runtime.bitmask import BITMASK
from prunus.runtime.dense import DENSE
from prunus.runtime.layout import Layout
from prunus.runtime.packed import TYPES, Packed, from_codes, to_codes
from prunus.runtime.tiles import TILES
from prunus.runtime.two_of_four import TWO_OF_FOUR

LAYOUTS: dict[str, Layout] = {layout.name: layout for layout in (DENSE, BITMASK, TWO_OF_FOUR, TILES)}

__all__ = ["LAYOUTS", "TYPES", "Layout", "Packed", "check_packed", "pack", "unpack"]


def pack(weight_OI: Tensor, layout: str, dtype: torch.dtype) -> Packed | None:
    """A matrix in a layout and type; None when its zeros do not lie as the layout wants them."""
    codes_OI, scale_O = to_codes(weight_OI, dtype)
    parts, (rows, columns) = LAYOUTS[layout].pack(codes_OI), weight_OI.shape
    return None if parts is None else Packed(layout, rows, columns, parts, scale_O)


def unpack(packed: Packed) -> Tensor:
    """The matrix (O, I) again: the same bfloat16 values, or code times scale in fp32."""
    return from_codes(LAYOUTS[packed.layout].unpack(packed.parts, packed.rows, packed.columns), packed.scale_O)


def check_packed(packed: Packed) -> None:
    """Raises UserError for tensors that are not those of one matrix: kernels read no more than this has looked at."""
    layout = LAYOUTS[packed.layout]
    shapes = layout.shapes(packed.rows, packed.columns, packed.dtype, packed.parts["weight"].numel())
    for name, (shape, dtype) in shapes.items():
        part = packed.parts.get(name)
        if part is None or tuple(part.shape) != shape or part.dtype != dtype:
            found = "missing" if part is None else f"{part.dtype} {tuple(part.shape)}"
            raise UserError(f"the packed matrix is damaged: {name} is {found} where {dtype} {shape} is needed.")
    scale_O = packed.scale_O
    if (scale_O is None) != (packed.dtype == torch.bfloat16) or (scale_O is not None and len(scale_O) != packed.rows):
        raise UserError("the packed matrix is damaged: int8 needs a scale for each row, and nothing else has one.")
    layout.check(packed.parts, packed.rows, packed.columns)
