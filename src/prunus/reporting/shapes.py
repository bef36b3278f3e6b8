"""What the shrink steps of a run did to its shapes, all of them taken together, and in words."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from prunus.reporting import text
from prunus.reporting.record import Run

# What the record calls an axis, and what it is called on the page.
AXES = {
    "kv_groups": "KV groups",
    "ffn": "FFN channels",
    "expert_ffn": "FFN channels of each expert",
    "shared_ffn": "FFN channels of the shared expert",
    "hidden": "hidden width",
    "experts": "experts",
    "layers": "layers",
    "attention": "layers with attention",
    "mlp": "layers with an MLP",
}
WEIGHTS: dict[str, tuple[str, Callable[[float | None], str]]] = {
    "parameters": ("parameters", text.number),
    "decode_bytes": ("weights read per decoded token", text.size),
    "kv_cache_values_per_token": ("cached values per token", text.number),
}
# The settings that decided what stays, and the axes each of them decides on.
WIDTHS = {"kv_groups", "ffn", "expert_ffn", "shared_ffn"}
DECIDED_BY = {"expert_score": {"experts"}, "score": WIDTHS, "refit": WIDTHS}
MOST_NAMED = 16  # of more units only the number that stays is said


@dataclass(frozen=True, slots=True)
class Shapes:
    """Units along each axis (name -> before, after, asked) and what the model weighs, before and after."""

    axes: dict[str, dict[str, Any]]
    before: dict[str, Any]
    after: dict[str, Any]

    @property
    def parameters_left(self) -> float | None:
        """Parameters after / before."""
        before, after = self.before.get("parameters"), self.after.get("parameters")
        return after / before if before and after is not None else None

    def axes_in_words(self) -> str:
        return ", ".join(
            f"{axis_name(axis)} {text.change(one.get('before'), one.get('after'))}" for axis, one in self.axes.items()
        )


def shapes(run: Run) -> Shapes | None:
    """From before the first step that shrank the model to after the last; None when none did."""
    steps = run.shrink_steps
    if not steps:
        return None
    axes: dict[str, dict[str, Any]] = {}
    for step in steps:
        for axis, one in own_axes(step).items():
            earlier = axes.get(axis)
            since = (
                {"before": earlier.get("before"), "asked": [earlier.get("asked"), one.get("asked")]} if earlier else {}
            )
            axes[axis] = {**one, **since}
    return Shapes(axes, steps[0].get("before") or {}, steps[-1].get("after") or {})


def own_axes(step: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """What this step cut itself: its record also counts the other parts of its call, whose axes it was not asked."""
    asked = step.get("settings") or {}
    return {axis: one for axis, one in (step.get("axes") or {}).items() if asked.get(axis) is not None}


def decided_by(run: Run) -> dict[str, Any]:
    """The settings that decided which units stay; of several calls, those of the last that cut such an axis."""
    return {
        name: (step.get("settings") or {}).get(name)
        for name, axes in DECIDED_BY.items()
        for step in run.shrink_steps
        if axes & set(own_axes(step))
    }


def axis_name(axis: Any) -> str:
    return AXES.get(str(axis), str(axis).replace("_", " "))


def shape_rows(run: Run) -> list[list[str]]:
    """What, before, after, ratio, asked; empty when nothing was shrunk."""
    found = shapes(run)
    if found is None:
        return []
    rows = [
        [axis_name(axis), *_sizes(one.get("before"), one.get("after"), text.number), text.plain(one.get("asked"))]
        for axis, one in found.axes.items()
    ]
    return rows + [
        [words, *_sizes(found.before.get(name), found.after.get(name), show), "-"]
        for name, (words, show) in WEIGHTS.items()
    ]


def _sizes(before: Any, after: Any, show: Callable[[float | None], str]) -> list[str]:
    return [show(before), show(after), text.fixed(after / before, 3) if before and after else "-"]


def group_rows(run: Run) -> list[list[str]]:
    """Every coupled group that lost units: name, axis, units, which stay, errors, tokens, time."""
    return [
        [
            str(row.get("name")),
            axis_name(row.get("axis")),
            text.plain(row.get("units")),
            _kept(row),
            text.number(row.get("error_plain")),
            text.number(row.get("error")),
            text.plain(row.get("tokens")),
            text.seconds(row.get("seconds")),
        ]
        for step in run.shrink_steps
        for row in step.get("groups") or []
    ]


def _kept(row: dict[str, Any]) -> str:
    kept = kept_units(row)
    return text.plain(kept) if row.get("units", 0) <= MOST_NAMED else f"{len(kept)} of them"


def kept_units(row: dict[str, Any]) -> list[int]:
    """The units of a coupled group that stay; recorded as hexadecimal digits of 4 units each, the first unit first."""
    bits = "".join(f"{int(digit, 16):04b}" for digit in row.get("kept") or "")
    return [unit for unit, bit in enumerate(bits) if bit == "1"]


def step_in_words(run: Run, step: dict[str, Any]) -> dict[str, Any]:
    """What one shrink step did, name -> sentence, in place of its lists of numbers."""
    before, after = _before(run, step), step.get("after") or {}
    axes = {
        axis_name(axis): f"{text.change(one.get('before'), one.get('after'))} (asked {text.plain(one.get('asked'))})"
        for axis, one in own_axes(step).items()
    }
    weights = {
        words: text.change(before.get(name), after.get(name), show)
        for name, (words, show) in WEIGHTS.items()
        if name in after
    }
    rows = step.get("groups") or []
    return {**axes, **weights, "coupled groups": len(rows), "mean output error": _errors(rows)}


def _before(run: Run, step: dict[str, Any]) -> dict[str, Any]:
    """What the model weighed before this part of its call; the record says it of the whole call."""
    call = [one for one in run.shrink_steps if one.get("request") == step.get("request")]
    number = call.index(step)
    found: dict[str, Any] = (call[number - 1].get("after") if number else step.get("before")) or {}
    return found


def _errors(rows: list[dict[str, Any]]) -> str | None:
    known = [row for row in rows if row.get("error") is not None and row.get("error_plain") is not None]
    if not known:
        return None
    plain, new = (sum(row[key] for row in known) / len(known) for key in ("error_plain", "error"))
    return f"{text.number(plain)} cut, {text.number(new)} as written"
