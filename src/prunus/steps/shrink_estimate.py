"""`prunus shrink --dry-run`: refuse what the run would refuse, say what would go; reads no weights, writes nothing."""

import math
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from prunus.models import StreamedModel
from prunus.models.axes import Axis, shapes_of
from prunus.models.cut import Cut
from prunus.settings_shrink import ShrinkSettings
from prunus.steps.calibration_text import check_text
from prunus.steps.held_out import HELD_OUT
from prunus.steps.layer_step import LayersStep
from prunus.steps.memory_plan import plan_memory
from prunus.steps.remove_sublayers import TIER, SublayerStep
from prunus.steps.shrink import ShrinkCall, kind_of, parts, with_mix
from prunus.steps.shrink_budget import mixes
from prunus.steps.shrink_per_layer import WILL
from prunus.steps.shrink_shapes import rounded, shape_facts, weight_without_layers

MIXES = "the mix will be the one of these that costs least on the calibration text (the table shows the first): {}."
DONE = "{} already is the result of these settings: the run would return at once."


@dataclass(frozen=True, slots=True)
class ShrinkEstimate:
    """What `shrink` would cut, and the memory and disk it would take. `groups` are the coupled groups, axis by axis."""

    axes: dict[str, dict[str, Any]]
    before: dict[str, int]
    after: dict[str, int]
    groups: list[dict[str, Any]]
    memory_bytes: int
    disk_bytes: int
    remarks: list[str]

    def summary(self) -> dict[str, Any]:
        return {"step": "shrink", "dry_run": True, **asdict(self)}


def estimate_shrink(
    model: str | Path,
    out: str | Path,
    *,
    max_memory: str | int | None = None,
    trust_remote_code: bool = False,
    **settings: Any,
) -> ShrinkEstimate:
    """Return what `shrink` with these arguments would do. Raises UserError where that run would."""
    call = ShrinkCall(model, out, max_memory, trust_remote_code, settings)
    done = call.is_done
    streamed, cuts = call.check()
    if call.settings.sublayers:
        return _without_sublayers(call, streamed, done)
    sizes, choices = call.settings, list[str]()
    if sizes.budget:
        choices = [MIXES.format("; ".join(map(str, mixes(streamed, sizes))))]
        sizes = with_mix(sizes, cuts[0].left)
    todo = parts(sizes)
    needs = {"gram"} if sizes.layers is not None else set[str]()
    needs = needs.union(*(kind_of(part).needs_of(part) for part in todo))
    plan = plan_memory(streamed, needs, call.settings, call.max_memory)
    if (needs or call.has_own_widths) and not done:
        check_text(streamed, call.settings, more=HELD_OUT if call.has_own_widths else 0)
    return ShrinkEstimate(
        **_shapes(call, streamed, cuts, sizes),
        groups=[_group(streamed, axis) for cut in cuts for axis in cut.axes.values()],
        memory_bytes=plan.memory_bytes,
        disk_bytes=plan.disk_bytes + (call.checkpoint.num_bytes if call.has_own_widths else 0),
        remarks=[
            *choices,
            *(note for part, cut in zip(todo, cuts, strict=True) for note in rounded(part, cut)),
            *([WILL] if call.has_own_widths else []),
            *([DONE.format(call.place)] if done else []),
        ],
    )


def _without_sublayers(call: ShrinkCall, model: StreamedModel, done: bool) -> ShrinkEstimate:
    step = SublayerStep(call.settings, model)
    plan = plan_memory(model, {"hidden_states"}, call.settings, call.max_memory)
    if not done:
        check_text(model, call.settings)
    return ShrinkEstimate(
        **step.shapes(step.expected),
        groups=[_group_of_sublayer(step, kind) for kind in step.budgets],
        memory_bytes=plan.memory_bytes,
        disk_bytes=plan.disk_bytes,
        remarks=[TIER, *([DONE.format(call.place)] if done else [])],
    )


def _group_of_sublayer(step: SublayerStep, kind: str) -> dict[str, Any]:
    """What goes with one sublayer: whole parameters."""
    layer = step.removable[0]
    prefix = f"{step.model.spec.blocks[layer].full(step.sublayers[layer][kind].module)}."
    shapes = {n: s for n, s in shapes_of(step.model.config).items() if n.startswith(prefix)}
    return {
        "axis": kind,
        "parameters_per_unit": sum(map(math.prod, shapes.values())),
        "members": {re.sub(r"\.\d+\.", ".*.", name, count=1): list(range(len(s))) for name, s in shapes.items()},
    }


def _shapes(call: ShrinkCall, model: StreamedModel, cuts: list[Cut], sizes: ShrinkSettings) -> dict[str, Any]:
    """The facts of all cuts; layers that go are not chosen yet, so those in front stand for them."""
    facts = shape_facts(model, cuts, sizes) if cuts else {"axes": {}}
    if sizes.layers is None:
        return facts
    step = LayersStep(sizes.of_layers, call.checkpoint, call.dtype)
    budget = step.budget
    kept = [layer for layer in range(budget.depth) if layer not in budget.removable[: budget.count]]
    smaller = cuts[-1] if cuts else None
    return {
        "axes": {"layers": {"asked": sizes.layers, "before": budget.depth, "after": len(kept)}, **facts["axes"]},
        "before": asdict(weight_without_layers(model, range(budget.depth), {})),
        "after": asdict(weight_without_layers(model, kept, step.fields(kept), smaller)),
    }


def _group(model: StreamedModel, axis: Axis) -> dict[str, Any]:
    """What is cut together: parameters (blocks and experts as *), each with the dimensions along which they shrink."""
    members: dict[str, set[int]] = {}
    for name, dim in axis.segments:
        members.setdefault(re.sub(r"\.\d+\.", ".*.", name), set()).add(dim)
    return {
        "axis": axis.name,
        "parameters_per_unit": sum(n for name, n in axis.elements.items() if model.names.keys_of([name])),
        "members": {name: sorted(dims) for name, dims in members.items()},
    }
