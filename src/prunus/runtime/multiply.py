"""Products with packed matrices: a few inputs by the kernels that read packed weights, many by torch's dense product.

Letters: M = inputs (tokens), I = in_features, O = out_features.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import linear

from prunus.runtime import LAYOUTS, Packed, check_packed, unpack
from prunus.runtime.native import TYPES, Kernels, described, kernels
from prunus.runtime.packed import STRIP

FEW = 16  # inputs up to which a packed weight is multiplied as it is: beyond, expanding it for torch was faster
FEW_FOR_AMX = 64  # the same for bfloat16, whose tiles take sixteen inputs at once
_SCRATCH_BYTES = 2 << 20  # of expanded rows: a share of the second-level cache


class Multiplier:
    """One packed matrix, checked, ready to be multiplied: `multiplier(x_MI)` is x times its transpose, (M, O).

    Inputs are bfloat16 or fp32, and so is the result; products are summed in fp32. int8 weights take a few inputs
    rounded to int8, each 64 neighbours with a scale of their own, and many as they are. Raises UserError for a damaged
    matrix.
    """

    def __init__(self, packed: Packed) -> None:
        check_packed(packed)
        self.packed = packed
        self.matrix = described(packed, LAYOUTS[packed.layout])
        if native := kernels():
            for part in packed.parts.values():
                native.use_huge_pages(part)

    def __call__(self, x_MI: Tensor) -> Tensor:
        return multiply_together([self], x_MI)[0]

    def many(self, x_MI: Tensor) -> Tensor:
        """Rows are expanded a few at a time, each once, for all inputs."""
        native = kernels()
        if native is None:
            return linear(x_MI, unpack(self.packed).to(x_MI.dtype))
        rows, columns = self.packed.rows, self.packed.columns
        at_once = max(1, _SCRATCH_BYTES // (columns * x_MI.element_size()) // STRIP) * STRIP
        scratch_OI = x_MI.new_empty(min(rows, at_once), columns)
        y_MO = x_MI.new_empty(len(x_MI), rows)
        for first in range(0, rows, at_once):
            part_OI = scratch_OI[: rows - first]
            native.expand(self.matrix, first // STRIP, part_OI)
            y_MO[:, first : first + at_once] = linear(x_MI, part_OI)
        return y_MO


def multiply_together(multipliers: Sequence[Multiplier], x_MI: Tensor) -> list[Tensor]:
    """Several matrices and the same inputs, in one go: one preparation of the inputs, one call of all threads."""
    if x_MI.dtype not in TYPES or x_MI.dtype == torch.int8:
        return [y_MO.to(x_MI.dtype) for y_MO in multiply_together(multipliers, x_MI.float())]
    native = kernels()
    if native is None or len(x_MI) > _few(native, x_MI, multipliers):
        return [one.many(x_MI) for one in multipliers]
    return native.multiply([one.matrix for one in multipliers], x_MI.contiguous())


def _few(native: Kernels, x_MI: Tensor, multipliers: Sequence[Multiplier]) -> int:
    tiles = native.level == "amx" and x_MI.dtype == torch.bfloat16
    return FEW_FOR_AMX if tiles and all(one.packed.dtype == torch.bfloat16 for one in multipliers) else FEW
