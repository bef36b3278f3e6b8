"""What people read of schemes and of quantized models: tables on stderr."""

from typing import Any

from rich.table import Table

from prunus.progress import console
from prunus.quantizing import QUANTIZERS, SCHEMES
from prunus.result import Run


def scheme_rows() -> list[dict[str, Any]]:
    """The table of schemes, ready for JSON."""
    return [
        {"scheme": s.name, "what": s.title, "format": s.storage, "loads in": s.loads_in, "when": s.when}
        for s in SCHEMES.values()
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
    size, zeros = step["bytes"], step["num_zeros"]
    console.print(
        f"{'already done: ' if run.reused else ''}{size['before'] / 1e6:,.1f} -> {size['after'] / 1e6:,.1f} MB of "
        f"weights ({size['after'] / size['before']:.2f}); {zeros['before']:,} zeros before, {zeros['after']:,} after; "
        f"{step['seconds']:.0f} s, peak {step['peak_memory_bytes'] / 2**30:.2f} GiB.",
        markup=False,
        soft_wrap=True,
    )
