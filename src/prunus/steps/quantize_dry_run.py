"""`prunus quantize --dry-run`: refuse what the run would refuse, and say what it would take; writes nothing."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from prunus.checkpoint.output import check_place
from prunus.machine_choice import parse_memory
from prunus.steps.calibration_text import check_text
from prunus.steps.dry_run import is_done
from prunus.steps.memory_plan import plan_memory
from prunus.steps.quantize import QuantizeStep, quantize_step


def dry_run(
    model: str | Path,
    out: str | Path,
    *,
    max_memory: str | int | None = None,
    trust_remote_code: bool = False,
    **settings: Any,
) -> dict[str, Any]:
    """Return what `quantize` with these arguments would write, and the memory it would take.

    Raises UserError where that run would, except for what only the weights tell (NaN) or only the work (a full disk).
    """
    step = quantize_step(model, trust_remote_code, settings)
    checked, checkpoint = step.settings, step.model.checkpoint
    place = Path(out).expanduser().absolute()
    check_place(place, checkpoint.path)
    memory = plan_memory(step.model, step.needs, checked, parse_memory(max_memory))
    after = sum(step.plan.num_bytes.values())
    done = is_done(place, checkpoint, checked, sum(step.sizes.values()) + memory.disk_bytes)
    if step.needs and not done:
        check_text(step.model, checked)
    return {
        "step": step.verb,
        "dry_run": True,
        "done": done,
        "scheme": checked.scheme,
        "method": checked.method,
        "parameters": checkpoint.num_parameters,
        "bytes": {"before": checkpoint.num_bytes, "after": after},
        **asdict(memory),
        "by_projection": _by_projection(step),
    }


def _by_projection(step: QuantizeStep) -> list[dict[str, Any]]:
    table: dict[str, dict[str, Any]] = {}
    for _, linear in step.model.spec.matrices:
        new = {"projection": linear.projection, "shape": list(linear.shape), "matrices": 0}
        table.setdefault(linear.projection, new)["matrices"] += 1
    return list(table.values())
