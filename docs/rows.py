"""What the scripts in benchmarks/ measured, and how a table is written."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

MEASURED = Path(__file__).parent / "measured"


def rows_of(name: str) -> list[dict[str, Any]]:
    """What a script in benchmarks/ wrote to docs/measured, a row a line."""
    return [json.loads(line) for line in (MEASURED / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]


def table(columns: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """Markdown."""
    head = list(columns)
    lines = [head, ["---"] * len(head), *([cell.replace("|", r"\|") for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
