"""Grids: the values that a quantized weight can take, as multiples of a scale.

Every grid is symmetric and holds 0, so a weight that is 0 stays 0, whatever the scale.

Letters: R = rows that have one scale each, C = columns of such a row.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

_SEARCHED = [1 - step / 40 for step in range(20)]  # factors on the scale that clips nothing
_ROWS_AT_ONCE = 1 << 16


class Grid(Protocol):
    """The codes of a format: what they are stored as, and which is the nearest."""

    @property
    def largest(self) -> float: ...  # the code that the largest weight of a row gets

    @property
    def half_range(self) -> float: ...  # half of what lies between the smallest code and the largest

    @property
    def dtype(self) -> torch.dtype: ...  # that holds one code

    def nearest(self, multiples: Tensor) -> Tensor:
        """The nearest codes, in the dtype of `multiples`; ties to even; what lies outside goes to the end."""
        ...


@dataclass(frozen=True, slots=True)
class IntGrid:
    """Whole numbers of `bits` bits, two's complement: -8 to 7, -128 to 127."""

    bits: int

    @property
    def largest(self) -> float:
        return float(2 ** (self.bits - 1) - 1)

    @property
    def half_range(self) -> float:
        return self.largest + 0.5

    @property
    def dtype(self) -> torch.dtype:
        return torch.int8

    def nearest(self, multiples: Tensor) -> Tensor:
        return multiples.round().clamp_(-self.largest - 1, self.largest)


@dataclass(frozen=True, slots=True)
class Float8Grid:
    """8-bit floating point, e4m3: 3 bits of mantissa, 448 at most, no infinity."""

    @property
    def largest(self) -> float:
        return 448.0

    @property
    def half_range(self) -> float:
        return self.largest

    @property
    def dtype(self) -> torch.dtype:
        return torch.float8_e4m3fn

    def nearest(self, multiples: Tensor) -> Tensor:
        return multiples.clamp(-self.largest, self.largest).to(self.dtype).to(multiples.dtype)


def scales(weight_RC: Tensor, grid: Grid, dtype: torch.dtype, *, search: bool) -> Tensor:
    """One scale a row (R), in `dtype`, as it is stored; 1 for a row of zeros.

    It maps the largest weight onto the largest code or, with `search`, is the smaller one of 20 with the least squared
    error: a few clipped weights can cost less than a coarse grid for all others.
    """
    widest_R = weight_RC.abs().amax(1) / grid.largest
    best_R = _stored(widest_R, dtype)
    if not search:
        return best_R
    for start in range(0, len(weight_RC), _ROWS_AT_ONCE):
        rows = slice(start, start + _ROWS_AT_ONCE)
        best_R[rows] = _searched(weight_RC[rows], widest_R[rows], grid, dtype)
    return best_R


def _searched(weight_RC: Tensor, widest_R: Tensor, grid: Grid, dtype: torch.dtype) -> Tensor:
    best_R = _stored(widest_R, dtype)
    least_R = torch.full_like(widest_R, float("inf"))
    for factor in _SEARCHED:
        scale_R = _stored(widest_R * factor, dtype)
        error_R = (on_grid(weight_RC, scale_R[:, None], grid).float() - weight_RC).square().sum(1)
        better_R = error_R < least_R
        best_R, least_R = best_R.where(~better_R, scale_R), least_R.where(~better_R, error_R)
    return best_R


def _stored(scale_R: Tensor, dtype: torch.dtype) -> Tensor:
    """As a checkpoint holds it: never 0, and never so small that its multiples lose bits."""
    positive_R = scale_R.where(scale_R > 0, torch.ones_like(scale_R))
    return positive_R.clamp(min=torch.finfo(dtype).tiny).to(dtype)


def on_grid(weight: Tensor, scale: Tensor, grid: Grid) -> Tensor:
    """The weights as they will be read back: codes times scale, in the dtype of the scale. +0 for every 0."""
    codes = grid.nearest(weight.float() / scale.float()) + 0.0  # -0 + 0 is +0
    return codes.to(scale.dtype) * scale


def codes_of(values: Tensor, scale: Tensor, grid: Grid) -> Tensor:
    """The codes behind what `on_grid` returned, in the grid's dtype.

    Exact: rounding a multiple to 8 bits of mantissa (bfloat16) moves it by 1/512 of itself, 128 codes by a quarter.
    """
    return grid.nearest(values.float() / scale.float()).to(grid.dtype)
