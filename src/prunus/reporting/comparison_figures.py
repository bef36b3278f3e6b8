"""Figures over several runs: what quality was paid for which sparsity, and for how few parameters."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from math import floor, log10
from typing import Any

from prunus.reporting.figures import COLOURS, Figure, dotted, plottable
from prunus.reporting.record import Run, evaluation_conditions
from prunus.reporting.shapes import axis_name, decided_by, shapes

Measured = tuple[Run, dict[str, Any]]


@dataclass(frozen=True, slots=True)
class Axis:
    """What quality is drawn against: its value of a run, and the line that the run belongs to."""

    name: str
    title: str
    value: Callable[[Run], float | None]
    line: Callable[[Run], str]


def comparison_figures(runs: Sequence[Run]) -> list[Figure]:
    """Perplexity and KL against sparsity, and against parameters left where runs were shrunk.

    Only like is drawn with like. Alike are evaluations on the same text, cut into the same windows, in one dtype, of
    runs made from the same model, which also means one tokenizer.
    """
    alike: dict[tuple[Any, ...], list[Measured]] = {}
    for run in runs:
        origin = run.origin.get("sha256") or run.origin.get("path")
        for conditions, evaluation in run.perplexities.items():
            alike.setdefault((origin, *conditions), []).append((run, evaluation))
    return [figure for measured in alike.values() for figure in _figures(measured)]


def _figures(measured: list[Measured]) -> list[Figure]:
    return [figure for axis in AXES for figure in _against(axis, measured)]


def _against(axis: Axis, measured: list[Measured]) -> list[Figure]:
    first_run, first = measured[0]
    where = f"Made from {first_run.origin.get('path', 'a model that is not recorded')}; {evaluation_conditions(first)}"
    values = [(run, evaluation.get("perplexity")) for run, evaluation in measured]
    perplexity = _curve(where, "perplexity", values, axis)
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
            f"{where}; against {parent}", "KL to the dense model", [(run, one.get("kl")) for run, one in compared], axis
        )
    ]


def _draw_dense(figure: Figure, parents: list[dict[str, Any]]) -> None:
    """Add the dense model's perplexity as a dotted line."""
    dense = next((one["perplexity"] for one in parents if plottable(one.get("perplexity"))), None)
    if dense is None:
        return
    # An annotation on a logarithmic axis is placed by its exponent, a shape by its value.
    height = log10(dense) if figure.layout["yaxis"].get("type") == "log" else dense
    place = {"xref": "paper", "x": 1, "xanchor": "right", "y": height, "yanchor": "bottom", "showarrow": False}
    line = dotted(xref="paper", x0=0, x1=1, y0=dense, y1=dense)
    figure.layout.update(shapes=[line], annotations=[place | {"text": f"dense {dense:.4g}"}])


def _curve(where: str, unit: str, values: Sequence[tuple[Run, Any]], axis: Axis) -> list[Figure]:
    methods: dict[str, list[tuple[float, float, str]]] = {}
    for run, value in values:
        paid_for = axis.value(run)
        if paid_for is not None and plottable(paid_for) and plottable(value):
            methods.setdefault(axis.line(run), []).append((paid_for, value, run.name))
    if not methods:
        return []
    traces = [
        _line(axis, method, sorted(p), COLOURS[i % len(COLOURS)]) for i, (method, p) in enumerate(methods.items())
    ]
    title = f"{unit[0].upper()}{unit[1:]} against {axis.name}"
    said = "; ".join(f"{name} at {s:.3f}: {v:.4g}" for points in methods.values() for s, v, name in sorted(points))
    layout: dict[str, Any] = {
        "xaxis": {"title": {"text": axis.title}, "range": _range(axis, [x for p in methods.values() for x, _, _ in p])},
        "yaxis": {"title": {"text": unit}},
    }
    if unit == "perplexity":
        layout["yaxis"] |= _logarithmic([value for points in methods.values() for _, value, _ in points])
    return [Figure(title, f"{title}: {said}.", traces, layout, f"{where}. Each point is one run.", height=360)]


def _range(axis: Axis, values: Sequence[float]) -> list[float]:
    """All of a sparsity; of parameters left, what lies above the smallest model."""
    return [0, 1] if axis is SPARSITY else [max(0.0, floor(10 * min(values) - 0.5) / 10), max(1.0, *values) + 0.01]


def _sparse_line(run: Run) -> str:
    """One line for each method and kind of pattern: unstructured zeros, each N:M, each size of tile."""
    method = str(run.method or "method not recorded")
    pattern = str(run.setting("pattern") or "")
    if "x" in pattern:
        method = f"{method}, tiles {pattern.partition(':')[0]}"
    elif ":" in pattern:
        method = f"{method}, {pattern}"
    return f"{method}, shrunk" if run.shrink_steps else method


def _shrunk_line(run: Run) -> str:
    """One line for each set of axes, score, and what else was done."""
    changed, how = shapes(run), decided_by(run)
    parts = [str(how[name]) for name in ("expert_score", "score") if name in how]
    if how.get("refit") is False:
        parts.append("no refit")
    if run.sparsity is not None:
        parts.append(f"and {run.setting('method')}")
    return ", ".join([" and ".join(map(axis_name, changed.axes if changed else [])), *parts])


def _parameters_left(run: Run) -> float | None:
    changed = shapes(run)
    return changed.parameters_left if changed else None


SPARSITY = Axis("sparsity", "sparsity of the pruned matrices", lambda run: run.sparsity, _sparse_line)
LEFT = Axis("parameters left", "parameters after / before", _parameters_left, _shrunk_line)
AXES = (SPARSITY, LEFT)


def _logarithmic(values: Sequence[float]) -> dict[str, Any]:
    """A logarithmic axis labelled with whole numbers where methods differ by factors; else an ordinary one."""
    if max(values) < 2 * min(values):
        return {}
    digits = (1, 2, 5) if max(values) > 8 * min(values) else range(1, 10)
    return {"type": "log", "tickmode": "array", "tickvals": [d * 10**power for power in range(7) for d in digits]}


def _line(axis: Axis, method: str, points: Sequence[tuple[float, float, str]], colour: str) -> dict[str, Any]:
    paid_for, value, name = zip(*points, strict=True)
    return {
        "type": "scatter",
        "mode": "lines+markers",
        "name": escape(method),
        "x": paid_for,
        "y": value,
        "text": [escape(one) for one in name],
        "marker": {"color": colour, "size": 9},
        "line": {"color": colour, "width": 2},
        "hovertemplate": f"%{{text}}<br>{axis.name} %{{x:.3f}}: %{{y:.4g}}",
    }
