"""Allocation: how many weights each matrix loses, so that together they lose exactly what was asked.

Every function returns `{matrix name: number of weights to prune}`, whose sum is `round(sparsity * all weights)`;
`as_patterns` turns the counts into patterns, which carry them exactly where matrices are ranked as a whole. Facts
(outlier ratios, medians, harm) are given per matrix: for one sparsity per block, as in the papers, give all matrices of
a block the block's value.

Allocations can be worse than `uniform`, most of all with methods that update weights: accept one only when a held-out
measure says so.
"""

import math
from collections.abc import Iterable, Mapping
from typing import TypeAlias

import torch
from torch import Tensor

from prunus.sparsity.patterns import Compare, Shape, Unstructured

Sizes: TypeAlias = Mapping[str, int]
Counts: TypeAlias = dict[str, int]


def uniform(sizes: Sizes, sparsity: float) -> Counts:
    """The same sparsity everywhere."""
    return apportion(sizes, dict.fromkeys(sizes, sparsity), sparsity)


def owl(sizes: Sizes, outlier_ratios: Mapping[str, float], sparsity: float, *, limit: float = 0.08) -> Counts:
    """OWL: matrices with more outliers lose less. Yin et al. 2023, arXiv:2310.05175, section 3.3.

    Ratios (see `outlier_ratio`) are scaled linearly onto a band of width 2 * `limit` (the paper's lambda) and turned
    round; the band is then moved so that the total count holds.
    """
    return apportion(sizes, _band(outlier_ratios, -2 * limit), sparsity)


def outlier_ratio(score_OI: Tensor, *, multiple: float = 5.0) -> float:
    """Fraction of scores |W_ij| * ||x_j|| above `multiple` times their mean (OWL's D with threshold M)."""
    return float((score_OI > multiple * score_OI.mean()).float().mean())


def dlp(sizes: Sizes, medians: Mapping[str, float], sparsity: float, *, alpha: float = 0.15) -> Counts:
    """DLP: matrices with a higher median score are less important. Chen et al. 2025, arXiv:2505.23807, section 3.

    Medians of |W_ij| * ||x_j|| measure unimportance; scaled linearly, they spread the sparsities over 2 * `alpha`.
    """
    return apportion(sizes, _band(medians, 2 * alpha), sparsity)


def by_sensitivity(
    sizes: Sizes, harm: Mapping[str, float], sparsity: float, *, steepness: float = 7.0, limit: float = 0.15
) -> Counts:
    """Equal marginal harm, from the harm (above 0, such as KL) of pruning each matrix alone at `sparsity`.

    Assuming harm_m * exp(steepness * (s_m - s)), the sum is least for a given count where the harm per weight is the
    same everywhere: s_m = constant - log(harm_m / size_m) / steepness, cut off at `limit` on both sides of the median.
    Per-matrix output errors grow with a steepness of about 7 between 50% and 70%.
    """
    assert all(value > 0 for value in harm.values())
    wanted = {name: -math.log(harm[name] / sizes[name]) / steepness for name in sizes}
    middle = sorted(wanted.values())[len(wanted) // 2]
    return apportion(sizes, {n: min(max(v - middle, -limit), limit) for n, v in wanted.items()}, sparsity)


def one_threshold(scores: Iterable[tuple[str, Tensor]], sparsity: float) -> Counts:
    """One comparison group over all matrices: how many of the lowest scores of the model lie in each matrix.

    `scores` gives (name, score >= 0) pairs and is gone through twice, in the same order, one tensor in memory at a
    time; of equal scores, earlier matrices keep theirs. Pruning these counts per matrix is the model-wide selection.
    """
    histograms = {name: torch.bincount(_bits(score) >> 16, minlength=1 << 15) for name, score in scores}
    assert histograms, "no scores"
    total = torch.stack(list(histograms.values())).sum(0)
    rank = round(sparsity * int(total.sum()))
    bucket = int(torch.searchsorted(total.cumsum(0), rank, right=True)) if rank < int(total.sum()) else len(total) - 1
    counts = {name: int(histogram[:bucket].sum()) for name, histogram in histograms.items()}
    details = {name: _low_bits(score, bucket) for name, score in scores}
    assert details.keys() == counts.keys(), "scores must be iterable twice"
    return _finish_counts(counts, details, rank - sum(counts.values()))


def as_patterns(shapes: Mapping[str, Shape], counts: Counts, compare: Compare) -> dict[str, Unstructured]:
    """Patterns that prune these counts, ranked within each matrix or each row. UserError when a matrix would vanish.

    Rows lose equally many weights, so with "row" a count is rounded to whole rows, and what that leaves is made up for
    in the next matrix: in all, at most half a matrix's number of rows is missing.
    """
    if compare == "matrix":
        return {name: Unstructured(counts[name] / (rows * cols), "matrix") for name, (rows, cols) in shapes.items()}
    patterns, missing = {}, 0
    for name, (rows, cols) in shapes.items():
        of_row = min(max(round((counts[name] + missing) / rows), 0), cols - 1)
        missing += counts[name] - rows * of_row
        patterns[name] = Unstructured(of_row / cols, "row")
    return patterns


def apportion(sizes: Sizes, wanted: Mapping[str, float], sparsity: float) -> Counts:
    """Move all wanted sparsities by one constant so that the total count is exact; every matrix keeps a weight.

    Fractions are settled by the largest remainder, earlier matrices first.
    """
    total = round(sparsity * sum(sizes.values()))
    shift = _shift(sizes, wanted, total)
    ideal = {name: min(max(wanted[name] + shift, 0.0) * size, size - 1.0) for name, size in sizes.items()}
    counts = {name: math.floor(value) for name, value in ideal.items()}
    order = sorted(sizes, key=lambda name: counts[name] - ideal[name])  # stable: largest remainder, then position
    missing = total - sum(counts.values())
    while missing:
        for name in order:
            step = 1 if missing > 0 else -1
            if missing and 0 <= counts[name] + step < sizes[name]:
                counts[name] += step
                missing -= step
    return counts


def _shift(sizes: Sizes, wanted: Mapping[str, float], total: int) -> float:
    """Bisect for the constant at which the cut-off sparsities prune `total` weights."""
    assert 0 <= total <= sum(size - 1 for size in sizes.values()), "every matrix has to keep a weight"
    low, high = -max(wanted.values()), 1.0 - min(wanted.values())
    for _ in range(60):
        middle = (low + high) / 2
        pruned = sum(min(max(wanted[name] + middle, 0.0) * size, size - 1.0) for name, size in sizes.items())
        low, high = (middle, high) if pruned < total else (low, middle)
    return high


def _band(facts: Mapping[str, float], width: float) -> dict[str, float]:
    """Facts scaled linearly onto [0, width] (width < 0: the largest fact lies lowest); equal facts all give 0."""
    lowest, span = min(facts.values()), max(facts.values()) - min(facts.values())
    return {name: (value - lowest) / span * width if span else 0.0 for name, value in facts.items()}


def _bits(score: Tensor) -> Tensor:
    """Bit patterns of non-negative fp32 scores, which are ordered like the scores themselves."""
    flat = score.detach().float().flatten() + 0.0  # -0.0 becomes 0.0
    assert bool((flat >= 0).all()), "scores are non-negative and not NaN"
    return flat.view(torch.int32)


def _low_bits(score: Tensor, bucket: int) -> tuple[Tensor, Tensor]:
    """Distinct lower halves of the patterns in a bucket of upper halves, and how often each occurs."""
    bits = _bits(score)
    values, counts = torch.unique(bits[(bits >> 16) == bucket] & 0xFFFF, return_counts=True)
    return values, counts


def _finish_counts(counts: Counts, details: Mapping[str, tuple[Tensor, Tensor]], missing: int) -> Counts:
    """Add the `missing` lowest scores of the bucket; equal ones are taken from the last matrices first."""
    in_bucket = torch.zeros(1 << 16, dtype=torch.int64)
    for values, number in details.values():
        in_bucket[values.long().cpu()] += number.cpu()
    threshold = int(torch.searchsorted(in_bucket.cumsum(0), missing, right=True))
    for name, (values, number) in details.items():
        counts[name] += int(number[values < threshold].sum())
    missing -= int(in_bucket[:threshold].sum())
    for name, (values, number) in reversed(list(details.items())):
        tied = min(int(number[values == threshold].sum()), missing)
        counts[name] += tied
        missing -= tied
    assert missing == 0
    return counts
