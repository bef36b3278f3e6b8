"""`prunus.report`: one page that shows what runs are worth."""

from collections.abc import Sequence
from pathlib import Path

from prunus.checkpoint import read_record
from prunus.errors import UserError
from prunus.reporting import write_report


def report(runs: Sequence[str | Path], output: str | Path | None = None) -> Path:
    """Write a self-contained HTML page about one or more runs and return its path.

    `output` defaults to `report.html` inside the last run. Raises UserError for a directory without a record.
    """
    paths = [Path(run) for run in runs]
    if not paths:
        raise UserError("no runs to report on; give at least one directory that prunus made.")
    for path in paths:
        if read_record(path) is None:
            raise UserError(f"{path} has no prunus.json; give a directory that prunus made.")
    return write_report(paths, Path(output) if output else paths[-1] / "report.html")
