"""What people read of smaller shapes: tables on stderr, with the figures of the JSON on stdout."""

from typing import Any

from rich.table import Table

from prunus.progress import console, say
from prunus.result import Run
from prunus.steps.shrink_estimate import ShrinkEstimate


def show_shrunk(run: Run) -> None:
    step = run.last_step
    _show_shapes(str(run.path), step)
    if "allocation" in step:
        from prunus.reporting.text import allocation  # here, so that other tables do not wait for the plots

        console.print(allocation(step["allocation"]), markup=False, highlight=False, soft_wrap=True)
    errors = _errors(step.get("groups", []))
    refit = f"; output error {errors['error_plain']:.4f}, refitted {errors['error']:.4f}" if errors else ""
    console.print(
        f"{'already done: ' if run.reused else ''}{step['seconds']:.0f} s, peak "
        f"{step['peak_memory_bytes'] / 2**30:.2f} GiB, forward in {step['dtype']}{refit}.",
        markup=False,
    )


def _errors(groups: list[dict[str, Any]]) -> dict[str, float]:
    """Mean relative output errors of the matrices that read what was cut."""
    known = [row for row in groups if "error" in row]
    return {key: sum(row[key] for row in known) / len(known) for key in ("error_plain", "error")} if known else {}


def show_shrink_estimate(estimate: ShrinkEstimate) -> None:
    _show_shapes("Dry run: nothing was touched", {"axes": estimate.axes, **_weights(estimate)})
    table = Table(title="Cut together", title_justify="left")
    for column in ("axis", "parameters in one unit", "parameter [dimensions]"):
        table.add_column(column)
    for group in estimate.groups:
        members = ", ".join(f"{name} {dims}" for name, dims in group["members"].items())
        table.add_row(group["axis"], f"{group['parameters_per_unit']:,}", members.replace("[", "\\["))
    console.print(table)
    console.print(
        f"about {estimate.memory_bytes / 2**30:.1f} GiB of memory, and for a while {estimate.disk_bytes / 1e9:.1f} GB "
        "of disk beside the result."
    )
    say(estimate.remarks)


def _weights(estimate: ShrinkEstimate) -> dict[str, Any]:
    return {"before": estimate.before, "after": estimate.after}


def _show_shapes(title: str, facts: dict[str, Any]) -> None:
    table = Table(title=title, title_justify="left")
    for number, column in enumerate(("", "before", "after", "ratio")):
        table.add_column(column, justify="left" if number == 0 else "right")
    rows = [(axis, sizes["before"], sizes["after"]) for axis, sizes in facts["axes"].items()]
    rows += [(key.replace("_", " "), facts["before"][key], facts["after"][key]) for key in facts["before"]]
    for name, before, after in rows:
        table.add_row(name, f"{before:,}", f"{after:,}", f"{after / before:.3f}")
    console.print(table)
