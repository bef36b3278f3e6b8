"""Every value, zero or not: for matrices where packing would not pay."""

from collections.abc import Mapping

import torch
from torch import Tensor

from prunus.runtime.layout import Layout, Parts, Shapes
from prunus.runtime.packed import STRIP, UNIT, cells, from_cells, in_cells, strips


def _pack(codes_OI: Tensor) -> Parts:
    return {"weight": in_cells(codes_OI).flatten()}


def _shapes(rows: int, columns: int, dtype: torch.dtype, _values: int) -> Shapes:
    return {"weight": ((strips(rows) * cells(columns, dtype) * STRIP * UNIT[dtype],), dtype)}


def _check(_parts: Mapping[str, Tensor], _rows: int, _columns: int) -> None:
    """Any values are sound."""


def _unpack(parts: Mapping[str, Tensor], rows: int, columns: int) -> Tensor:
    weight = parts["weight"]
    return from_cells(weight.view(strips(rows), -1, STRIP, UNIT[weight.dtype]), rows, columns)


DENSE = Layout(name="dense", number=0, about="every value", pack=_pack, shapes=_shapes, check=_check, unpack=_unpack)
