"""A directory that `prunus export` made: what its engine loads, and what is known of it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prunus.checkpoint import read_record
from prunus.engines import Engine, engine_named


@dataclass(frozen=True, slots=True)
class Exported:
    """`step` is the entry of the export in prunus.json; `load` is what the engine is given."""

    directory: Path
    engine: Engine
    step: dict[str, Any]

    @property
    def load(self) -> Path:
        return self.directory / str(self.step["file"])

    @property
    def source(self) -> Path:
        """The model directory that was exported; it may be gone by now."""
        return Path(self.step["input"]["path"])

    @property
    def target(self) -> str:
        """As `--to` takes it."""
        return f"{self.step['format']}:{self.step['type']}"


def find_exported(path: str | Path) -> Exported | None:
    """None for anything else than the directory of an export."""
    directory = Path(path)
    record = read_record(directory) if directory.is_dir() else None
    last = record["history"][-1] if record and record["history"] else {}
    if last.get("step") != "export":
        return None
    return Exported(directory, engine_named(last["engine"]["name"]), last)
