"""Figures of what was shrunk: which heads and experts were worth keeping, and what cutting cost each block."""

import math
from html import escape
from typing import Any

from prunus.reporting import text
from prunus.reporting.figures import COLOURS, HEAT, Figure, error_in_words, plottable, range_in_words
from prunus.reporting.record import Run
from prunus.reporting.shapes import axis_name, kept_units
from prunus.shrinking import WIDTH_SCORES

# Axes with few units, each of which has a name: (title, one unit, the setting that names the score).
IMPORTANCE = {
    "kv_groups": ("Head importance", "KV group", "score"),
    "experts": ("Expert importance", "expert", "expert_score"),
}
DECADES = 2  # scores that spread over more are shown by their logarithm
STAYS = "\N{BLACK CIRCLE}"

Rows = list[dict[str, Any]]


def shape_figures(run: Run) -> list[Figure]:
    """For each shrink step a heat map of scores by axis, and the output errors; empty when nothing was shrunk."""
    return [figure for step in run.shrink_steps for figure in (*_importance(step), *_errors(step))]


def _importance(step: dict[str, Any]) -> list[Figure]:
    found = []
    for axis, (title, unit, setting) in IMPORTANCE.items():
        rows = [row for row in step.get("groups") or [] if row.get("axis") == axis and row.get("scores")]
        if rows:
            score = (step.get("settings") or {}).get(setting, "not recorded")
            caption = f"Score {score} of each {unit}{_on(step)}; a dot: it stays. Each block ranks its own."
            found.append(_map(title, unit, rows, caption))
    return found


def _on(step: dict[str, Any]) -> str:
    """On which text, in words; nothing where none was read."""
    return f", on {said}" if (said := text.calibration(step.get("calibration"))) else ""


def _map(title: str, unit: str, rows: Rows, caption: str) -> Figure:
    """One cell per block (x) and unit (y)."""
    units = range(max(len(row["scores"]) for row in rows))
    scores = [float(score) for row in rows for score in row["scores"] if plottable(score)]
    shown, scale = _colours(scores)
    cells = [[_cell(row, number) for row in rows] for number in units]
    trace = {
        "type": "heatmap",
        "x": [str(row.get("block")) for row in rows],
        "y": [str(number) for number in units],
        "z": [[shown(score) for score, _ in line] for line in cells],
        "text": [[STAYS if stays else "" for _, stays in line] for line in cells],
        "texttemplate": "%{text}",
        "customdata": [
            [f"{text.number(score)}, {'stays' if stays else 'goes'}" for score, stays in row] for row in cells
        ],
        "colorscale": HEAT,
        "xgap": 1,
        "ygap": 1,
        "hovertemplate": f"block %{{x}}, {unit} %{{y}}<br>score %{{customdata}}<extra></extra>",
        **scale,
    }
    layout = {
        "xaxis": {"title": {"text": "block"}, "type": "category", "showgrid": False},
        "yaxis": {"title": {"text": unit}, "autorange": "reversed", "type": "category", "showgrid": False},
    }
    kept = sum(len(kept_units(row)) for row in rows)
    alt = f"{title}: scores of {len(scores)} units in {len(rows)} blocks, {range_in_words(scores)}; {kept} stay."
    return Figure(title, alt, [trace], layout, caption, height=110 + (24 if len(units) <= 16 else 12) * len(units))


def _cell(row: dict[str, Any], number: int) -> tuple[float | None, bool]:
    scores = row["scores"]
    return (scores[number] if number < len(scores) else None), number in kept_units(row)


def _colours(scores: list[float]) -> tuple[Any, dict[str, Any]]:
    """(from a score to what is coloured, the scale): logarithmic where scores spread over decades."""
    bar = {"thickness": 10, "outlinewidth": 0, "len": 1}
    positive = [score for score in scores if score > 0]
    if not positive or max(positive) < 10**DECADES * min(positive):
        return (lambda score: score), {"zmin": 0, "zmax": max([*positive, 1e-12]), "colorbar": bar}
    low, high = math.log10(min(positive)), math.log10(max(positive))
    powers = list(range(math.ceil(low), math.floor(high) + 1))
    ticks = {"tickmode": "array", "tickvals": powers, "ticktext": [f"{10.0**power:g}" for power in powers]}

    def logarithm(score: float | None) -> float | None:
        """A score of 0 is at the lower end."""
        if not plottable(score) or score is None:
            return None
        return math.log10(score) if score > 0 else low

    return logarithm, {"zmin": low, "zmax": high, "colorbar": bar | ticks}


def _errors(step: dict[str, Any]) -> list[Figure]:
    """One colour per axis: dotted as cut, solid with the kept columns refitted."""
    settings = step.get("settings") or {}
    rows = [r for r in step.get("groups") or [] if plottable(r.get("error")) and plottable(r.get("error_plain"))]
    if not rows:
        return []
    kinds = {"error_plain": "cut", **({"error": "refitted"} if settings.get("refit") else {})}
    traces, said = [], []
    for number, axis in enumerate(dict.fromkeys(row.get("axis") for row in rows)):
        of_axis = [row for row in rows if row.get("axis") == axis]
        for key, words in kinds.items():
            blocks = _by_block(of_axis, key)
            traces.append(_line(f"{axis_name(axis)}, {words}", blocks, key, COLOURS[number % len(COLOURS)]))
            said.append(f"{axis_name(axis)}, {words}, {range_in_words(list(blocks.values()))}")
    yaxis = {"title": {"text": "relative squared error"}, "rangemode": "tozero", **_spread(traces)}
    layout = {"xaxis": {"title": {"text": "block"}, "type": "category"}, "yaxis": yaxis}
    alt = f"Output error by block: {'; '.join(said)}."
    return [Figure("Error of what reads the cut", alt, traces, layout, _caption(step, rows, kinds), height=330)]


def _by_block(rows: Rows, key: str) -> dict[str, float]:
    """The mean over the experts of a block, where it has several rows."""
    found: dict[str, list[float]] = {}
    for row in rows:
        found.setdefault(str(row.get("block")), []).append(row[key])
    return {block: sum(values) / len(values) for block, values in found.items()}


def _line(name: str, blocks: dict[str, float], key: str, colour: str) -> dict[str, Any]:
    cut = key == "error_plain"
    return {
        "type": "scatter",
        "mode": "lines+markers",
        "name": escape(name),
        "x": list(blocks),
        "y": list(blocks.values()),
        "marker": {"color": colour, "size": 7, "symbol": "circle-open" if cut else "circle"},
        "line": {"color": colour, "width": 2, "dash": "dot" if cut else "solid"},
        "hovertemplate": "block %{x}: %{y:.4g}",
    }


def _spread(traces: list[dict[str, Any]]) -> dict[str, Any]:
    values = [value for trace in traces for value in trace["y"]]
    wide = min(values) > 0 and max(values) > 10**DECADES * min(values)
    return {"type": "log", "dtick": 1, "tickformat": "~g"} if wide else {}


def _caption(step: dict[str, Any], rows: Rows, kinds: dict[str, str]) -> str:
    score = WIDTH_SCORES.get(str((step.get("settings") or {}).get("score")))
    needs = ("gram",) if "error" in kinds else score.needs if score else None
    said = [f"Relative squared change of the {error_in_words(needs)}, of the matrix that reads what was cut{_on(step)}"]
    if "error" in kinds:
        said.append("dotted: cut and left alone; solid: what stays was refitted by least squares")
    if any(row.get("expert") is not None for row in rows):
        said.append("mean over the experts of a block")
    return "; ".join(said) + "."
