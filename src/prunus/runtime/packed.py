"""A weight matrix packed for the CPU: what every layout shares.

Sixteen rows make a strip. Within a strip, `UNIT[type]` neighbouring columns of all sixteen rows make a cell of 64
bytes, one register of the widest processors: row by row, the columns of a row side by side. Rows and columns are filled
up with zeros to whole cells. Cells of a strip follow one another by column, strips by row.

Letters: O = out_features, I = in_features, S = strips, C = cells of a strip, R = 16 rows, U = columns of a cell.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from prunus.quantizing.grid import IntGrid, codes_of, scales

STRIP = 16
UNIT = {torch.bfloat16: 2, torch.int8: 4}  # columns of a cell: 64 bytes over 16 rows
TYPES = {"bf16": torch.bfloat16, "int8": torch.int8}
INT8 = IntGrid(8)


@dataclass(frozen=True, slots=True)
class Packed:
    """One matrix (O, I) in one layout. `parts` are the layout's own tensors by name, `weight` among them: the values.

    `scale_O` (fp32) belongs to int8: a weight is its code times the scale of its row. None for bfloat16.
    """

    layout: str
    rows: int
    columns: int
    parts: Mapping[str, Tensor]
    scale_O: Tensor | None = None

    @property
    def dtype(self) -> torch.dtype:
        return self.parts["weight"].dtype

    @property
    def num_bytes(self) -> int:
        """What one product of this matrix with a vector reads."""
        tensors = [*self.parts.values(), *([] if self.scale_O is None else [self.scale_O])]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def strips(rows: int) -> int:
    return -(-rows // STRIP)


def cells(columns: int, dtype: torch.dtype) -> int:
    return -(-columns // UNIT[dtype])


def in_cells(values_OI: Tensor, unit: int | None = None) -> Tensor:
    """A matrix of values as cells (S, C, R, U), of as many columns as their dtype has unless `unit` says so."""
    unit, (rows, columns) = unit or UNIT[values_OI.dtype], values_OI.shape
    padded = torch.nn.functional.pad(values_OI, (0, -columns % unit, 0, -rows % STRIP))
    return padded.view(strips(rows), STRIP, -1, unit).transpose(1, 2).contiguous()


def from_cells(cells_SCRU: Tensor, rows: int, columns: int) -> Tensor:
    """The inverse: the matrix (O, I)."""
    count = cells_SCRU.shape[0]
    return cells_SCRU.transpose(1, 2).reshape(count * STRIP, -1)[:rows, :columns].contiguous()


def to_codes(weight_OI: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """(values, scale of each row or None): bfloat16 as it is, int8 rounded to the nearest of 255 codes. 0 stays 0."""
    if dtype == torch.bfloat16:
        return weight_OI.to(dtype), None
    scale_O = scales(weight_OI.float(), INT8, torch.float32, search=False)
    return codes_of(weight_OI, scale_O[:, None], INT8), scale_O


def from_codes(codes_OI: Tensor, scale_O: Tensor | None) -> Tensor:
    """The weights: bfloat16, or fp32 for int8."""
    return codes_OI if scale_O is None else codes_OI.float() * scale_O[:, None]
