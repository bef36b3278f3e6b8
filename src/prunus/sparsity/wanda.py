"""Wanda: rank weights by magnitude times input norm, inside each output row.

Sun et al. 2023, "A Simple and Effective Pruning Approach for Large Language Models", arXiv:2306.11695, Eq. 1:
    S_ij = |W_ij| * ||X_j||_2
We rank S_ij ** 2: the same order, no square roots, and the mean over a tile is its share of the output energy.
Cost: one calibration forward, O(I) memory per matrix, one selection; no weight update.
Unlike the authors' code we prune exactly round(sparsity * I) weights of a row, and N:M names what is kept.

Shapes: O = out_features, I = in_features.
"""

from torch import Tensor

from prunus.sparsity.methods import NoOptions, PruneResult, Statistics
from prunus.sparsity.patterns import Pattern
from prunus.sparsity.select import keep_highest


def wanda_score(weight_OI: Tensor, input_sq_norm_I: Tensor) -> Tensor:
    """Squared Eq. 1, higher = keep. `input_sq_norm_I` is the mean over tokens of x_j ** 2."""
    return weight_OI.square() * input_sq_norm_I  # mean instead of sum: a common factor cannot change a ranking


def prune_wanda(
    weight_OI: Tensor, statistics: Statistics, pattern: Pattern, options: NoOptions, prepared: None
) -> PruneResult:
    """Keep the weights with the highest squared Wanda score."""
    return PruneResult(weight_OI, keep_highest(wanda_score(weight_OI, statistics.sq_norm()), pattern))
