"""Which layout a matrix is packed in: the one that costs least."""

from collections.abc import Iterable

import torch
from torch import Tensor

from prunus.runtime import LAYOUTS, pack
from prunus.runtime.packed import Packed

# Seconds of a byte, those of a dense one being 1: unpacking costs time too. At batch 1 and 50% zeros, as
# `benchmarks/cpu_kernels.py` measured it (docs/sparse-cpu.md). So a mask pays from an eighth of zeros on in bf16, from
# a fifth in int8.
SECONDS_OF_A_BYTE = {"dense": 1.0, "bitmask": 1.06, "2:4": 1.05, "tiles": 1.07}


def choose_layout(candidates: Iterable[Packed]) -> Packed:
    """The cheapest of several ways to store one matrix; of equals the first. The cost is the time to read it."""
    return min(candidates, key=lambda packed: packed.num_bytes * SECONDS_OF_A_BYTE[packed.layout])


def pack_cheapest(weight_OI: Tensor, dtype: torch.dtype) -> Packed:
    """A matrix in the layout that costs least for it, of those that its zeros fit."""
    made = (pack(weight_OI, layout, dtype) for layout in LAYOUTS)
    return choose_layout(packed for packed in made if packed is not None)
