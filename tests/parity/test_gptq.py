"""Rounding, GPTQ and the joint sweep against the papers' formulas, written out slowly in double precision."""

import pytest
import torch
from torch import Tensor

from prunus.quantizing import QUANTIZERS, SCHEMES, Scheme, pack, quantize_matrix, unpack
from prunus.quantizing.grid import IntGrid
from prunus.sparsity import NM, Statistics, Unstructured

ROWS, COLUMNS, GROUP = 6, 16, 8
GENERATOR = torch.Generator().manual_seed(5)
INPUT_NI = torch.randn(80, COLUMNS, generator=GENERATOR, dtype=torch.float64) @ torch.randn(
    COLUMNS, COLUMNS, generator=GENERATOR, dtype=torch.float64
)
WEIGHT_OI = torch.randn(ROWS, COLUMNS, generator=GENERATOR, dtype=torch.float64)
PRUNED_OI = WEIGHT_OI * (torch.rand(ROWS, COLUMNS, generator=GENERATOR, dtype=torch.float64) > 0.5)
GRAM_II = INPUT_NI.T @ INPUT_NI / 80
STATISTICS = Statistics(80, GRAM_II.diagonal().float(), GRAM_II.float())
DAMPING = 0.01
FP8 = sorted({s * x for s in (1, -1) for x in [2**-9 * m for m in range(8)]} | {
    s * 2.0**e * (1 + m / 8) for s in (1, -1) for e in range(-6, 9) for m in range(8) if 2.0**e * (1 + m / 8) <= 448
})  # fmt: skip


def small(scheme: str, group: int | None, *, search: bool) -> Scheme:
    known = SCHEMES[scheme]
    values = {name: getattr(known, name) for name in known.__slots__}
    return Scheme(**{**values, "group": group, "searches": search})


def codes(scheme: Scheme) -> list[float]:
    if isinstance(scheme.grid, IntGrid):
        half = 2 ** (scheme.bits - 1)
        return [float(code) for code in range(-half, half)]
    return FP8


def nearest(value: float, scale: float, scheme: Scheme) -> float:
    return min(codes(scheme), key=lambda code: abs(value - code * scale)) * scale


def scale_of(weights: list[float], scheme: Scheme) -> float:
    """The one that clips nothing or, searched for, the one of 20 that leaves the least squared error."""
    widest = max(abs(weight) for weight in weights) / max(codes(scheme)) or 1.0
    if not scheme.searches:
        return float(torch.tensor(widest).float())
    tried = [float(torch.tensor(widest * (1 - step / 40)).float()) for step in range(20)]
    return min(tried, key=lambda scale: sum((w - nearest(w, scale, scheme)) ** 2 for w in weights))


def literal_rtn(weight_OI: Tensor, scheme: Scheme) -> Tensor:
    size = scheme.group or COLUMNS
    out = torch.zeros_like(weight_OI)
    for row in range(ROWS):
        for start in range(0, COLUMNS, size):
            weights = weight_OI[row, start : start + size].tolist()
            scale = scale_of(weights, scheme)
            out[row, start : start + size] = torch.tensor([nearest(weight, scale, scheme) for weight in weights])
    return out


def inverse_of_rest(column: int) -> Tensor:
    """Inverse Hessian of the columns from `column` on, damped relative to each input's own norm."""
    hessian_II = GRAM_II + DAMPING * GRAM_II.diagonal().diag()
    return torch.linalg.inv(hessian_II[column:, column:])


def literal_gptq(weight_OI: Tensor, scheme: Scheme, choose=None, together: int = COLUMNS) -> Tensor:
    """Column by column, row by row: round, or remove, and let the rest make up for it by the OBS formula.

    `choose` decides, for the scores of `together` columns, what stays.
    """
    work_OI, out, keep_OI = weight_OI.clone(), torch.zeros_like(weight_OI), weight_OI != 0
    size = scheme.group or COLUMNS
    scale_O = [scale_of(row.tolist(), scheme) for row in weight_OI]
    for column in range(COLUMNS):
        inverse = inverse_of_rest(column)
        if choose is not None and column % together == 0:
            for start in range(column, max(column + together, column // size * size + size), together):
                columns = range(start, start + together)
                score_OS = torch.stack([work_OI[:, c] ** 2 / inverse_of_rest(c)[0, 0] for c in columns], 1)
                keep_OI[:, start : start + together] = choose(score_OS)
        if scheme.group and column % size == 0:
            kept = (work_OI * keep_OI)[:, column : column + size]
            scale_O = [scale_of(row.tolist(), scheme) for row in kept]
        for row in range(ROWS):
            if keep_OI[row, column]:
                out[row, column] = nearest(float(work_OI[row, column]), scale_O[row], scheme)
            error = work_OI[row, column] - out[row, column]
            work_OI[row, column:] -= error / inverse[0, 0] * inverse[0]
    return out


SMALL = [
    small("int8", None, search=False),
    small("int4-g32", GROUP, search=False),
    small("int4-g32", GROUP, search=True),
    small("fp8", None, search=False),
]
NAMES = ["int8", "int4", "int4 searched", "fp8"]


@pytest.mark.parametrize("scheme", SMALL, ids=NAMES)
@pytest.mark.parametrize("weight_OI", [WEIGHT_OI, PRUNED_OI], ids=["dense", "half zeros"])
def test_rtn(scheme, weight_OI):
    found = quantize_matrix(QUANTIZERS["rtn"], weight_OI.float(), scheme, Statistics())
    torch.testing.assert_close(found.values_OI.double(), literal_rtn(weight_OI, scheme), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("scheme", SMALL, ids=NAMES)
@pytest.mark.parametrize("weight_OI", [WEIGHT_OI, PRUNED_OI], ids=["dense", "half zeros"])
def test_gptq(scheme, weight_OI):
    found = quantize_matrix(QUANTIZERS["gptq"], weight_OI.float(), scheme, STATISTICS)
    torch.testing.assert_close(found.values_OI.double(), literal_gptq(weight_OI, scheme), rtol=1e-4, atol=1e-5)


def lowest_half(score_OS: Tensor) -> Tensor:
    keep = torch.ones(score_OS.numel(), dtype=torch.bool)
    keep[score_OS.flatten().argsort()[: score_OS.numel() // 2]] = False
    return keep.reshape(score_OS.shape)


def best_two(score_OS: Tensor) -> Tensor:
    return torch.zeros_like(score_OS, dtype=torch.bool).scatter_(1, score_OS.topk(2, 1).indices, True)


@pytest.mark.parametrize("scheme", SMALL, ids=NAMES)
@pytest.mark.parametrize(
    ("pattern", "choose", "together"),
    [(Unstructured(0.5, "matrix"), lowest_half, COLUMNS), (NM(keep=2, of=4), best_two, 4)],
    ids=["0.5", "2:4"],
)
def test_the_joint_sweep(scheme, pattern, choose, together):
    found = quantize_matrix(QUANTIZERS["gptq"], WEIGHT_OI.float(), scheme, STATISTICS, pattern=pattern)
    expected = literal_gptq(WEIGHT_OI, scheme, choose, together)
    torch.testing.assert_close(found.values_OI.double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("width", [5, 8, 32, 33])
def test_packing(bits, width):
    codes_OI = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), (3, width), dtype=torch.int8)
    each = 32 // bits
    words = [
        [sum((int(c) + 2 ** (bits - 1)) << (bits * i) for i, c in enumerate(row[start : start + each])) for start in
         range(0, width, each)]
        for row in codes_OI.tolist()
    ]  # fmt: skip
    expected = torch.tensor(words, dtype=torch.int64).to(torch.int32)
    assert torch.equal(pack(codes_OI, bits), expected)
    assert torch.equal(unpack(expected, bits, width), codes_OI)
