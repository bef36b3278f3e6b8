"""Selection: exact counts under ties, equal to a stable sort written out."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from prunus.sparsity import NM, Pattern, Tile, Unstructured, keep_highest


def slow_keep(scores: list[float], num_pruned: int) -> list[bool]:
    """Prune the lowest; of equal scores the later place goes first."""
    order = sorted(range(len(scores)), key=lambda place: (scores[place], -place))
    pruned = set(order[:num_pruned])
    return [place not in pruned for place in range(len(scores))]


def slow_keep_highest(score_OI: Tensor, pattern: Unstructured | NM) -> Tensor:
    rows: list[list[float]] = score_OI.tolist()
    if isinstance(pattern, NM):
        groups = [row[i : i + pattern.of] for row in rows for i in range(0, len(row), pattern.of)]
        keep = [slow_keep(group, pattern.of - pattern.keep) for group in groups]
    elif pattern.compare == "row":
        keep = [slow_keep(row, round(pattern.sparsity * len(row))) for row in rows]
    else:
        flat = [score for row in rows for score in row]
        keep = [slow_keep(flat, round(pattern.sparsity * len(flat)))]
    return torch.tensor(keep).reshape(score_OI.shape)


@st.composite
def scores_and_pattern(draw: st.DrawFn) -> tuple[Tensor, Unstructured | NM]:
    """Scores full of ties, with a pattern that fits them."""
    of = draw(st.sampled_from([2, 3, 4, 8, 16, 40]))
    cols = of * draw(st.integers(1, 3))
    shape = (draw(st.integers(1, 5)), cols)
    values = draw(
        st.lists(st.sampled_from([0.0, -0.0, 1.0, 2.0, 3.5]), min_size=shape[0] * cols, max_size=shape[0] * cols)
    )
    unstructured = st.builds(Unstructured, st.floats(0, 0.999), st.sampled_from(["row", "matrix"]))
    pattern = draw(st.one_of(unstructured, st.builds(NM, st.integers(1, of - 1), st.just(of))))
    return torch.tensor(values).reshape(shape), pattern


@given(scores_and_pattern())
@settings(max_examples=100, deadline=None)
def test_equals_a_stable_sort(case: tuple[Tensor, Unstructured | NM]) -> None:
    score_OI, pattern = case
    keep_OI = keep_highest(score_OI, pattern)
    assert pattern.satisfied_by(keep_OI)
    assert torch.equal(keep_OI, slow_keep_highest(score_OI, pattern))


@given(st.integers(1, 5), st.integers(1, 5), st.integers(5, 12), st.integers(5, 12), st.floats(0, 0.99))
@settings(deadline=None)
def test_tiles_go_whole_by_mean_score(rows: int, cols: int, height: int, width: int, sparsity: float) -> None:
    tile = Tile(rows, cols, sparsity)
    score_OI = torch.rand(height, width, generator=torch.Generator().manual_seed(height * width))
    keep_OI = keep_highest(score_OI, tile)
    assert tile.satisfied_by(keep_OI)
    tiles = [(i, j) for i in range(0, height, rows) for j in range(0, width, cols)]
    means = {(i, j): float(score_OI[i : i + rows, j : j + cols].mean()) for i, j in tiles}
    kept = [mean for (i, j), mean in means.items() if keep_OI[i, j]]
    pruned = [mean for (i, j), mean in means.items() if not keep_OI[i, j]]
    assert not pruned or not kept or max(pruned) <= min(kept) + 1e-6


PATTERNS: list[Pattern] = [
    Unstructured(0.37, "row"),
    Unstructured(0.37, "matrix"),
    NM(2, 4),
    NM(5, 64),
    Tile(4, 8, 0.3),
]


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_all_equal_scores_still_count_exactly(pattern: Pattern) -> None:
    assert pattern.satisfied_by(keep_highest(torch.zeros(64, 128), pattern))
    assert pattern.satisfied_by(keep_highest(torch.full((64, 128), float("inf")), pattern))


def test_the_pattern_overrules_the_default_comparison() -> None:
    score_OI = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    by_matrix, by_row = torch.tensor([[False, False], [True, True]]), torch.tensor([[False, True], [False, True]])
    assert torch.equal(keep_highest(score_OI, Unstructured(0.5), "row"), by_row)
    assert torch.equal(keep_highest(score_OI, Unstructured(0.5)), by_matrix)
    assert torch.equal(keep_highest(score_OI, Unstructured(0.5, "matrix"), "row"), by_matrix)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_transposed_scores_of_any_dtype(dtype: torch.dtype, pattern: Pattern) -> None:
    score_IO = torch.rand(128, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).to(dtype)
    keep_OI = keep_highest(score_IO.T, pattern)
    assert torch.equal(keep_OI, keep_highest(score_IO.T.contiguous().double(), pattern))


def test_nan_is_an_error_of_ours() -> None:
    with pytest.raises(AssertionError, match="NaN"):
        keep_highest(torch.tensor([[1.0, float("nan")]]), Unstructured(0.5, "row"))
