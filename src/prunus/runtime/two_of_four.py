"""2:4, two weights kept of every four inputs: the values, and where in their four columns each of them belongs.

A cell holds 2 columns of values a row for bfloat16 (which are 4 columns of the matrix) and 4 for int8 (8 columns): the
kept ones of each four, by column. Four columns with less than two kept are filled up with zeros. The number of cells
follows from the shape, so nothing has to be counted while reading.

`weight` (S * C * 64 bytes): the values, cell by cell.
`weight_place` (S, C, B): uint8; two bits for each value of a cell, in its order and from the lowest: its column within
its four. B = 8 for bfloat16, 16 for int8.

Letters beside those of `packed`: G = fours of a row, K = 2 kept of each.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from prunus.runtime.layout import Layout, Parts, Shapes, malformed
from prunus.runtime.packed import STRIP, UNIT, cells, from_cells, in_cells, strips

KEPT, OF = 2, 4


def _pack(codes_OI: Tensor) -> Parts | None:
    dtype, (rows, columns) = codes_OI.dtype, codes_OI.shape
    if columns % OF or int((codes_OI.view(rows, -1, OF) != 0).sum(-1).max()) > KEPT:
        return None
    fours_OGF = codes_OI.view(rows, -1, OF)
    place_OGK = (fours_OGF != 0).to(torch.uint8).argsort(dim=-1, descending=True, stable=True)[..., :KEPT]
    place_OGK = place_OGK.sort(dim=-1).values
    values_OI = fours_OGF.gather(-1, place_OGK).flatten(1)
    places_SCRU = in_cells(place_OGK.flatten(1).to(torch.uint8), UNIT[dtype])
    return {"weight": in_cells(values_OI).flatten(), "weight_place": _two_bits(places_SCRU.flatten(2))}


def _two_bits(places: Tensor) -> Tensor:
    quads = places.view(*places.shape[:-1], -1, 4)
    packed: Tensor = quads[..., 0] | (quads[..., 1] << 2) | (quads[..., 2] << 4) | (quads[..., 3] << 6)
    return packed


def _places(packed: Tensor) -> Tensor:
    return torch.stack([(packed >> shift) & 3 for shift in (0, 2, 4, 6)], dim=-1).flatten(-2)


def _kept_columns(columns: int) -> int:
    return -(-columns // OF) * KEPT


def _shapes(rows: int, columns: int, dtype: torch.dtype, _values: int) -> Shapes:
    count = cells(_kept_columns(columns), dtype)
    return {
        "weight": ((strips(rows) * count * STRIP * UNIT[dtype],), dtype),
        "weight_place": ((strips(rows), count, STRIP * UNIT[dtype] // 4), torch.uint8),
    }


def _check(_parts: Mapping[str, Tensor], _rows: int, columns: int) -> None:
    """Two bits always name one of the four columns; a row has to be made of whole fours."""
    if columns % OF:
        raise malformed(f"2:4 does not divide its {columns} columns")


def _unpack(parts: Mapping[str, Tensor], rows: int, columns: int) -> Tensor:
    weight, unit = parts["weight"], UNIT[parts["weight"].dtype]
    shape = (strips(rows), -1, STRIP, unit)
    kept = (rows, -1, KEPT)
    values_OGK = from_cells(weight.view(shape), rows, _kept_columns(columns)).view(kept)
    places = _places(parts["weight_place"]).view(shape)
    place_OGK = from_cells(places, rows, _kept_columns(columns)).view(kept).long()
    whole = torch.zeros(
        *values_OGK.shape[:2], OF, dtype=torch.float32
    )  # sums: nobody keeps a file from naming a place twice
    return whole.scatter_add_(-1, place_OGK, values_OGK.float()).to(weight.dtype).flatten(1)


TWO_OF_FOUR = Layout(
    name="2:4",
    number=2,
    about="two weights of every four inputs, and where they belong",
    pack=_pack,
    shapes=_shapes,
    check=_check,
    unpack=_unpack,
)
