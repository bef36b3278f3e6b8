"""What a scheme is: a grid, how many weights share a scale, and what happens to the inputs of a matrix.

Letters: O = out_features, I = in_features, G = scales in a row.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from prunus.quantizing.grid import Grid, codes_of, on_grid, scales

Storage = Literal["pack-quantized", "int-quantized", "float-quantized"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Scheme:
    """One line of the table `SCHEMES`."""

    name: str
    title: str
    grid: Grid
    bits: int
    group: int | None  # consecutive inputs that share a scale; None: all of a row
    rounds_inputs: bool  # inputs are rounded to the same kind of grid, token by token, while the model runs
    searches: bool  # whether scales may clip
    storage: Storage  # the format's name in compressed-tensors
    loads_in: str
    when: str

    def group_of(self, width: int) -> int:
        """How many weights share a scale in a row of this width."""
        return width if self.group is None else self.group

    def fits(self, width: int) -> bool:
        return width % self.group_of(width) == 0

    def num_bytes(self, shape: tuple[int, int], itemsize: int) -> int:
        """Bytes of one stored matrix, with its scales of `itemsize` bytes each and, where it is packed, its shape."""
        rows, width = shape
        words = -(-width * self.bits // 32) * 4 if self.storage == "pack-quantized" else width
        return rows * (words + width // self.group_of(width) * itemsize) + (16 if self.packs else 0)

    @property
    def packs(self) -> bool:
        """Whether codes are stored several to a 32-bit word."""
        return self.storage == "pack-quantized"

    def scales(self, weight_OI: Tensor, dtype: torch.dtype) -> Tensor:
        """The scales (O, G) of an fp32 matrix, in the dtype they are stored in."""
        rows = weight_OI.reshape(-1, self.group_of(weight_OI.shape[1]))
        return scales(rows, self.grid, dtype, search=self.searches).reshape(len(weight_OI), -1)

    def quantized(self, weight_OI: Tensor, scale_OG: Tensor) -> Tensor:
        """The matrix as it will be read back, in the dtype of the scales."""
        return on_grid(weight_OI, self.spread(scale_OG, weight_OI.shape[1]), self.grid)

    def codes(self, values_OI: Tensor, scale_OG: Tensor) -> Tensor:
        """The codes behind a quantized matrix."""
        return codes_of(values_OI, self.spread(scale_OG, values_OI.shape[1]), self.grid)

    def dequantized(self, codes_OI: Tensor, scale_OG: Tensor) -> Tensor:
        """The inverse, exact, in fp32: rounded to the dtype of the scales it is what `quantized` returned."""
        return codes_OI.float() * self.spread(scale_OG.float(), codes_OI.shape[1])

    def spread(self, scale_OG: Tensor, width: int) -> Tensor:
        """The scale of every weight (O, I)."""
        return scale_OG.repeat_interleave(width // scale_OG.shape[1], dim=1)
