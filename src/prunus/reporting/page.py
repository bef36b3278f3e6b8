"""`write_report`: the records become one HTML file that needs nothing but a browser."""

import os
import tempfile
from dataclasses import dataclass
from functools import cache
from itertools import count
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from prunus.errors import UserError
from prunus.reporting import tables
from prunus.reporting.benchmark_figures import benchmark_figures
from prunus.reporting.comparison_figures import comparison_figures
from prunus.reporting.figures import Figure, finite, matrix_figures, sensitivity_figures
from prunus.reporting.pareto import pareto_figures, pareto_verdicts
from prunus.reporting.record import Run, read_runs
from prunus.reporting.recovery_figures import recovery_figures
from prunus.reporting.shape_figures import shape_figures
from prunus.reporting.shapes import group_rows, shape_rows
from prunus.reporting.verdict import Card, benchmark_conditions, verdict


@dataclass(frozen=True, slots=True)
class Benchmark:
    """One benchmark: its conditions, its sentence, its numbers and its figures."""

    conditions: str
    verdict: str
    rows: tables.Rows
    parts: tables.Rows
    figures: list[Figure]


@dataclass(frozen=True, slots=True)
class Section:
    """Everything the page says of one run."""

    name: str
    cards: list[Card]
    conditions: tables.Rows
    shapes: tables.Rows
    shape_figures: list[Figure]
    groups: tables.Rows
    matrix_figures: list[Figure]
    sensitivity_figures: list[Figure]
    recovery_figures: list[Figure]
    matrices: tables.Rows
    evaluations: list[tables.Evaluation]
    continuations: list[tables.Evaluation]
    benchmarks: list[Benchmark]
    steps: list[tables.Step]


def write_report(runs: list[Path], output: Path) -> Path:
    """Write the report of the run directories to `output` and return it.

    The file is complete or absent; it loads nothing from anywhere. Raises UserError when a directory has no readable
    `prunus.json` or the output cannot be written.
    """
    html = render(read_runs(runs))
    _write_whole(output, html)
    return output


def render(runs: list[Run]) -> str:
    """The page as text."""
    sections = [_section(run) for run in runs]
    figures: dict[str, Any] = {}
    numbers = count(1)

    def place(figure: Figure) -> str:
        """Remember what to draw, and return the id of the element it is drawn in."""
        identity = f"figure-{next(numbers)}"
        figures[identity] = finite({"data": figure.data, "layout": figure.layout})
        return identity

    several = runs if len(runs) > 1 else []
    return _template().render(
        sections=sections,
        comparison=tables.comparison(several),
        comparison_figures=[*comparison_figures(several), *pareto_figures(several)],
        pareto_verdicts=pareto_verdicts(several),
        place=place,
        figures=figures,
        plotly=Markup(get_plotlyjs()),  # a script to embed, not text of a record
    )


def _section(run: Run) -> Section:
    return Section(
        name=run.name,
        cards=verdict(run),
        conditions=tables.conditions(run),
        shapes=shape_rows(run),
        shape_figures=shape_figures(run),
        groups=group_rows(run),
        matrix_figures=matrix_figures(run),
        sensitivity_figures=sensitivity_figures(run),
        recovery_figures=recovery_figures(run),
        matrices=tables.matrices(run),
        evaluations=tables.evaluations(run),
        continuations=tables.continuations(run),
        benchmarks=[
            Benchmark(
                conditions=benchmark_conditions(one),
                verdict=one.get("verdict") or "",
                rows=tables.benchmark(one),
                parts=tables.parts(one),
                figures=benchmark_figures(one),
            )
            for one in run.benchmarks
        ],
        steps=tables.steps(run),
    )


@cache
def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("report.html.jinja")


def _write_whole(output: Path, text: str) -> None:
    """Write beside the target and rename, so that a reader never sees half a page."""
    if output.is_dir():
        raise UserError(f"{output} is a directory: give a file name such as {output / 'report.html'}")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", encoding="utf-8", dir=output.parent, delete=False) as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        Path(file.name).chmod(0o644)
        Path(file.name).replace(output)
    except OSError as error:
        raise UserError(f"{output} cannot be written ({error.strerror}): give a path on a disk with room") from error
