"""Magnitude: prune the weights nearest to zero.

Han et al. 2015, "Learning both Weights and Connections for Efficient Neural Networks", arXiv:1506.02626, section 3:
    S_ij = W_ij ** 2        (the ranking of |W_ij|; squared, so that the mean over a tile is its energy)
Cost: one selection; no calibration data, no weight update.

Shapes: O = out_features, I = in_features.
"""

from torch import Tensor

from prunus.sparsity.methods import NoOptions, PruneResult, Statistics
from prunus.sparsity.patterns import Pattern
from prunus.sparsity.select import keep_highest


def magnitude_score(weight_OI: Tensor) -> Tensor:
    """Score (O, I), higher = keep."""
    return weight_OI.square()


def prune_magnitude(
    weight_OI: Tensor, statistics: Statistics, pattern: Pattern, options: NoOptions, prepared: None
) -> PruneResult:
    """Keep the largest weights; `statistics` is not used."""
    return PruneResult(weight_OI, keep_highest(magnitude_score(weight_OI), pattern))
