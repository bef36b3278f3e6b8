"""AWQ's search against the paper's formula, written out slowly in double precision."""

import math

import pytest
import torch

from prunus.quantizing import SCHEMES
from prunus.quantizing.awq import awq_scales, powers_of_two
from prunus.sparsity import Statistics

ROWS, COLUMNS, TOKENS = 5, 64, 40
SCHEME = SCHEMES["int4-g32"]
GENERATOR = torch.Generator().manual_seed(3)
LOUD_I = torch.exp2(4 * torch.randn(COLUMNS, generator=GENERATOR, dtype=torch.float64))
INPUT_TI = torch.randn(TOKENS, COLUMNS, generator=GENERATOR, dtype=torch.float64) * LOUD_I
WEIGHTS_OI = [torch.randn(ROWS, COLUMNS, generator=GENERATOR) for _ in range(2)]


def statistics(x_TI):
    gram_II = (x_TI.T @ x_TI / len(x_TI)).float()
    return Statistics(len(x_TI), gram_II.diagonal().clone(), gram_II)


def rounded(weights, codes=7):
    """A group of weights on the widest grid, one after the other."""
    scale = max(abs(weight) for weight in weights) / codes or 1.0
    scale = float(torch.tensor(scale).float())
    return [min(codes, max(-codes - 1, round(weight / scale))) * scale for weight in weights]


def factors(alpha):
    rms = [math.sqrt(float(x_T.square().mean())) for x_T in INPUT_TI.T]
    logs = [alpha * math.log2(one) for one in rms]
    return [2.0 ** round(one - (max(logs) + min(logs)) / 2) for one in logs]


def output_error(scale):
    """The squared difference of all outputs of both matrices, token by token."""
    total = 0.0
    for weight_OI in WEIGHTS_OI:
        for row in weight_OI.double().tolist():
            wider = [weight * factor for weight, factor in zip(row, scale, strict=True)]
            found = [value for start in range(0, COLUMNS, 32) for value in rounded(wider[start : start + 32])]
            off = [value / factor - weight for value, factor, weight in zip(found, scale, row, strict=True)]
            total += float((INPUT_TI @ torch.tensor(off, dtype=torch.float64)).square().mean())
    return total


def test_the_factors_with_the_least_output_error_are_taken():
    tried = [[1.0] * COLUMNS, *(factors(step / 20) for step in range(1, 20))]
    best = min(tried, key=output_error)
    found_I = awq_scales(WEIGHTS_OI, SCHEME, statistics(INPUT_TI))
    assert found_I.tolist() == best
    assert best != tried[0]
    assert output_error(best) < 0.8 * output_error(tried[0])


def test_even_inputs_are_left_as_they_are():
    even = statistics(torch.eye(COLUMNS, dtype=torch.float64))
    assert awq_scales(WEIGHTS_OI, SCHEME, even).tolist() == [1.0] * COLUMNS


@pytest.mark.parametrize("dead", [0, 7, COLUMNS])
def test_factors_are_powers_of_two_and_dead_inputs_have_none(dead):
    x_TI = INPUT_TI.clone()
    x_TI[:, :dead] = 0
    scale_I = powers_of_two(statistics(x_TI), 0.5)
    assert torch.equal(scale_I, torch.exp2(scale_I.log2().round()))
    assert scale_I[:dead].tolist() == [1.0] * dead
    assert awq_scales(WEIGHTS_OI, SCHEME, statistics(x_TI)).isfinite().all()
