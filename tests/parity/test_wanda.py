"""Wanda against Eq. 1 of the paper, written out weight by weight."""

import math

import torch

from prunus.sparsity import METHODS, NM, Statistics, Unstructured, prune

GENERATOR = torch.Generator().manual_seed(1)
INPUT_NI = torch.randn(30, 8, generator=GENERATOR) * torch.logspace(-1, 1, 8)
WEIGHT_OI = torch.randn(5, 8, generator=GENERATOR)
STATISTICS = Statistics(30, INPUT_NI.square().mean(0))


def score(row: int, column: int) -> float:
    norm = math.sqrt(sum(float(x) ** 2 for x in INPUT_NI[:, column]))
    return abs(float(WEIGHT_OI[row, column])) * norm


def test_unstructured_prunes_the_lowest_of_each_row() -> None:
    result = prune(METHODS["wanda"], WEIGHT_OI, STATISTICS, Unstructured(3 / 8))
    for row in range(5):
        lowest = sorted(range(8), key=lambda column: score(row, column))[:3]
        assert [not keep for keep in result.keep_OI[row].tolist()] == [column in lowest for column in range(8)]


def test_n_of_m_prunes_the_lowest_of_each_group() -> None:
    result = prune(METHODS["wanda"], WEIGHT_OI, STATISTICS, NM(keep=1, of=4))
    for row in range(5):
        for start in (0, 4):
            best = max(range(start, start + 4), key=lambda column: score(row, column))
            assert result.keep_OI[row, start : start + 4].nonzero().flatten().tolist() == [best - start]
