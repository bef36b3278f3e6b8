"""FLAP: how much a unit's outputs fluctuate, weighted by the columns that read them.

An et al. 2023, Fluctuation-based Adaptive Structured Pruning, arXiv:2312.11983, equations 4 to 6 (WIFV): a unit whose
output is always the same can be replaced by a bias, so its worth is the variance of each of its outputs times the
squared norm of the reader's column. Where the reader has a bias, the step adds that of equation 3, W_P E[x_P].
Differs from the authors' code: KV groups of any size instead of heads of 128, and one comparison group per block, since
all blocks keep the same width.
"""

from torch import Tensor

from prunus.shrinking.units import Units


def flap(units: Units) -> Tensor:
    """(U): variance of the inputs times the squared norm of their columns, summed over a unit."""
    statistics = units.statistics
    variance_I = (statistics.sq_norm() - statistics.mean().square()).clamp_min(0)
    return units.sum_of(variance_I * units.reader_OI.square().sum(0))
