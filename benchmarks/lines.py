"""Rows of a benchmark: a line of JSON each, in a file that a later run adds to."""

import json
from pathlib import Path
from typing import Any


def rows_in(file: Path) -> list[dict[str, Any]]:
    """What has been measured; nothing where there is no file yet."""
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.exists() else []


def add(file: Path | None, row: dict[str, Any], *, show: bool = False) -> None:
    """Put a row at the end of a file, if there is to be one, and on the screen, if it is to be shown."""
    line = json.dumps(row)
    if file:
        with file.open("a", encoding="utf-8") as out:
            out.write(line + "\n")
    if show:
        print(line, flush=True)
