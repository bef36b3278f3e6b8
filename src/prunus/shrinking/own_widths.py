"""Widths layer by layer: units of all layers compete with each other.

An et al. 2023, Fluctuation-based Adaptive Structured Pruning, arXiv:2312.11983, section 3 (adaptive structure search):
scores of different layers are of different size, so each is standardised over its layer,

    s' = (s - mean(s)) / std(s),

and the highest s' of all layers stay. Here the scores may be any of `WIDTH_SCORES`.
Differs from the paper: units stay in steps of a multiple, a step being worth the mean of its units; every layer keeps
at least one step; and each kind of unit has a competition of its own.

Letters: U = units of a layer.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def standardised(score_U: Tensor) -> Tensor:
    """Scores with mean 0 and standard deviation 1 over their layer; zeros where all are equal."""
    deviation_U = score_U.double() - score_U.double().mean()
    spread = deviation_U.square().mean().sqrt()
    return deviation_U / spread if spread > 0 else torch.zeros_like(deviation_U)


def pooled_widths(scores: Sequence[Tensor], total: int, multiple: int) -> list[int]:
    """How many units each layer keeps, `total` in all, every number a multiple of `multiple`.

    Of equal steps the earlier layer keeps its own. `total` is such a multiple, with room for one step of each layer.
    """
    assert total % multiple == 0
    steps = [_steps(score_U, multiple) for score_U in scores]
    others = [(-worth, layer) for layer, worths in enumerate(steps) for worth in worths[1:]]
    num_others = total // multiple - len(scores)
    assert 0 <= num_others <= len(others)
    widths = [multiple] * len(scores)
    for _, layer in sorted(others)[:num_others]:
        widths[layer] += multiple
    return widths


def _steps(score_U: Tensor, multiple: int) -> list[float]:
    """What each step of a layer's width is worth, from its best units down; an incomplete step is left out."""
    best_first_U = standardised(score_U).sort(descending=True).values
    whole = len(best_first_U) // multiple * multiple
    worths: list[float] = best_first_U[:whole].view(-1, multiple).mean(1).tolist()
    return worths
