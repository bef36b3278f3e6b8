"""Magnitude of a coupled group: the norm of every weight that goes when the unit goes.

The baseline of structured pruning, as in Li et al. 2016, Pruning Filters for Efficient ConvNets, arXiv:1608.08710, on
whole groups as in Fang et al. 2023, DepGraph, arXiv:2301.12900: the L1 or L2 norm over the unit's columns of the reader
and its rows in the producing matrices. No data, no memory.
"""

from torch import Tensor

from prunus.shrinking.units import Units


def magnitude_l2(units: Units) -> Tensor:
    """(U): the root of the sum of squares over all weights of a unit."""
    return _sum(units, 2).sqrt()


def magnitude_l1(units: Units) -> Tensor:
    """(U): the sum of absolute values over all weights of a unit."""
    return _sum(units, 1)


def _sum(units: Units, power: int) -> Tensor:
    of_reader_U = units.sum_of(units.reader_OI.abs().pow(power).sum(0))
    return sum((made.abs().pow(power).sum(1) for made in units.producers), start=of_reader_U)
