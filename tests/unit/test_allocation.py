"""Allocation: totals are exact, the model-wide threshold is the model-wide sort."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from prunus.errors import UserError
from prunus.sparsity import Unstructured, allocation
from prunus.sparsity.allocation import Counts

SHAPES = {"q": (576, 576), "k": (192, 576), "up": (1536, 576), "tiny": (1, 7)}
SIZES = {name: rows * cols for name, (rows, cols) in SHAPES.items()}
FACTS = {"q": 0.04, "k": 0.01, "up": 0.02, "tiny": 0.02}


@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.5, 0.777, 0.95])
@pytest.mark.parametrize("allocate", [allocation.owl, allocation.dlp, allocation.by_sensitivity])
def test_totals_are_exact_and_patterns_carry_them(allocate, sparsity: float) -> None:  # type: ignore[no-untyped-def]
    counts: Counts = allocate(SIZES, FACTS, sparsity)
    assert sum(counts.values()) == round(sparsity * sum(SIZES.values()))
    for name, pattern in allocation.as_patterns(SHAPES, counts, "matrix").items():
        assert pattern.num_pruned(SHAPES[name]) == counts[name] < SIZES[name]


@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.5, 0.777, 0.95])
def test_rows_that_lose_equally_many_carry_what_rounding_left_over(sparsity: float) -> None:
    shapes = {f"{name}{n}": shape for n in range(6) for name, shape in SHAPES.items() if name != "tiny"}
    sizes = {name: rows * cols for name, (rows, cols) in shapes.items()}
    counts = allocation.owl(sizes, {name: (n * 7 % 5) / 100 for n, name in enumerate(sizes)}, sparsity)
    patterns = allocation.as_patterns(shapes, counts, "row")
    pruned = {name: pattern.num_pruned(shapes[name]) for name, pattern in patterns.items()}
    assert all(pattern.compare == "row" and pruned[name] % shapes[name][0] == 0 for name, pattern in patterns.items())
    assert all(abs(pruned[name] - counts[name]) <= 1536 for name in shapes)
    assert abs(sum(pruned.values()) - round(sparsity * sum(sizes.values()))) <= 1536 / 2


@given(st.dictionaries(st.text(max_size=3), st.integers(1, 5000), min_size=1, max_size=8), st.floats(0, 0.9))
@settings(deadline=None)
def test_apportion_is_exact_whatever_is_wanted(sizes: dict[str, int], sparsity: float) -> None:
    total = round(sparsity * sum(sizes.values()))
    if total > sum(sizes.values()) - len(sizes):
        return
    wanted = {name: (size * 37 % 11) / 5 - 1 for name, size in sizes.items()}
    counts = allocation.apportion(sizes, wanted, sparsity)
    assert sum(counts.values()) == total
    assert all(0 <= counts[name] < sizes[name] for name in sizes)


def test_uniform_is_the_same_sparsity_everywhere() -> None:
    counts = allocation.uniform(SIZES, 0.6)
    assert all(abs(counts[name] / SIZES[name] - 0.6) < 1 / SIZES[name] for name in SIZES)


def test_directions_and_widths() -> None:
    sizes = dict.fromkeys("abc", 100_000)
    facts = {"a": 1.0, "b": 2.0, "c": 3.0}
    share = {name: count / 100_000 for name, count in allocation.owl(sizes, facts, 0.5).items()}
    assert share == pytest.approx({"a": 0.58, "b": 0.5, "c": 0.42}, abs=1e-4)  # more outliers, fewer zeros
    share = {name: count / 100_000 for name, count in allocation.dlp(sizes, facts, 0.5).items()}
    assert share == pytest.approx({"a": 0.35, "b": 0.5, "c": 0.65}, abs=1e-4)  # a higher median, more zeros


def test_sensitivity_equalises_marginal_harm() -> None:
    sizes = dict.fromkeys("ab", 1_000_000)
    counts = allocation.by_sensitivity(sizes, {"a": 1.0, "b": 2.0}, 0.5, steepness=7.0)
    difference = (counts["a"] - counts["b"]) / 1_000_000
    assert difference == pytest.approx(torch.tensor(2.0).log().item() / 7, abs=1e-5)
    extreme = allocation.by_sensitivity(sizes, {"a": 1e-9, "b": 1.0}, 0.5, limit=0.1)
    assert (extreme["a"] - extreme["b"]) / 1_000_000 == pytest.approx(0.1, abs=1e-5)  # one side sits at the median


def test_outlier_ratio() -> None:
    assert allocation.outlier_ratio(torch.tensor([[1.0] * 9 + [100.0]])) == pytest.approx(0.1)


@given(st.integers(0, 2**32 - 1), st.floats(0, 0.99), st.booleans())
@settings(max_examples=40, deadline=None)
def test_one_threshold_is_the_sort_of_the_whole_model(seed: int, sparsity: float, ties: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    scores = [(name, torch.randn(3, size, generator=generator).square() * scale) for name, size, scale in SCORED]
    if ties:
        scores = [(name, (score * 2).round()) for name, score in scores]
    counts = allocation.one_threshold(scores, sparsity)
    owner = [name for name, score in scores for _ in range(score.numel())]
    flat = torch.cat([score.flatten() for _, score in scores]).tolist()
    order = sorted(range(len(flat)), key=lambda place: (flat[place], -place))[: round(sparsity * len(flat))]
    assert counts == {name: sum(owner[place] == name for place in order) for name, _ in scores}


SCORED = [("a", 40, 1.0), ("b", 25, 0.5), ("c", 60, 1.003)]


def test_a_matrix_that_would_vanish_is_refused() -> None:
    counts = allocation.one_threshold([("low", torch.zeros(2, 2)), ("high", torch.ones(2, 2))], 0.5)
    assert counts == {"low": 4, "high": 0}
    with pytest.raises(UserError, match=r"outside \[0, 1\)"):
        allocation.as_patterns({"low": (2, 2), "high": (2, 2)}, counts, "matrix")


def test_counts_and_patterns_agree() -> None:
    patterns = allocation.as_patterns({"a": (2, 5)}, {"a": 3}, "matrix")
    assert patterns == {"a": Unstructured(0.3, "matrix")}
