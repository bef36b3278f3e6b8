"""Figures over several runs: what quality was paid for which sparsity."""

from collections.abc import Sequence
from html import escape
from math import log10
from typing import Any

from prunus.reporting.figures import DENSE, MODEL, SECOND, Figure, dotted, plottable
from prunus.reporting.record import Run

COLOURS = (MODEL, SECOND, "var(--third)", "var(--fourth)", DENSE)


def comparison_figures(runs: Sequence[Run]) -> list[Figure]:
    """Perplexity and KL against sparsity, for each text with the same windows; only like is drawn with like."""
    texts = dict.fromkeys(text for run in runs for text in run.perplexities)
    return [figure for text in texts for figure in _text_figures(text, runs)]


def _text_figures(text: str, runs: Sequence[Run]) -> list[Figure]:
    on_text = [(run, run.perplexities[text]) for run in runs if text in run.perplexities]
    against = [(run, evaluation.get("against") or {}) for run, evaluation in on_text]
    perplexity = _curve(text, "perplexity", [(run, evaluation.get("perplexity")) for run, evaluation in on_text])
    dense = next((one["perplexity"] for _, one in against if plottable(one.get("perplexity"))), None)
    if perplexity and dense is not None:
        # An annotation on a logarithmic axis is placed by its exponent, a shape by its value.
        label = {
            "xref": "paper",
            "x": 1,
            "xanchor": "right",
            "y": log10(dense),
            "yanchor": "bottom",
            "showarrow": False,
        }
        line = dotted(xref="paper", x0=0, x1=1, y0=dense, y1=dense)
        perplexity[0].layout.update(shapes=[line], annotations=[label | {"text": f"dense {dense:.4g}"}])
    return perplexity + _curve(text, "KL to the dense model", [(run, one.get("kl")) for run, one in against])


def _curve(text: str, unit: str, values: Sequence[tuple[Run, Any]]) -> list[Figure]:
    methods: dict[str, list[tuple[float, float, str]]] = {}
    for run, value in values:
        if plottable(run.sparsity) and plottable(value):
            assert run.sparsity is not None
            methods.setdefault(_line_name(run), []).append((run.sparsity, value, run.name))
    if not methods:
        return []
    traces = [_line(method, sorted(p), COLOURS[i % len(COLOURS)]) for i, (method, p) in enumerate(methods.items())]
    title = f"{unit[0].upper()}{unit[1:]} against sparsity"
    said = "; ".join(f"{name} at {s:.3f}: {v:.4g}" for points in methods.values() for s, v, name in sorted(points))
    layout: dict[str, Any] = {
        "xaxis": {"title": {"text": "sparsity of the pruned matrices"}, "range": [0, 1]},
        "yaxis": {"title": {"text": unit}},
    }
    if unit == "perplexity":
        layout["yaxis"] |= _logarithmic([value for points in methods.values() for _, value, _ in points])
    return [Figure(title, f"{title}: {said}.", traces, layout, f"{text}. Each point is one run.", height=360)]


def _line_name(run: Run) -> str:
    """One line for each method and kind of pattern: unstructured zeros, each N:M, each size of tile."""
    method = str(run.setting("method") or "method not recorded")
    pattern = str(run.setting("pattern") or "")
    if "x" in pattern:
        return f"{method}, tiles {pattern.partition(':')[0]}"
    return f"{method}, {pattern}" if ":" in pattern else method


def _logarithmic(values: Sequence[float]) -> dict[str, Any]:
    """A logarithmic axis labelled with whole numbers: methods differ by factors."""
    digits = (1, 2, 5) if max(values) > 8 * min(values) else range(1, 10)
    return {"type": "log", "tickmode": "array", "tickvals": [d * 10**power for power in range(7) for d in digits]}


def _line(method: str, points: Sequence[tuple[float, float, str]], colour: str) -> dict[str, Any]:
    sparsity, value, name = zip(*points, strict=True)
    return {
        "type": "scatter",
        "mode": "lines+markers",
        "name": escape(method),
        "x": sparsity,
        "y": value,
        "text": [escape(one) for one in name],
        "marker": {"color": colour, "size": 9},
        "line": {"color": colour, "width": 2},
        "hovertemplate": "%{text}<br>sparsity %{x:.3f}: %{y:.4g}",
    }
