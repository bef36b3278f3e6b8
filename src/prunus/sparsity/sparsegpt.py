"""SparseGPT: prune column by column and let the columns to the right make up for every weight that goes.

Frantar & Alistarh 2023, "SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot",
arXiv:2301.00774, Algorithm 1. With H = G + damping I and H^-1 = U^T U (U upper triangular):
    score   S_rc = w_rc ** 2 / U_cc ** 2                      (error caused by removing w_rc, columns < c being fixed)
    update  w_r,c: -= (w_rc / U_cc) * U_c,c:                  (when w_rc is pruned)
Scores are compared when the sweep reaches their columns: over 128 columns (unstructured, tiles: all rows jointly, or
per row), or inside each N:M group. Columns are handled in blocks of about 128, errors reach later blocks by one matrix
product per block.
Cost: one Cholesky of the Gram, shared by matrices with the same input, then O(O I^2) operations.
Unlike the authors' code: exact counts, any N:M, tiles, a Gram of unit diagonal (scores do not depend on the scaling of
inputs, damping then means the same everywhere), and no inverse: U comes from the factor of the Gram read backwards.

Letters: O = out_features, I = in_features, B = columns of a block.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from prunus.errors import UserError
from prunus.sparsity.gram import InputScale, damped, normalise
from prunus.sparsity.methods import PruneResult, Statistics
from prunus.sparsity.patterns import NM, Pattern, Tile
from prunus.sparsity.select import keep_highest, keep_in_matrix, keep_in_rows, keep_tiles


@dataclass(frozen=True, kw_only=True, slots=True)
class SparseGptOptions:
    """`damping` is relative to the mean diagonal of the Gram; `block` is the number of columns per lazy update."""

    damping: float = 0.01
    block: int = 128

    def __post_init__(self) -> None:
        if not (self.damping > 0 and self.block >= 1):
            raise UserError(f"{self}: damping is above 0, block at least 1.")


@dataclass(frozen=True, slots=True)
class Prepared:
    """The scale of the inputs, U with (G + damping I)^-1 = U^T U, and the damping that was needed."""

    scale: InputScale
    upper_II: Tensor
    damping: float


def prepare_sparsegpt(gram_II: Tensor, options: SparseGptOptions) -> Prepared:
    """Factorise once for all matrices with this input.

    With J the reversal, J H J = L L^T gives H = (J L J)(J L J)^T, and U = (J L J)^-1 = J L^-1 J is upper triangular.
    """
    unit_II, scale = normalise(gram_II)
    _, factor_II, damping = damped(unit_II.flip(0, 1), options.damping)
    identity_II = torch.eye(len(factor_II), device=factor_II.device)
    upper_II = torch.linalg.solve_triangular(factor_II, identity_II, upper=False).flip(0, 1)
    return Prepared(scale, upper_II.contiguous(), damping)


def prune_sparsegpt(
    weight_OI: Tensor, statistics: Statistics, pattern: Pattern, options: SparseGptOptions, prepared: Prepared
) -> PruneResult:
    """Sweep over the columns; works on the transpose, so that a column is contiguous."""
    work_IO = prepared.scale.scaled(weight_OI).T.contiguous()
    keep_IO = torch.ones_like(work_IO, dtype=torch.bool)
    step = columns_together(pattern, options.block)

    def kept_or_zero(column: int) -> Tensor:
        if column % step == 0:
            select_columns(work_IO, keep_IO, prepared.upper_II, pattern, (column, min(column + step, len(work_IO))))
        return work_IO[column].where(keep_IO[column], 0.0)

    sweep_columns(work_IO, prepared.upper_II, max(step, options.block // step * step), kept_or_zero)
    keep_OI = keep_IO.T.contiguous()
    pruned_OI = prepared.scale.unscaled(work_IO.T, weight_OI)
    return PruneResult(pruned_OI, keep_OI, {"damping": prepared.damping})


def sweep_columns(work_IO: Tensor, upper_II: Tensor, block: int, fixed: Callable[[int], Tensor]) -> None:
    """Fix one column after the other, in place, and let all later ones make up for what that costs.

    `fixed(column)` is the value (O) that a column is to have, asked for when all earlier ones are fixed.
    """
    for start in range(0, len(work_IO), block):
        end = min(start + block, len(work_IO))
        error_BO = torch.empty_like(work_IO[start:end])
        for column in range(start, end):
            target_O = fixed(column)
            error_O = (work_IO[column] - target_O) / upper_II[column, column]
            work_IO[column:end].addr_(upper_II[column, column:end], error_O, alpha=-1)
            work_IO[column] = target_O
            error_BO[column - start] = error_O
        work_IO[end:] -= upper_II[start:end, end:].T @ error_BO


def columns_together(pattern: Pattern, block: int) -> int:
    """Columns whose zeros are chosen at one time: an N:M group, else about `block`, in whole tiles."""
    if isinstance(pattern, NM):
        return pattern.of
    unit = pattern.cols if isinstance(pattern, Tile) else 1
    return max(unit, block // unit * unit)


def select_columns(
    work_IO: Tensor, keep_IO: Tensor, upper_II: Tensor, pattern: Pattern, columns: tuple[int, int]
) -> None:
    """Decide the keep mask of some columns, in place, from their weights as they now are."""
    start, end = columns
    score_BO = (work_IO[start:end] / upper_II.diagonal()[start:end, None]).square()
    keep_IO[start:end] = _keep_share(score_BO.T.contiguous(), pattern, (work_IO.shape[1], len(work_IO)), start).T


def _keep_share(score_OB: Tensor, pattern: Pattern, shape: tuple[int, int], start: int) -> Tensor:
    """Keep mask of the columns from `start` on: their share of what the whole matrix (`shape`) has to lose."""
    cols = shape[1]
    end = start + score_OB.shape[1]
    if isinstance(pattern, NM):
        return keep_highest(score_OB, pattern)
    if isinstance(pattern, Tile):
        before, after, parts = (math.ceil(column / pattern.cols) for column in (start, end, cols))
        return keep_tiles(score_OB, pattern, _share(pattern.num_pruned_tiles(shape), before, after, parts))
    if pattern.compare == "row":
        return keep_in_rows(score_OB, _share(round(pattern.sparsity * cols), start, end, cols))
    return keep_in_matrix(score_OB, _share(pattern.num_pruned(shape), start, end, cols))


def _share(total: int, before: int, after: int, parts: int) -> int:
    """Part of an integer total; differences of rounded cumulative counts add up exactly."""
    return round(total * after / parts) - round(total * before / parts)
