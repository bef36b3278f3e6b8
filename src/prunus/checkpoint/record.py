"""`prunus.json`: the birth certificate of a model directory.

{"format": 1, "prunus": version,
 "history": [one entry per step, oldest first: settings, input hash, environment, seconds, memory, matrices],
 "sensitivity": [...], "evaluations": [...], "benchmarks": [...]}
"""

import json
import os
from pathlib import Path
from typing import Any, Literal

from prunus.errors import UserError

RECORD_NAME = "prunus.json"
FORMAT = 1

Record = dict[str, Any]


def new_record(version: str) -> Record:
    """An empty record, for a directory that prunus is about to write."""
    return {"format": FORMAT, "prunus": version, "history": [], "evaluations": [], "benchmarks": []}


def read_record(directory: Path) -> Record | None:
    """Return the record of a directory, None when it has none. Raises UserError when it cannot be understood."""
    file = directory / RECORD_NAME
    if not file.is_file():
        return None
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{file} is damaged ({error}); restore it or make the run again.") from error
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        raise UserError(f"{file} is not a record of format {FORMAT}; it was made by another version of prunus.")
    return record


def write_json(file: Path, content: Any) -> None:
    """Write JSON so that the file is always whole: the old content or the new one."""
    temporary = file.with_name(file.name + ".tmp")
    with temporary.open("w", encoding="utf-8") as stream:
        json.dump(content, stream, indent=1, allow_nan=False)
        stream.write("\n")
        stream.flush()
        os.fsync(stream.fileno())
    temporary.replace(file)


def add_to_record(
    directory: Path, section: Literal["evaluations", "benchmarks", "sensitivity"], entries: list[dict[str, Any]]
) -> None:
    """Append results to the record of a directory that has one; a foreign directory is left untouched."""
    record = read_record(directory)
    if record is not None:
        record.setdefault(section, []).extend(entries)
        write_json(directory / RECORD_NAME, record)
