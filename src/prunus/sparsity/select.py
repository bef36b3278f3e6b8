"""Exact selection: keep the highest scores, never one more or less than asked.

Ties are broken by position: of equal scores the EARLIER weight (row by row) is kept, the later one pruned.
The threshold comes from a partial sort (numpy's vectorised partition on the CPU), and only rows in which the
threshold value occurs on both sides of the cut are looked at again.

Letters: O, I = out, in features; R, C = rows and columns of comparison groups; M, G = place in an N:M group, group.
"""

import numpy as np
import torch
from torch import Tensor

from prunus.sparsity.patterns import NM, Compare, Pattern, Tile

_RANKED_GROUP = 32  # N:M groups up to this size are ranked by comparing all pairs, larger ones by partition


def keep_highest(score_OI: Tensor, pattern: Pattern, compare: Compare = "matrix") -> Tensor:
    """Boolean keep mask (O, I) that satisfies `pattern` and keeps the highest scores; NaN is refused.

    `compare` is used where the pattern leaves the comparison group open. Tiles are ranked by their mean score.
    """
    assert score_OI.ndim == 2
    assert not bool(score_OI.isnan().any()), "scores hold NaN"
    score_OI = score_OI if score_OI.dtype == torch.float64 else score_OI.float()
    if isinstance(pattern, NM):
        return _keep_in_groups(score_OI, pattern)
    if isinstance(pattern, Tile):
        return keep_tiles(score_OI, pattern, pattern.num_pruned_tiles((score_OI.shape[0], score_OI.shape[1])))
    if (pattern.compare or compare) == "row":
        return keep_in_rows(score_OI, round(pattern.sparsity * score_OI.shape[1]))
    return keep_in_matrix(score_OI, round(pattern.sparsity * score_OI.numel()))


def keep_in_matrix(score_OI: Tensor, num_pruned: int) -> Tensor:
    """Prune exactly `num_pruned` weights of the matrix."""
    return keep_in_rows(score_OI.reshape(1, -1), num_pruned).reshape(score_OI.shape)


def keep_in_rows(score_RC: Tensor, num_pruned: int) -> Tensor:
    """Prune exactly `num_pruned` weights of every row."""
    if num_pruned in (0, score_RC.shape[1]):
        return torch.full_like(score_RC, num_pruned == 0, dtype=torch.bool)
    ordered_RC = _partition(score_RC, num_pruned)
    lowest_kept_R = ordered_RC[:, num_pruned].clone()
    keep_RC = score_RC >= lowest_kept_R[:, None]
    tied_R = ordered_RC[:, :num_pruned].amax(1) == lowest_kept_R
    if bool(tied_R.any()):
        keep_RC[tied_R] = _keep_earlier(score_RC[tied_R], lowest_kept_R[tied_R], num_pruned)
    return keep_RC


def _keep_earlier(score_RC: Tensor, threshold_R: Tensor, num_pruned: int) -> Tensor:
    """The rows where the threshold value occurs more often than there is room for."""
    above_RC = score_RC > threshold_R[:, None]
    equal_RC = score_RC == threshold_R[:, None]
    room_R1 = score_RC.shape[1] - num_pruned - above_RC.sum(1, keepdim=True)
    return above_RC | (equal_RC & (equal_RC.cumsum(1) <= room_R1))


def _partition(score_RC: Tensor, kth: int) -> Tensor:
    """Rows reordered so that column `kth` is as in a full sort, with nothing larger before it."""
    if score_RC.device.type != "cpu":
        return score_RC.sort(1).values
    return torch.from_numpy(np.partition(score_RC.numpy(), kth, axis=1))


def keep_tiles(score_OI: Tensor, tile: Tile, num_pruned: int) -> Tensor:
    """Prune exactly `num_pruned` tiles, those with the lowest mean score (so cut-off tiles are not at a loss)."""
    mean_tile = tile.sums(score_OI) / tile.sums(torch.ones_like(score_OI))
    return tile.spread(keep_in_matrix(mean_tile, num_pruned), (score_OI.shape[0], score_OI.shape[1]))


def _keep_in_groups(score_OI: Tensor, pattern: NM) -> Tensor:
    if pattern.of > _RANKED_GROUP:
        return keep_in_rows(score_OI.reshape(-1, pattern.of), pattern.of - pattern.keep).reshape(score_OI.shape)
    score_MG = score_OI.reshape(-1, pattern.of).T.contiguous()
    keep_MG = _num_better(score_MG) < pattern.keep
    return keep_MG.T.reshape(score_OI.shape)


def _num_better(score_MG: Tensor) -> Tensor:
    """How many scores of the same group rank before each score; an earlier place wins a tie."""
    size = score_MG.shape[0]
    later_M1 = torch.arange(size - 1, -1, -1, dtype=torch.int8, device=score_MG.device)[:, None]
    better_MG = later_M1.repeat(1, score_MG.shape[1])  # start as if every later score won, then correct
    for shift in range(1, size):
        earlier_wins = (score_MG[:-shift] >= score_MG[shift:]).view(torch.int8)
        better_MG[shift:] += earlier_wins
        better_MG[:-shift] -= earlier_wins
    return better_MG
