"""Activation magnitude: how large a unit's outputs are on calibration text.

Muralidharan et al. 2024, Compact Language Models via Pruning and Knowledge Distillation (Minitron), arXiv:2407.14679,
equation 2: the L2 norm over tokens of each neuron's (each head's) activation. One vector of statistics per block.
"""

from torch import Tensor

from prunus.shrinking.units import Units


def activation(units: Units) -> Tensor:
    """(U): the root mean square, over tokens, of what a unit hands to the reader."""
    return units.sum_of(units.statistics.sq_norm()).sqrt()
