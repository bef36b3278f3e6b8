"""SparseGPT against optimal brain surgery done literally: a fresh inverse of the remaining columns at every column."""

import pytest
import torch
from torch import Tensor

from prunus.sparsity import METHODS, NM, SparseGptOptions, Statistics, Tile, Unstructured, prune

ROWS, COLUMNS = 6, 12
GENERATOR = torch.Generator().manual_seed(3)
INPUT_NI = torch.randn(60, COLUMNS, generator=GENERATOR, dtype=torch.float64) @ torch.randn(
    COLUMNS, COLUMNS, generator=GENERATOR, dtype=torch.float64
)
WEIGHT_OI = torch.randn(ROWS, COLUMNS, generator=GENERATOR, dtype=torch.float64)
GRAM_II = INPUT_NI.T @ INPUT_NI / 60
DAMPING = 0.01


def inverse_of_rest(column: int) -> Tensor:
    """Inverse Hessian of the columns from `column` on, damped relative to each input's own norm."""
    hessian_II = GRAM_II + DAMPING * GRAM_II.diagonal().diag()
    return torch.linalg.inv(hessian_II[column:, column:])


def score(work_OI: Tensor, column: int) -> Tensor:
    return work_OI[:, column] ** 2 / inverse_of_rest(column)[0, 0]


def sweep(step: int, choose: object) -> Tensor:
    """Every `step` columns choose what to prune; then remove column by column, rows updated by the OBS formula."""
    work_OI, pruned_OI = WEIGHT_OI.clone(), torch.zeros(ROWS, COLUMNS, dtype=torch.bool)
    for column in range(COLUMNS):
        if column % step == 0:
            score_OB = torch.stack([score(work_OI, c) for c in range(column, column + step)], 1)
            pruned_OI[:, column : column + step] = choose(score_OB)  # type: ignore[operator]
        inverse = inverse_of_rest(column)
        for row in range(ROWS):
            if pruned_OI[row, column]:
                work_OI[row, column:] -= work_OI[row, column].clone() / inverse[0, 0] * inverse[0]
                work_OI[row, column] = 0
    return work_OI


def lowest(score_RC: Tensor, count: int) -> Tensor:
    return score_RC.argsort(1).argsort(1) < count


CASES = [
    (Unstructured(0.5, "matrix"), 12, lambda s: lowest(s.reshape(1, -1), s.numel() // 2).reshape(s.shape)),
    (Unstructured(0.5, "matrix"), 4, lambda s: lowest(s.reshape(1, -1), s.numel() // 2).reshape(s.shape)),
    (Unstructured(0.5, "row"), 4, lambda s: lowest(s, 2)),
    (NM(2, 4), 4, lambda s: lowest(s, 2)),
    (NM(1, 3), 3, lambda s: lowest(s, 2)),
    (Tile(2, 6, 0.5), 12, lambda s: tiles(s)),
]


def tiles(score_OB: Tensor) -> Tensor:
    mean = score_OB.reshape(3, 2, 2, 6).mean((1, 3))
    return lowest(mean.reshape(1, -1), 3).reshape(3, 2).repeat_interleave(2, 0).repeat_interleave(6, 1)


@pytest.mark.parametrize(("pattern", "step", "choose"), CASES)
@pytest.mark.parametrize("lazy", [True, False])
def test_equals_literal_optimal_brain_surgery(pattern, step: int, choose, lazy: bool) -> None:  # type: ignore[no-untyped-def]
    block = 128 if lazy and isinstance(pattern, NM) else step  # the lazy block must not change N:M results
    statistics = Statistics(60, None, GRAM_II.float())
    options = SparseGptOptions(damping=DAMPING, block=block)
    result = prune(METHODS["sparsegpt"], WEIGHT_OI.float(), statistics, pattern, options)
    torch.testing.assert_close(result.weight_OI, sweep(step, choose).float(), rtol=1e-3, atol=1e-4)
