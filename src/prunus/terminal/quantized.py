"""What people read of schemes and of quantized models: tables on stderr."""

from typing import Any

from rich.table import Table

from prunus.progress import console, say
from prunus.quantizing import QUANTIZERS, SCHEMES
from prunus.result import Run


def scheme_rows() -> list[dict[str, Any]]:
    """The table of schemes, ready for JSON."""
    return [
        {"scheme": s.name, "what": s.title, "format": s.storage, "loads in": s.loads_in, "when": s.when}
        for s in SCHEMES.values()
    ]


def quantizer_rows() -> list[dict[str, Any]]:
    """The table of methods, ready for JSON."""
    return [
        {"method": one.name, "paper": one.paper, "needs": list(one.needs), "cost": one.cost, "when": one.when}
        for one in QUANTIZERS.values()
    ]


def show_schemes() -> None:
    methods = "; ".join(f"{one.name}: {one.idea}" for one in QUANTIZERS.values())
    table = Table(title="Schemes of `prunus quantize`", show_lines=True, caption=methods)
    for column in ("scheme", "what", "loads in", "when to use"):
        table.add_column(column)
    for scheme in SCHEMES.values():
        table.add_row(scheme.name, scheme.title, scheme.loads_in, scheme.when)
    console.print(table)


def show_quantized(run: Run) -> None:
    """Errors by projection, bytes and zeros before and after."""
    step = run.last_step
    rows: dict[str, list[dict[str, Any]]] = {}
    for row in step["matrices"]:
        rows.setdefault(row["projection"], []).append(row)
    table = Table(title=str(run.path), title_justify="left")
    for column in ("projection", "scheme", "matrices", "zeros", "error (mean)", "error (worst)"):
        table.add_column(column)
    for projection, found in rows.items():
        errors = [row["error"] for row in found]
        zeros = sum(row["sparsity"] for row in found) / len(found)
        cells = (f"{zeros:.2%}", f"{sum(errors) / len(errors):.2g}", f"{max(errors):.2g}")
        table.add_row(projection, step["scheme"], str(len(found)), *cells)
    console.print(table)
    zeros = step["num_zeros"]
    console.print(
        f"{'already done: ' if run.reused else ''}{_sizes(step['bytes'])}; {zeros['before']:,} zeros before, "
        f"{zeros['after']:,} after; {step['seconds']:.0f} s, peak {step['peak_memory_bytes'] / 2**30:.2f} GiB.",
        markup=False,
        soft_wrap=True,
    )


def _sizes(size: dict[str, int]) -> str:
    before, after = size["before"], size["after"]
    return f"{before / 1e6:,.1f} -> {after / 1e6:,.1f} MB of weights ({after / before:.2f})"


def show_estimate(expected: dict[str, Any]) -> None:
    """What a dry run found."""
    table = Table(title="Dry run: nothing was touched", title_justify="left")
    for column in ("projection", "shape", "matrices"):
        table.add_column(column)
    for row in expected["by_projection"]:
        table.add_row(row["projection"], "x".join(map(str, row["shape"])), str(row["matrices"]))
    console.print(table)
    console.print(
        f"{expected['scheme']} by {expected['method']}: {_sizes(expected['bytes'])}; about "
        f"{expected['memory_bytes'] / 2**30:.1f} GiB of memory, "
        f"{expected['sequences_in_memory']} of {expected['sequences']} sequences waiting there between stages, the "
        "others on disk.",
        markup=False,
        soft_wrap=True,
    )
    if expected["done"]:
        say(["OUT already is the result of these settings: the run would return at once."])
