"""GPTQ against its equation done literally: a fresh inverse of the remaining columns at every column, in float64."""

import pytest
import torch
from torch import Tensor

from prunus.quantizing import QUANTIZERS, Scheme, quantize_matrix
from prunus.quantizing.grid import IntGrid
from prunus.sparsity import NM, Statistics

ROWS, COLUMNS = 6, 24
GENERATOR = torch.Generator().manual_seed(5)
INPUT_NI = torch.randn(90, COLUMNS, generator=GENERATOR, dtype=torch.float64) @ torch.randn(
    COLUMNS, COLUMNS, generator=GENERATOR, dtype=torch.float64
)
WEIGHT_OI = torch.randn(ROWS, COLUMNS, generator=GENERATOR, dtype=torch.float64)
GRAM_II = INPUT_NI.T @ INPUT_NI / 90
DAMPING = 0.01


def scheme(group: int | None) -> Scheme:
    return Scheme(
        name="int3",
        title="",
        grid=IntGrid(3),
        bits=3,
        group=group,
        rounds_inputs=False,
        searches=False,
        storage="int-quantized",
        loads_in="",
        when="",
    )


def literal(weight_OI: Tensor, group: int, per_row: bool, pattern: NM | None) -> Tensor:
    """arXiv:2210.17323, algorithm 1, with zeros that stay zeros."""
    work_OI, values_OI = weight_OI.clone(), torch.zeros_like(weight_OI)
    keep_OI = weight_OI != 0
    hessian_II = GRAM_II + DAMPING * GRAM_II.diagonal().diag()
    for column in range(COLUMNS):
        if pattern is not None and column % pattern.of == 0:
            end = column + pattern.of
            cost_OB = torch.stack(
                [work_OI[:, c] ** 2 / torch.linalg.inv(hessian_II[c:, c:])[0, 0] for c in range(column, end)], 1
            )
            keep_OI[:, column:end] &= cost_OB.argsort(1).argsort(1) >= pattern.of - pattern.keep
        if column % group == 0:
            span = slice(column, column + group)
            shown_OS = (weight_OI if per_row else work_OI * keep_OI)[:, span]
            scale_O = shown_OS.abs().amax(1) / 3
        inverse = torch.linalg.inv(hessian_II[column:, column:])
        rounded_O = (work_OI[:, column] / scale_O).round().clamp(-4, 3) * scale_O
        values_OI[:, column] = rounded_O * keep_OI[:, column]
        error_O = (work_OI[:, column] - values_OI[:, column]) / inverse[0, 0]
        work_OI[:, column:] -= error_O[:, None] * inverse[0]
    return values_OI


def with_zeros() -> Tensor:
    mask_OI = torch.rand(ROWS, COLUMNS, generator=torch.Generator().manual_seed(1)) < 0.4
    return WEIGHT_OI.masked_fill(mask_OI, 0)


@pytest.mark.parametrize("weight_OI", [WEIGHT_OI, with_zeros()], ids=["dense", "pruned"])
@pytest.mark.parametrize("group", [None, 8])
def test_it_is_the_equation(weight_OI, group):
    statistics = Statistics(90, None, GRAM_II.float())
    found = quantize_matrix(QUANTIZERS["gptq"], weight_OI.float(), scheme(group), statistics)
    expected_OI = literal(weight_OI, group or COLUMNS, group is None, None)
    torch.testing.assert_close(found.values_OI.double(), expected_OI, rtol=1e-4, atol=1e-4)
    assert torch.equal(found.values_OI[weight_OI == 0], torch.zeros(int((weight_OI == 0).sum())))


def test_joint_chooses_each_n_m_group_when_the_sweep_reaches_it():
    statistics = Statistics(90, None, GRAM_II.float())
    found = quantize_matrix(QUANTIZERS["gptq"], WEIGHT_OI.float(), scheme(None), statistics, pattern=NM(2, 4))
    expected_OI = literal(WEIGHT_OI, COLUMNS, True, NM(2, 4))
    torch.testing.assert_close(found.values_OI.double(), expected_OI, rtol=1e-4, atol=1e-4)
