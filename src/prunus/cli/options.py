"""What several verbs of the command line take, and how what was typed is read."""

import json
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any

import typer

from prunus.errors import UserError

Model = Annotated[str, typer.Argument(help="A local model directory or a hub name such as org/model.")]
Out = Annotated[Path, typer.Argument(help="The directory to write: new, or begun by the same command.")]
Memory = Annotated[str | None, typer.Option(help="Bound on memory, like 4GiB; what does not fit waits on disk.")]
Trust = Annotated[bool, typer.Option("--trust-remote-code", help="Run model code that comes with the checkpoint.")]
Dtype = Annotated[str, typer.Option(help="Forward dtype: auto (measured), float32 or bfloat16.")]
BenchDtype = Annotated[str, typer.Option(help="auto (the checkpoint's own), float32 or bfloat16.")]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda.")]
Against = Annotated[str | None, typer.Option(help="The dense model to compare with.")]
Pattern = Annotated[str, typer.Option(help="0.5 | 2:4, any N:M kept | 16x16:0.8 tiles | 0.5@row, 0.5@matrix.")]
Allocation = Annotated[str, typer.Option(help="uniform, model (one threshold), owl, dlp or sensitivity.")]
Calibration = Annotated[
    list[str] | None,
    typer.Option(help="PATH | hf:NAME:split:column | self | builtin, each with =weight; repeatable."),
]
Length = Annotated[
    int | None,
    typer.Option(help="Tokens per calibration sequence. Default: 2048, or the model's maximum if that is less."),
]
Propagate = Annotated[str, typer.Option(help="sparse: later layers see pruned inputs; dense: original ones.")]
Seed = Annotated[int, typer.Option(help="Which windows of the text, and which samples of the model, calibrate.")]
Prompts = Annotated[list[str] | None, typer.Option(help="Show greedy continuations of this text; repeatable.")]
PromptFile = Annotated[str | None, typer.Option(help="Prompts: a text file, one a line, or .jsonl with 'prompt'.")]
Mixes = Annotated[
    list[str] | None,
    typer.Option(help="Prompts that come along: short, long-question, long-context (comma separated)."),
]
Concurrency = Annotated[str, typer.Option(help="Also measure so many requests at the same time, as in 1,4.")]
Page = Annotated[
    Path | None, typer.Option("--output", "-o", help="The HTML file. Default: report.html in the last run.")
]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Check all that the run would, say what it takes, and write nothing.")
]


def emit(result: Any) -> None:
    """The machine-readable end of every command."""
    print(json.dumps(result, default=str, allow_nan=False), flush=True)


def given(**values: Any) -> dict[str, Any]:
    """The settings that were given on the command line; the others are left to their defaults."""
    return {name: value for name, value in values.items() if value is not None}


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


def method_options(method: str, values: dict[str, str], polish: bool) -> dict[str, Any]:
    """Options as typed on the command line, with numbers read as numbers. Raises UserError for a vain --no-polish."""
    options: dict[str, Any] = {key: _number(value) for key, value in values.items()}
    if polish:
        return options
    if "polish" in options:
        raise UserError(f"--no-polish and --option polish={options['polish']} contradict each other; keep one of them.")
    _check_polishes(method)
    return {**options, "polish": 0}


def _check_polishes(method: str) -> None:
    from prunus.sparsity import METHODS  # here, so that `prunus --help` does not wait for torch

    polishing = [name for name, known in METHODS.items() if "polish" in {field.name for field in fields(known.options)}]
    if method in METHODS and method not in polishing:
        raise UserError(
            f"--no-polish was given, but method {method!r} never polishes; leave it out, or use it with --method "
            f"{' or '.join(polishing)}."
        )


def _number(text: str) -> Any:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return {"true": True, "false": False}.get(text.lower(), text)
