"""Packed matrices to multiply by, inputs, and what the product is: worked out in float64, from the unpacked matrix.

Letters: M = inputs, I = in_features, O = out_features, G = 64 neighbouring inputs.
"""

from functools import cache
from itertools import product

import torch
from torch import Tensor

from prunus.runtime import LAYOUTS, Packed, pack, unpack
from prunus.runtime.multiply import FEW
from prunus.runtime.packed import STRIP, TYPES

GROUP = 64  # neighbouring inputs that share a scale
# rows and columns that are a multiple of nothing, one of them, exactly one strip and group, and several of both
SHAPES = ((1, 1), (1, 64), (16, 16), (17, 65), (33, 3), (50, 1), (15, 130), (40, 260))
SPARSITIES = (0.0, 0.5, 0.9, 1.0)
BATCHES = (1, 2, 3, 8, 11, 16, 17)
DTYPES = (torch.bfloat16, torch.float32)
CASES = tuple(product(LAYOUTS, TYPES))
HALF_BIT = {torch.bfloat16: 2.0**-8, torch.float32: 2.0**-24}  # what rounding a result costs, relative to it


@cache
def packed_case(layout: str, kind: str, rows: int, columns: int, sparsity: float) -> Packed:
    """A random matrix whose zeros lie as the layout wants them; with an empty and a full row where it allows both."""
    generator = torch.Generator().manual_seed(rows * 1000 + columns)
    columns = -(-columns // 4) * 4 if layout == "2:4" else columns
    weight_OI = torch.randn(rows, columns, generator=generator)
    kept_OI = torch.rand(rows, columns, generator=generator) >= sparsity
    if layout == "tiles":
        tiles = torch.rand(-(-rows // STRIP), -(-columns // STRIP), generator=generator) >= sparsity
        kept_OI = tiles.repeat_interleave(STRIP, 0)[:rows].repeat_interleave(STRIP, 1)[:, :columns]
    elif rows > 2 and 0 < sparsity < 1:
        kept_OI[0], kept_OI[rows // 2] = False, True
    if layout == "2:4":
        scores = torch.rand(rows, columns // 4, 4, generator=generator)
        kept_OI = kept_OI & (scores.argsort(-1).argsort(-1) < 2).view(rows, columns)
    packed = pack(weight_OI * kept_OI, layout, TYPES[kind])
    assert packed is not None
    return packed


def bytes_of(part: Tensor) -> Tensor:
    """Its bytes, one-dimensional; strides of a tensor with one element or none may be anything."""
    return part.flatten().clone(memory_format=torch.contiguous_format).view(torch.uint8)


@cache
def all_packed(layout: str, kind: str) -> tuple[Packed, ...]:
    return tuple(packed_case(layout, kind, *shape, sparsity) for shape in SHAPES for sparsity in SPARSITIES)


@cache
def all_products(layout: str, kind: str, native: bool) -> tuple[tuple[Packed, Tensor, Tensor, Tensor], ...]:
    """(matrix, inputs, product, how far off it may be) of every matrix, batch and dtype."""
    return tuple(
        (packed, x_MI, *expected(packed, x_MI, native))
        for packed in all_packed(layout, kind)
        for dtype, batch in product(DTYPES, BATCHES)
        for x_MI in (inputs(batch, packed.columns, dtype),)
    )


@cache
def inputs(batch: int, columns: int, dtype: torch.dtype) -> Tensor:
    """Random (M, I), of sizes that differ from one group of inputs to the next."""
    generator = torch.Generator().manual_seed(batch * 1000 + columns)
    sizes_I = torch.logspace(-1, 1, columns).roll(columns // 3)
    return (torch.randn(batch, columns, generator=generator) * sizes_I).to(dtype)


def rounded(x_MI: Tensor) -> Tensor:
    """Inputs as int8 kernels take them: whole multiples of largest / 127, ties to even, each group for itself."""
    padded = torch.nn.functional.pad(x_MI.float(), (0, -x_MI.shape[1] % GROUP)).view(len(x_MI), -1, GROUP)
    largest = padded.abs().amax(-1, keepdim=True)
    inverse = torch.where(largest > 0, torch.tensor(127.0) / largest, 0)  # `127 / largest` rounds twice
    return ((padded * inverse).round().double() * (largest / 127).double()).flatten(1)[:, : x_MI.shape[1]]


def expected(packed: Packed, x_MI: Tensor, native: bool) -> tuple[Tensor, Tensor]:
    """(x W^T (M, O), how far a kernel may be from it), float64.

    Any order of n sums in fp32 is off by n half bits of the sum of the sizes at most, and the result is rounded to the
    type of the inputs. Many bfloat16 inputs, and the reference, take int8 weights rounded to bfloat16 as well.
    """
    few = native and len(x_MI) <= FEW
    weight_OI = unpack(packed).double()
    x = rounded(x_MI) if few and packed.scale_O is not None else x_MI.double()
    y_MO, size_MO = x @ weight_OI.T, x.abs() @ weight_OI.abs().T
    off_MO = (packed.columns + 4) * HALF_BIT[torch.float32] * size_MO + 1.01 * HALF_BIT[x_MI.dtype] * y_MO.abs()
    if packed.scale_O is not None and not few:
        off_MO += HALF_BIT[x_MI.dtype] * size_MO
    return y_MO, off_MO
