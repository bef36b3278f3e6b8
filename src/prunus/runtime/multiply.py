"""Multiply by packed matrices."""

from collections.abc import Sequence

from torch import Tensor
from torch.nn.functional import linear

from prunus.runtime import unpack
from prunus.runtime.packed import Packed


class Multiplier:
    """One checked packed matrix (O, I), ready to be multiplied by."""

    def __init__(self, packed: Packed) -> None:
        self.packed = packed

    def __call__(self, x_MI: Tensor) -> Tensor:
        """x W^T, (M, I) in bfloat16 or fp32 -> (M, O) in the same."""
        return linear(x_MI, unpack(self.packed).to(x_MI.dtype))


def multiply_together(multipliers: Sequence[Multiplier], x_MI: Tensor) -> list[Tensor]:
    """Several matrices by one input."""
    return [multiplier(x_MI) for multiplier in multipliers]
