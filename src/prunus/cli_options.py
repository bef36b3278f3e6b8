"""What several verbs of the command line take, and how what was typed is read."""

from pathlib import Path
from typing import Annotated, Any

import typer

from prunus.errors import UserError

Model = Annotated[str, typer.Argument(help="A local model directory or a hub name such as org/model.")]
Out = Annotated[Path, typer.Argument(help="The directory to write; it must not exist yet.")]
Memory = Annotated[str | None, typer.Option(help="Bound on memory, like 4GiB; what does not fit waits on disk.")]
Trust = Annotated[bool, typer.Option("--trust-remote-code", help="Run model code that comes with the checkpoint.")]
Dtype = Annotated[str, typer.Option(help="Forward dtype: auto (measured), float32 or bfloat16.")]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda.")]
Against = Annotated[str | None, typer.Option(help="The dense model to compare with.")]


def split(values: list[str] | None) -> list[str]:
    """The parts of comma-separated values."""
    return [part for value in values or [] for part in value.split(",") if part]


def pairs(values: list[str] | None, flag: str) -> dict[str, str]:
    """KEY=VALUE texts as a mapping. Raises UserError for one without the equals sign."""
    found = {}
    for value in values or []:
        key, equals, wish = value.partition("=")
        if not equals:
            raise UserError(f"{flag} {value!r} has no '='; write it like {flag} '*.down_proj=0.3'.")
        found[key] = wish
    return found


def method_options(values: dict[str, str], polish: bool) -> dict[str, Any]:
    """Options as typed on the command line, with numbers read as numbers."""
    options: dict[str, Any] = {key: _number(value) for key, value in values.items()}
    return options if polish else {**options, "polish": 0}


def _number(text: str) -> Any:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return {"true": True, "false": False}.get(text.lower(), text)
