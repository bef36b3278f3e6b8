"""Figures as plain plotly JSON. A colour is a CSS variable, resolved when drawn, so plots follow the page's theme.

plotly.js reads a small markup in its labels; every text that comes from a record is escaped here.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Any

from prunus.quantizing import QUANTIZERS
from prunus.reporting.record import Run
from prunus.sparsity import METHODS

HEAT = [[0, "var(--heat-0)"], [0.5, "var(--heat-1)"], [1, "var(--heat-2)"]]
DENSE, MODEL, SECOND = "var(--dense)", "var(--model)", "var(--second)"
COLOURS = (MODEL, SECOND, "var(--third)", "var(--fourth)", DENSE)

# What the error of a matrix is, by what its method knew of the inputs.
ERRORS = {
    "gram": "output on the calibration text",
    "input_sq_norm": "output on the calibration text, estimated from input norms alone: correlated inputs are left out",
}
ERROR_OF_WEIGHTS = "weights; no text was looked at"

# A sensitivity is of one kind of unit, on one model, measured in one way.
MEASURED_BY = ("method", "pattern", "dataset", "window", "windows", "dtype")


@dataclass(frozen=True, slots=True)
class Figure:
    """One plot: what it shows in words (`alt`, for those who do not see it) and what plotly draws."""

    title: str
    alt: str
    data: list[dict[str, Any]]
    layout: dict[str, Any] = field(default_factory=dict)
    caption: str = ""
    height: int = 300


def finite(value: Any) -> Any:
    """Records may hold NaN or infinity, which JSON in a page may not: they become gaps."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def matrix_figures(run: Run) -> list[Figure]:
    """Heat maps of achieved sparsity and of the error, one for each kind of error; empty when nothing was pruned."""
    caption = "Fraction of zeros in each matrix after pruning."
    return _matrix_map("Sparsity", run.matrices, "sparsity", 1.0, caption) + [
        figure for kind, rows in _by_error(run).items() for figure in _matrix_map("Error", rows, "error", None, kind)
    ]


def _by_error(run: Run) -> dict[str, list[dict[str, Any]]]:
    """The matrices, by what their error is."""
    kinds: dict[str, list[dict[str, Any]]] = {}
    for matrix in run.matrices:
        kinds.setdefault(f"Relative squared change of each matrix's {_error_of(matrix['method'])}.", []).append(matrix)
    return kinds


def _error_of(method: str | None) -> str:
    known = METHODS.get(method or "") or QUANTIZERS.get(method or "")
    return error_in_words(known.needs if known else None)


def error_in_words(needs: Iterable[str] | None) -> str:
    """What an error was taken of, by what was known of the inputs; None: nobody knows."""
    if needs is None:
        return "output or weights: this prunus does not know the method"
    known = set(needs)
    return next((words for need, words in ERRORS.items() if need in known), ERROR_OF_WEIGHTS)


def _matrix_map(title: str, rows: list[dict[str, Any]], key: str, top: float | None, caption: str) -> list[Figure]:
    return [heat_map(title, rows, key, top, caption)] if any(plottable(row.get(key)) for row in rows) else []


def sensitivity_figures(run: Run) -> list[Figure]:
    """KL of cutting one thing alone, a figure for each model and set of conditions."""
    alike: dict[tuple[str, ...], dict[str, dict[str, Any]]] = {}
    for row in run.sensitivity:
        if plottable(row.get("kl")):
            facts = (row.get("sha256") or row["model"], row.get("dataset_sha256"), *(row.get(n) for n in MEASURED_BY))
            alike.setdefault((_unit(row), *map(str, facts)), {})[row["name"]] = row
    return [_sensitivity(list(rows.values())) for rows in alike.values()]


def _unit(row: dict[str, Any]) -> str:
    return "block" if row.get("projection") in (None, "block") else "matrix"


def _sensitivity(rows: list[dict[str, Any]]) -> Figure:
    """A heat map of matrices, or bars of blocks, all measured in the same way."""
    under = ", ".join(f"{name} {rows[0][name]}" for name in MEASURED_BY if name in rows[0])
    caption = (
        f"KL divergence from {rows[0]['model'] or 'a model that is not recorded'}, nats per token, when only this "
        f"{_unit(rows[0])} of it is pruned ({under or 'conditions not recorded'})."
    )
    if _unit(rows[0]) == "matrix":
        return heat_map("Sensitivity", rows, "kl", None, caption)
    values = [row["kl"] for row in rows]
    layout = {"xaxis": {"title": {"text": "block"}, "type": "category"}, "yaxis": {"title": {"text": "KL"}}}
    alt = f"KL divergence by block, {range_in_words(values)}."
    return Figure("Sensitivity", alt, [bars("KL", [_block(row) for row in rows], values, MODEL)], layout, caption)


def heat_map(title: str, items: Sequence[dict[str, Any]], key: str, top: float | None, caption: str) -> Figure:
    """One cell per block (x) and projection (y); `top` fixes the upper end of the scale, else the largest value."""
    blocks = list(dict.fromkeys(_block(item) for item in items))
    projections = list(dict.fromkeys(str(item.get("projection") or item["name"]) for item in items))
    values = {(str(item.get("projection") or item["name"]), _block(item)): item.get(key) for item in items}
    numbers = [float(value) for value in values.values() if value is not None and plottable(value)]
    trace = {
        "type": "heatmap",
        "x": blocks,
        "y": [escape(name) for name in projections],
        "z": [[values.get((name, block)) for block in blocks] for name in projections],
        "zmin": 0,
        "zmax": top if top is not None else max([*numbers, 1e-12]),
        "colorscale": HEAT,
        "xgap": 1,
        "ygap": 1,
        "colorbar": {"thickness": 10, "outlinewidth": 0, "len": 1},
        "hovertemplate": f"block %{{x}}, %{{y}}<br>{title.lower()} %{{z:.4f}}<extra></extra>",
    }
    layout = {
        "xaxis": {"title": {"text": "block"}, "type": "category", "showgrid": False},
        "yaxis": {"autorange": "reversed", "type": "category", "showgrid": False},
    }
    alt = f"{title} of {len(numbers)} matrices by block and projection, {range_in_words(numbers)}."
    return Figure(title, alt, [trace], layout, caption, height=110 + 24 * len(projections))


def bars(name: str, x: Iterable[str], y: Iterable[float | None], colour: str) -> dict[str, Any]:
    """A plotly bar trace; names and categories must be escaped already."""
    return {
        "type": "bar",
        "name": name,
        "x": list(x),
        "y": list(y),
        "marker": {"color": colour},
        "hovertemplate": "%{x}: %{y:.4g}",
    }


def dotted(**where: Any) -> dict[str, Any]:
    """A reference line across the plot; `where` says from and to."""
    return {"type": "line", "line": {"color": DENSE, "dash": "dot", "width": 1}, **where}


def plottable(value: Any) -> bool:
    """Is this a finite number?"""
    return isinstance(value, int | float) and math.isfinite(value)


def _block(item: dict[str, Any]) -> str:
    return "outside" if item.get("block") is None else str(item["block"])


def range_in_words(values: Sequence[float]) -> str:
    """The smallest and the largest, for `alt`."""
    return f"from {min(values):.4g} to {max(values):.4g}" if values else "no values"
