"""Zeros anywhere: one bit for each weight says whether it is there; the values that are there follow one another.

`weight` (V): the values, strip by strip, cell by cell, in the order of the bits.
`weight_mask` (S, C): a cell's bits, int32 for bfloat16 (16 x 2) and int64 for int8 (16 x 4); bit r * U + u, from the
lowest, is row r and column u of the cell. Bits outside the matrix are 0.
`weight_start` (S + 1): int64, where the values of each strip start; the last is V.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from prunus.runtime.layout import Layout, Parts, Shapes, check_starts, malformed, starts
from prunus.runtime.packed import STRIP, UNIT, cells, from_cells, in_cells, strips

MASK = {torch.bfloat16: torch.int32, torch.int8: torch.int64}


def _pack(codes_OI: Tensor) -> Parts:
    cells_SCRU = in_cells(codes_OI)
    there = cells_SCRU != 0
    kept_V = torch.from_numpy(_numbers(cells_SCRU)[there.numpy()]).view(codes_OI.dtype)
    return {
        "weight": kept_V,
        "weight_mask": _bits(there, MASK[codes_OI.dtype]),
        "weight_start": starts(there.flatten(1).sum(1)),
    }


def _numbers(tensor: Tensor) -> NDArray[Any]:
    """The same memory for numpy, whose choice by a mask takes no index of every weight, as torch's does."""
    array: NDArray[Any] = tensor.view(torch.int16 if tensor.dtype == torch.bfloat16 else tensor.dtype).numpy()
    return array


def _bits(there_SCRU: Tensor, dtype: torch.dtype) -> Tensor:
    """Booleans as whole numbers (S, C), the first in the lowest bit."""
    packed = np.packbits(there_SCRU.flatten(2).numpy(), axis=-1, bitorder="little")
    return torch.from_numpy(packed).view(dtype).squeeze(-1)


def _there(mask_SC: Tensor, unit: int) -> Tensor:
    """The inverse: booleans (S, C, R, U)."""
    as_bytes = np.ascontiguousarray(mask_SC.numpy())[..., None].view(np.uint8)
    bits = np.unpackbits(as_bytes, axis=-1, bitorder="little")
    return torch.from_numpy(bits).view(torch.bool).view(*mask_SC.shape, STRIP, unit)


def _shapes(rows: int, columns: int, dtype: torch.dtype, values: int) -> Shapes:
    return {
        "weight": ((values,), dtype),
        "weight_mask": ((strips(rows), cells(columns, dtype)), MASK[dtype]),
        "weight_start": ((strips(rows) + 1,), torch.int64),
    }


def _check(parts: Mapping[str, Tensor], rows: int, columns: int) -> None:
    mask_SC, unit = parts["weight_mask"], UNIT[parts["weight"].dtype]
    counts_SC = np.bitwise_count(mask_SC.numpy().view(f"u{mask_SC.element_size()}"))
    counts_S = torch.from_numpy(counts_SC.sum(1, dtype=np.int64))
    check_starts(parts["weight_start"], counts_S, len(parts["weight"]))
    below, beside = rows % STRIP, columns % unit
    if below and bool(_there(mask_SC[-1:], unit)[:, :, below:].any()):
        raise malformed("its mask has weights below the last row")
    if beside and bool(_there(mask_SC[:, -1:], unit)[..., beside:].any()):
        raise malformed("its mask has weights beside the last column")


def _unpack(parts: Mapping[str, Tensor], rows: int, columns: int) -> Tensor:
    weight, mask_SC = parts["weight"], parts["weight_mask"]
    there = _there(mask_SC, UNIT[weight.dtype])
    whole = torch.zeros(there.shape, dtype=weight.dtype)
    _numbers(whole)[there.numpy()] = _numbers(weight)
    return from_cells(whole, rows, columns)


BITMASK = Layout(
    name="bitmask",
    number=1,
    about="a bit for each weight, and the weights that are not zero",
    pack=_pack,
    shapes=_shapes,
    check=_check,
    unpack=_unpack,
)
