"""What people read of engines and of what goes into them: tables on stderr, with the figures of the JSON on stdout."""

from typing import Any

from rich.markup import escape
from rich.table import Table

from prunus.engines import ENGINES, Engine, Installed, find
from prunus.progress import console, say
from prunus.result import Run


def engine_rows() -> list[dict[str, Any]]:
    """The table of engines with what is installed of them, ready for JSON."""
    return [_row(engine, find(engine)) for engine in ENGINES.values()]


def _row(engine: Engine, installed: Installed | None) -> dict[str, Any]:
    return {
        "engine": engine.name,
        "what": engine.title,
        "installed": installed is not None,
        "versions": installed.versions if installed else None,
        "untested": list(installed.untested) if installed else [],
        "takes": engine.takes,
        "gains from zeros": engine.zeros,
        "gains from smaller shapes": engine.shapes,
        "install": f"prunus engines install {engine.name}" if engine.packages else None,
    }


def show_engines(rows: list[dict[str, Any]]) -> None:
    table = Table(title="Engines", title_justify="left", show_lines=True)
    for column in ("engine", "installed", "takes", "gains from zeros", "gains from smaller shapes"):
        table.add_column(column)
    for row in rows:
        versions = "\n".join(f"{name} {version}" for name, version in (row["versions"] or {}).items())
        table.add_row(
            f"{row['engine']}\n{row['what']}",
            versions if row["installed"] else f"no: {row['install']}",
            row["takes"],
            row["gains from zeros"],
            row["gains from smaller shapes"],
        )
    console.print(table)
    for row in rows:
        say_untested(row["engine"], row["untested"])


def show_engine_fit(run: str, rows: list[dict[str, Any]]) -> None:
    table = Table(title=f"{run} in each engine", title_justify="left", show_lines=True)
    for column in ("engine", "takes it", "does not take", "gains"):
        table.add_column(column)
    for row in rows:
        cells = (
            row["engine"] if row["installed"] else f"{row['engine']}, not installed: {row['install']}",
            "\n".join(map(_taken, row["takes"])) or "no",
            "\n".join(f"{', '.join(one['as'])}: {one['why']}" for one in row["refuses"]),
            "\n".join(row["gains"]),
        )
        table.add_row(*map(escape, cells))
    console.print(table)
    say(sorted({note for row in rows for one in row["takes"] for note in one["notes"]}))


def _taken(one: dict[str, Any]) -> str:
    """A type that some matrices fall back from makes a larger file than its bits tell."""
    if "about_bytes" not in one:
        return str(one["as"])
    return f"{one['as']}, {'more than' if one['notes'] else 'about'} {one['about_bytes'] / 1e6:,.1f} MB"


def say_untested(name: str, untested: list[str] | tuple[str, ...]) -> None:
    if untested:
        say([f"{name} here is not the tested one: {', '.join(untested)}; results carry the versions."])


def show_installed(name: str, installed: Installed) -> None:
    versions = ", ".join(f"{package} {version}" for package, version in installed.versions.items())
    console.print(f"{name} is ready in {installed.home}: {versions}.", markup=False, soft_wrap=True)
    say_untested(name, installed.untested)


def show_exported(run: Run) -> None:
    """The file, and what its engine proved."""
    step = run.last_step
    proof = step["proof"]
    perplexity, greedy = proof["perplexity"], proof["greedy"]
    types = ", ".join(f"{count} {name}" for name, count in step["tensors"].items())
    console.print(
        f"{'already done: ' if run.reused else ''}{run.path / step['file']}, {step['bytes'] / 1e6:,.1f} MB "
        f"({types} tensors), {step['seconds']:.0f} s.",
        markup=False,
        soft_wrap=True,
    )
    if "coverage" in step:
        _show_packed(step["layouts"], step["coverage"])
    console.print(
        f"proved by {proof['engine']}: KL {proof['kl']:.2g} nats over {proof['positions']} positions (allowed "
        f"{proof['kl_allowed']:g}), perplexity {perplexity['engine']:.3f} (transformers "
        f"{perplexity['transformers']:.3f}), {greedy['equal']} of {greedy['new_tokens']} greedy tokens "
        f"equal before the first difference, tokenization equal  [{proof['dataset']}, {proof['windows']} windows "
        f"of {proof['window']}].",
        markup=False,
        soft_wrap=True,
    )


def _show_packed(layouts: dict[str, dict[str, int]], coverage: dict[str, float]) -> None:
    """What the matrices were packed in, and how much of a decoded token that is."""
    used = (
        f"{one['matrices']} {name}, {one['bytes'] / 1e6:,.1f} MB in place of {one['bytes_dense'] / 1e6:,.1f}"
        for name, one in layouts.items()
        if one["matrices"]
    )
    console.print(
        f"packed: {'; '.join(used)}. Of the bytes that a decoded token reads, {coverage['packed']:.0%} go through "
        f"packed matrices, {coverage['sparse']:.0%} through those that leave zeros out.",
        markup=False,
        soft_wrap=True,
    )
