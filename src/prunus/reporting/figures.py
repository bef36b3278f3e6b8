"""Figures as plain plotly JSON. A colour is a CSS variable, resolved when drawn, so plots follow the page's theme.

plotly.js reads a small markup in its labels; every text that comes from a record is escaped here.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Any

from prunus.reporting.record import Run

HEAT = [[0, "var(--heat-0)"], [0.5, "var(--heat-1)"], [1, "var(--heat-2)"]]
DENSE, MODEL, SECOND = "var(--dense)", "var(--model)", "var(--second)"


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
    """Heat maps of achieved sparsity and of relative reconstruction error; empty when nothing was pruned."""
    shown = [
        ("Sparsity", "sparsity", 1.0, "Fraction of zeros in each matrix after pruning."),
        ("Reconstruction error", "error", None, "Relative error of each matrix's output on the calibration text."),
    ]
    return [
        heat_map(title, run.matrices, key, top, caption)
        for title, key, top, caption in shown
        if any(plottable(matrix.get(key)) for matrix in run.matrices)
    ]


def sensitivity_figures(run: Run) -> list[Figure]:
    """KL of cutting one thing alone: a heat map when recorded per matrix, bars when recorded per block."""
    items = [one for one in run.sensitivity if plottable(one.get("kl"))]
    if not items:
        return []
    pruned = ", ".join(str(items[0][key]) for key in ("method", "pattern", "dataset") if key in items[0])
    under = pruned or "conditions not recorded"
    caption = f"KL divergence from the dense model, nats per token, when only this is pruned ({under})."
    if any(one.get("projection") not in (None, "block") for one in items):
        return [heat_map("Sensitivity", items, "kl", None, caption)]
    values = [one["kl"] for one in items]
    layout = {"xaxis": {"title": {"text": "block"}, "type": "category"}, "yaxis": {"title": {"text": "KL"}}}
    alt = f"KL divergence by block, {_range(values)}."
    return [Figure("Sensitivity", alt, [bars("KL", [_block(one) for one in items], values, MODEL)], layout, caption)]


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
    alt = f"{title} of {len(numbers)} matrices by block and projection, {_range(numbers)}."
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


def _range(values: Sequence[float]) -> str:
    return f"from {min(values):.4g} to {max(values):.4g}" if values else "no values"
