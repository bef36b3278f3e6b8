"""Whole tiles of zeros are left out: 16 rows x 16 columns of the matrix, a strip and as many cells as 16 columns are.

`weight` (T * 256 values): the tiles that are there, strip by strip, by column; a tile is its cells.
`weight_tile` (T): int32, the tile's place in its strip: its first column / 16.
`weight_start` (S + 1): int64, where the tiles of each strip start; the last is T.

Letters beside those of `packed`: N = tiles of a strip, there or not; T = tiles that are there.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from prunus.runtime.layout import Layout, Parts, Shapes, malformed, starts
from prunus.runtime.packed import STRIP, UNIT, from_cells, in_cells, strips

WIDTH = 16
VALUES = STRIP * WIDTH


def _pack(codes_OI: Tensor) -> Parts:
    unit = UNIT[codes_OI.dtype]
    padded = torch.nn.functional.pad(codes_OI, (0, -codes_OI.shape[1] % WIDTH))
    tiles_SNV = in_cells(padded).view(strips(len(padded)), -1, WIDTH // unit * STRIP * unit)
    there_SN = (tiles_SNV != 0).any(-1)
    place_T = there_SN.nonzero()[:, 1].to(torch.int32)
    return {"weight": tiles_SNV[there_SN].flatten(), "weight_tile": place_T, "weight_start": starts(there_SN.sum(1))}


def _shapes(rows: int, _columns: int, dtype: torch.dtype, values: int) -> Shapes:
    return {
        "weight": ((values,), dtype),
        "weight_tile": ((values // VALUES,), torch.int32),
        "weight_start": ((strips(rows) + 1,), torch.int64),
    }


def _strip_of(start_S: Tensor) -> Tensor:
    """For each tile, its strip."""
    return torch.repeat_interleave(torch.arange(len(start_S) - 1), start_S.diff())


def _check(parts: Mapping[str, Tensor], rows: int, columns: int) -> None:
    place_T, start_S = parts["weight_tile"].long(), parts["weight_start"]
    if len(parts["weight"]) != len(place_T) * VALUES or int(start_S[-1]) != len(place_T):
        raise malformed("it has not as many values as tiles")
    inside = int(start_S.min()) >= 0 and int(start_S.max()) <= len(place_T)  # so that differences cannot overflow
    if int(start_S[0]) or not inside or bool((start_S.diff() < 0).any()):
        raise malformed("its strips do not follow one another")
    width = -(-columns // WIDTH)
    if len(place_T) and (int(place_T.min()) < 0 or int(place_T.max()) >= width):
        raise malformed(f"a tile lies outside its {columns} columns")
    keys = _strip_of(start_S) * width + place_T
    if bool((keys.diff() <= 0).any()):
        raise malformed("two of its tiles lie in one place, or in the wrong order")


def _unpack(parts: Mapping[str, Tensor], rows: int, columns: int) -> Tensor:
    weight, unit = parts["weight"], UNIT[parts["weight"].dtype]
    whole = torch.zeros(strips(rows), -(-columns // WIDTH), VALUES, dtype=weight.dtype)
    whole[_strip_of(parts["weight_start"]), parts["weight_tile"].long()] = weight.view(-1, VALUES)
    return from_cells(whole.view(strips(rows), -1, STRIP, unit), rows, columns)


TILES = Layout(
    name="tiles",
    number=3,
    about="the 16x16 tiles that are not all zero",
    pack=_pack,
    shapes=_shapes,
    check=_check,
    unpack=_unpack,
)
