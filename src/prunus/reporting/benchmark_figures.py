"""Figures of one benchmark: latency percentiles, paired speed-ups, sizes; dense beside the model where measured."""

from typing import Any

from prunus.reporting.figures import DENSE, MODEL, SECOND, Figure, bars, dotted
from prunus.reporting.text import number

# Name and colour of the two sides of a benchmark record, in the order they are drawn.
SIDES = {"dense": ("dense", DENSE), "model": ("this model", MODEL)}
PERCENTILES = ("p50", "p95", "p99")
SIZES = {"bytes_on_disk": "on disk", "peak_memory_bytes": "peak memory", "decode_bytes_per_token": "read per token"}


def benchmark_figures(benchmark: dict[str, Any]) -> list[Figure]:
    """Percentiles of TTFT and TPOT, the paired speed-ups when there is a dense model, and sizes."""
    return [
        _percentiles(benchmark, "Time to first token", "ttft_seconds", "Prefill of the prompt and one token."),
        _percentiles(benchmark, "Time per output token", "tpot_seconds", "Every decode step of every repetition."),
        *_speedup(benchmark),
        _sizes(benchmark),
    ]


def _percentiles(benchmark: dict[str, Any], title: str, key: str, caption: str) -> Figure:
    data = [
        bars(name, PERCENTILES, [1000 * benchmark[side][key][p] for p in PERCENTILES], colour)
        for side, (name, colour) in SIDES.items()
        if benchmark.get(side)
    ]
    return Figure(title, _in_words(title, data, "ms"), data, _y_axis("ms"), caption)


def _sizes(benchmark: dict[str, Any]) -> Figure:
    data = [
        bars(name, SIZES.values(), [_megabytes(benchmark[side].get(key)) for key in SIZES], colour)
        for side, (name, colour) in SIDES.items()
        if benchmark.get(side)
    ]
    caption = "Peak resident memory of a process of its own, torch included. Weights read once per decoded token."
    return Figure("Size and memory", _in_words("Size and memory", data, "MB"), data, _y_axis("MB"), caption)


def _megabytes(size: float | None) -> float | None:
    return None if size is None else size / 1e6


def _speedup(benchmark: dict[str, Any]) -> list[Figure]:
    """One dot per pair, and their median with its interval; the dotted line at 1 is "no difference"."""
    ratios = benchmark.get("speedup") or {}
    colours = {"prefill": SECOND, "decode": MODEL}
    data = [trace for phase, ratio in ratios.items() for trace in _ratio(phase, ratio, colours[phase])]
    layout = {
        "xaxis": {"title": {"text": "dense seconds / model seconds"}},
        "yaxis": {"type": "category", "range": [-0.6, len(ratios) - 0.4]},
        "shapes": [dotted(x0=1, x1=1, yref="paper", y0=0, y1=1)],
        "showlegend": False,
    }
    caption = "Dots: pairs timed side by side. Bar: median and 95% interval. Right of the dotted line is faster."
    said = "; ".join(f"{name} {r['median']:.3f} ({r['low']:.3f} to {r['high']:.3f})" for name, r in ratios.items())
    return [Figure("Speed-up", f"Speed-up over the dense model: {said}.", data, layout, caption)] if ratios else []


def _ratio(phase: str, ratio: dict[str, Any], colour: str) -> list[dict[str, Any]]:
    middle = ratio["median"]
    error = {
        "type": "data",
        "symmetric": False,
        "array": [ratio["high"] - middle],
        "arrayminus": [middle - ratio["low"]],
        "color": colour,
        "thickness": 2,
        "width": 9,
    }
    base = {"type": "scatter", "mode": "markers", "hovertemplate": f"{phase} %{{x:.3f}}<extra></extra>"}
    dots = {"color": colour, "size": 10, "opacity": 0.4}
    tick = {"color": colour, "size": 16, "symbol": "diamond"}
    pairs = base | {"x": ratio["pairs"], "y": [phase] * len(ratio["pairs"]), "marker": dots}
    return [pairs, base | {"x": [middle], "y": [phase], "error_x": error, "marker": tick}]


def _in_words(title: str, data: list[dict[str, Any]], unit: str) -> str:
    said = [
        f"{trace['name']} {x} {number(y)} {unit if y is not None else ''}".strip()
        for trace in data
        for x, y in zip(trace["x"], trace["y"], strict=True)
    ]
    return f"{title}: {', '.join(said)}."


def _y_axis(unit: str) -> dict[str, Any]:
    return {"yaxis": {"title": {"text": unit}, "rangemode": "tozero"}}
