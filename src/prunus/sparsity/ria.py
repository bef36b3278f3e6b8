"""RIA: relative importance of a weight in its row and column, times the input norm to a power.

Zhang et al. 2024, "Plug-and-Play: An Efficient Post-training Pruning Method for Large Language Models"
(ICLR 2024, OpenReview Tr0lPx9woF), Eq. 2-3:
    S_ij = (|W_ij| / sum_i |W_ij| + |W_ij| / sum_j |W_ij|) * ||X_j||_2 ** a,    a = 0.5
Cost: that of Wanda; no weight update. The channel permutation of the paper is not part of this method.

Shapes: O = out_features, I = in_features.
"""

from dataclasses import dataclass

from torch import Tensor

from prunus.sparsity.methods import PruneResult, Statistics
from prunus.sparsity.patterns import Pattern
from prunus.sparsity.select import keep_highest


@dataclass(frozen=True, kw_only=True, slots=True)
class RiaOptions:
    """`power` is the exponent a of the input norm; the paper uses 0.5."""

    power: float = 0.5


def ria_score(weight_OI: Tensor, input_sq_norm_I: Tensor, power: float) -> Tensor:
    """Eq. 3, higher = keep. `input_sq_norm_I` is the mean over tokens of x_j ** 2."""
    size_OI = weight_OI.abs()
    column_1I = size_OI.sum(0, keepdim=True).clamp_min(1e-30)  # an all-zero row or column scores 0, not NaN
    row_O1 = size_OI.sum(1, keepdim=True).clamp_min(1e-30)
    return (size_OI / column_1I + size_OI / row_O1) * input_sq_norm_I ** (power / 2)


def prune_ria(
    weight_OI: Tensor, statistics: Statistics, pattern: Pattern, options: RiaOptions, prepared: None
) -> PruneResult:
    """Keep the weights with the highest RIA score."""
    return PruneResult(weight_OI, keep_highest(ria_score(weight_OI, statistics.sq_norm(), options.power), pattern))
