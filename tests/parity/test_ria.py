"""RIA against its equations, written out weight by weight."""

import math

import pytest
import torch

from prunus.sparsity import METHODS, RiaOptions, Statistics, Unstructured, prune


@pytest.mark.parametrize("power", [0.5, 1.0])
def test_prunes_the_lowest_relative_importance(power: float) -> None:
    generator = torch.Generator().manual_seed(2)
    input_NI = torch.randn(30, 8, generator=generator) * torch.logspace(-1, 1, 8)
    weight_OI = torch.randn(5, 8, generator=generator)
    size = [[abs(value) for value in row] for row in weight_OI.tolist()]

    def score(place: int) -> float:
        row, column = divmod(place, 8)
        by_column = size[row][column] / sum(size[i][column] for i in range(5))
        by_row = size[row][column] / sum(size[row])
        norm = math.sqrt(sum(float(x) ** 2 for x in input_NI[:, column]))
        return (by_column + by_row) * norm**power

    statistics = Statistics(30, input_NI.square().mean(0))
    result = prune(METHODS["ria"], weight_OI, statistics, Unstructured(0.5), RiaOptions(power=power))
    lowest = sorted(range(40), key=score)[:20]
    assert [not keep for keep in result.keep_OI.flatten().tolist()] == [place in lowest for place in range(40)]
