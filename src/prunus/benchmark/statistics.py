"""From times to claims: percentiles, paired speed-ups with their uncertainty, and the sentence they allow."""

from collections.abc import Sequence
from typing import Any

import numpy as np

# The 95% interval of a median cannot be narrower than [min, max] below this count, and covers less than it says.
FEWEST_REPETITIONS = 5
RESAMPLES = 10_000


def percentiles(seconds: Sequence[float]) -> dict[str, float]:
    """p50, p95 and p99 by linear interpolation, and how many values they stand on."""
    p50, p95, p99 = np.percentile(seconds, [50, 95, 99])
    return {"p50": float(p50), "p95": float(p95), "p99": float(p99), "count": len(seconds)}


def speedup(dense_seconds: Sequence[float], model_seconds: Sequence[float], seed: int = 0) -> dict[str, Any]:
    """How many times faster the model is than the dense one: dense seconds / model seconds, pair by pair.

    The two were timed next to each other in each repetition, so what slows the machine for minutes cancels.
    Returns the median ratio, its 95% percentile-bootstrap interval (Efron 1979; seeded), every pair's ratio and what
    may be claimed: "faster", "slower", "no difference" (the interval includes 1) or "too few repetitions".
    """
    assert len(dense_seconds) == len(model_seconds) > 0, "a pair needs both times"
    ratios = np.asarray(dense_seconds) / np.asarray(model_seconds)
    draws = np.random.default_rng(seed).choice(ratios, size=(RESAMPLES, len(ratios)))
    low, high = np.percentile(np.median(draws, axis=1), [2.5, 97.5])
    return {
        "median": float(np.median(ratios)),
        "low": float(low),
        "high": float(high),
        "pairs": ratios.tolist(),
        "claim": _claim(low, high, len(ratios)),
    }


def _claim(low: float, high: float, pairs: int) -> str:
    if pairs < FEWEST_REPETITIONS:
        return "too few repetitions"
    return "faster" if low > 1 else "slower" if high < 1 else "no difference"


def verdict(prefill: dict[str, Any], decode: dict[str, Any], *, zeros_only: bool) -> str:
    """One honest sentence on two speed-ups. `zeros_only`: the shapes are the dense ones, only values are zero."""
    if decode["claim"] == "too few repetitions":
        given = len(decode["pairs"])
        return f"No verdict: {given} repetitions cannot tell a speed-up from noise; use at least {FEWEST_REPETITIONS}."
    phases = f"{_phase('prefill', prefill)}; {_phase('decode', decode)}."
    if "faster" in (prefill["claim"], decode["claim"]):
        return phases.capitalize()
    what = "zeros alone bring" if zeros_only else "the smaller shapes bring"
    return f"In this measurement {what} no speed in this engine: {phases}"


def _phase(name: str, ratio: dict[str, Any]) -> str:
    interval = f"{ratio['median']:.3f}x, 95% interval {ratio['low']:.3f} to {ratio['high']:.3f}"
    if ratio["claim"] == "no difference":
        return f"{name} no different ({interval}, which includes 1)"
    return f"{name} {ratio['claim']} ({interval})"
