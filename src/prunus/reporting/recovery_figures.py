"""Loss curves of recovery training: what was trained on, and what was held out, over the tokens seen."""

from html import escape
from typing import Any

from prunus.reporting.figures import DENSE, MODEL, SECOND, Figure, bars, plottable
from prunus.reporting.record import Run

COLOURS = (MODEL, SECOND, DENSE)
WORDS = {"kl": "KL to the teacher", "nll": "negative log-likelihood"}


def recovery_figures(run: Run) -> list[Figure]:
    """For each step that trained: the training loss and, apart, the held-out losses; or, by block, the distances."""
    figures = []
    for number, step in enumerate(run.history, start=1):
        if step.get("step") == "recover":
            figures += [figure for figure in (_training(step, number), _held_out(step, number)) if figure.data]
            figures += [_by_block(step, number)] if step.get("blocks") else []
    return figures


def _training(step: dict[str, Any], number: int) -> Figure:
    rows = [row for row in step.get("curve") or [] if plottable(row.get("loss"))]
    names = [name for name in ("loss", "ce", "logits", "hidden") if any(name in row for row in rows)]
    shown = names if len(names) > 2 else names[:1]  # a single loss is the total
    lines = [_line(name, [(row["tokens"], row.get(name)) for row in rows], i) for i, name in enumerate(shown)]
    losses = ", ".join((step.get("settings") or {}).get("loss") or ())
    caption = f"Mean loss of each step's batch in step {number} of the history ({escape(losses)})."
    values = [row["loss"] for row in rows]
    alt = f"Training loss, {values[0]:.4g} at first and {values[-1]:.4g} at last." if values else "No training loss."
    return Figure("Training loss", alt, lines, _axes("loss"), caption)


def _held_out(step: dict[str, Any], number: int) -> Figure:
    per_step = step["tokens"] / step["steps"] if step.get("steps") else 0
    rows = [(row["step"] * per_step, row) for row in step.get("evaluations") or []]
    names = [name for name in WORDS if any(plottable(row.get(name)) for _, row in rows)]
    lines = [_line(WORDS[name], [(x, row.get(name)) for x, row in rows], i) for i, name in enumerate(names)]
    windows = sum(row.get("held_out") or 0 for row in step.get("data") or [])
    caption = (
        f"Nats per token on {windows} windows that step {number} never trained on; the weights are those of "
        f"training step {step.get('best_step')}."
    )
    ends = [f"{WORDS[n]} from {rows[0][1][n]:.4g} to {rows[-1][1][n]:.4g}" for n in names]
    return Figure("Held-out loss", f"Held-out losses: {'; '.join(ends)}.", lines, _axes("nats per token"), caption)


def _by_block(step: dict[str, Any], number: int) -> Figure:
    rows = step["blocks"]
    blocks = [str(row["block"]) for row in rows]
    data = [bars("before", blocks, [row["before"] for row in rows], DENSE)]
    data.append(bars("after", blocks, [row["after"] for row in rows], MODEL))
    layout = {"xaxis": {"title": {"text": "block"}, "type": "category"}, "yaxis": {"title": {"text": "distance"}}}
    caption = f"Squared distance of each block's output from the teacher's on held-out text, relative; step {number}."
    alt = f"Distance by block before and after, {len(rows)} blocks."
    return Figure("Block-wise reconstruction", alt, data, {**layout, "barmode": "group"}, caption)


def _line(name: str, points: list[tuple[float, Any]], number: int) -> dict[str, Any]:
    return {
        "type": "scatter",
        "mode": "lines+markers" if len(points) < 30 else "lines",
        "name": escape(name),
        "x": [x for x, _ in points],
        "y": [y if plottable(y) else None for _, y in points],
        "line": {"color": COLOURS[number % len(COLOURS)], "width": 2},
        "hovertemplate": "%{x:,} tokens: %{y:.4g}",
    }


def _axes(y: str) -> dict[str, Any]:
    return {"xaxis": {"title": {"text": "tokens"}}, "yaxis": {"title": {"text": y}}}
