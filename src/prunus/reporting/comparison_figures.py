"""Figures over several runs: what quality was paid for which sparsity."""

from collections.abc import Sequence
from html import escape
from math import log10
from typing import Any

from prunus.reporting.figures import DENSE, MODEL, SECOND, Figure, dotted, plottable
from prunus.reporting.record import Run, evaluation_conditions

COLOURS = (MODEL, SECOND, "var(--third)", "var(--fourth)", DENSE)

Measured = tuple[Run, dict[str, Any]]


def comparison_figures(runs: Sequence[Run]) -> list[Figure]:
    """Perplexity and KL against sparsity; only like is drawn with like.

    Alike are evaluations on the same text, cut into the same windows, in one dtype, of runs made from the same model,
    which also means one tokenizer.
    """
    alike: dict[tuple[Any, ...], list[Measured]] = {}
    for run in runs:
        origin = run.origin.get("sha256") or run.origin.get("path")
        for conditions, evaluation in run.perplexities.items():
            alike.setdefault((origin, *conditions), []).append((run, evaluation))
    return [figure for measured in alike.values() for figure in _figures(measured)]


def _figures(measured: list[Measured]) -> list[Figure]:
    first_run, first = measured[0]
    where = f"Made from {first_run.origin.get('path', 'a model that is not recorded')}; {evaluation_conditions(first)}"
    perplexity = _curve(where, "perplexity", [(run, evaluation.get("perplexity")) for run, evaluation in measured])
    parents: dict[str, list[Measured]] = {}
    for run, evaluation in measured:
        if against := evaluation.get("against"):
            parents.setdefault(str(against.get("path")), []).append((run, against))
    if perplexity and len(parents) == 1:
        _draw_dense(perplexity[0], [against for compared in parents.values() for _, against in compared])
    return perplexity + [
        figure
        for parent, compared in parents.items()
        for figure in _curve(
            f"{where}; against {parent}", "KL to the dense model", [(run, one.get("kl")) for run, one in compared]
        )
    ]


def _draw_dense(figure: Figure, parents: list[dict[str, Any]]) -> None:
    """Add the dense model's perplexity as a dotted line."""
    dense = next((one["perplexity"] for one in parents if plottable(one.get("perplexity"))), None)
    if dense is None:
        return
    # An annotation on a logarithmic axis is placed by its exponent, a shape by its value.
    place = {"xref": "paper", "x": 1, "xanchor": "right", "y": log10(dense), "yanchor": "bottom", "showarrow": False}
    line = dotted(xref="paper", x0=0, x1=1, y0=dense, y1=dense)
    figure.layout.update(shapes=[line], annotations=[place | {"text": f"dense {dense:.4g}"}])


def _curve(where: str, unit: str, values: Sequence[tuple[Run, Any]]) -> list[Figure]:
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
    return [Figure(title, f"{title}: {said}.", traces, layout, f"{where}. Each point is one run.", height=360)]


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
