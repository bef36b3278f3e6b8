"""Which layout a matrix is packed in: the one that costs least."""

from collections.abc import Iterable

import torch
from torch import Tensor

from prunus.runtime import LAYOUTS, pack
from prunus.runtime.packed import Packed


def choose_layout(candidates: Iterable[Packed]) -> Packed:
    """The cheapest of several ways to store one matrix; of equals the first. The cost is what one product reads."""
    return min(candidates, key=lambda packed: packed.num_bytes)


def pack_cheapest(weight_OI: Tensor, dtype: torch.dtype) -> Packed:
    """A matrix in the layout that costs least for it, of those that its zeros fit."""
    made = (pack(weight_OI, layout, dtype) for layout in LAYOUTS)
    return choose_layout(packed for packed in made if packed is not None)
