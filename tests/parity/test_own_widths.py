"""Widths layer by layer, against a literal competition of all units."""

import pytest
import torch

from prunus.shrinking.own_widths import pooled_widths, standardised


def random_scores(seed, layers=4, units=24):
    generator = torch.Generator().manual_seed(seed)
    return [torch.rand(units, generator=generator).pow(layer + 1) * 10**layer for layer in range(layers)]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("total", [30, 48, 90])
def test_without_steps_it_is_the_papers_one_threshold(seed, total):
    """FLAP: standardise over each layer, keep the highest of all, with at least one unit in each layer."""
    scores = random_scores(seed)
    marked = []
    for layer, score_U in enumerate(scores):
        values = score_U.double().tolist()
        mean = sum(values) / len(values)
        std = (sum((value - mean) ** 2 for value in values) / len(values)) ** 0.5
        ranked = sorted(((value - mean) / std for value in values), reverse=True)
        marked += [(rank > 0, -worth, layer) for rank, worth in enumerate(ranked)]  # the best of each layer first
    kept = [layer for _, _, layer in sorted(marked)[:total]]
    assert pooled_widths(scores, total, 1) == [kept.count(layer) for layer in range(len(scores))]


@pytest.mark.parametrize("multiple", [2, 5, 8])
def test_steps_are_whole_and_every_layer_keeps_one(multiple):
    scores = [*random_scores(0), torch.zeros(24)]
    total = 6 * multiple
    widths = pooled_widths(scores, total, multiple)
    assert sum(widths) == total
    assert all(width >= multiple and width % multiple == 0 and width <= 24 for width in widths)


def test_scores_of_another_size_are_worth_the_same():
    scores = random_scores(1, layers=2)
    alike = [scores[0], scores[0] * 1000 + 5]
    assert pooled_widths(alike, 24, 1) == [12, 12]


def test_equal_scores_standardise_to_zeros():
    assert torch.equal(standardised(torch.full((5,), 0.1)), torch.zeros(5, dtype=torch.float64))
