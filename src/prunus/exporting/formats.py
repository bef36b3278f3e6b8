"""The formats that models are exported to: one file for how each is written, one line for each in the table."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prunus.checkpoint import Checkpoint
from prunus.engines import Engine, Installed
from prunus.exporting.types import FileType
from prunus.models import StreamedModel


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversion:
    """One model on its way into a folder: `stem` names the file, `timeout` is seconds for each thing asked."""

    checkpoint: Checkpoint
    kind: FileType
    installed: Installed
    folder: Path
    stem: str
    timeout: float


def by_bits(model: StreamedModel, kind: FileType) -> int:
    """The bytes of a model whose weights all are of one type."""
    return int(model.checkpoint.num_parameters * kind.bits / 8)


@dataclass(frozen=True, slots=True, kw_only=True)
class Format:
    """One format. `check` gives notes, or raises UserError, from a model's skeleton; `write` returns what the engine
    loads; `describe` counts its parameters, its tensors by type, and the bytes that one decoded token reads; `size`
    says how many bytes will be written.
    """

    name: str
    engine: Engine
    types: Mapping[str, FileType]
    default: str
    check: Callable[[StreamedModel, FileType], list[str]]
    write: Callable[[Conversion], Path]
    describe: Callable[[Path], dict[str, Any]]
    size: Callable[[StreamedModel, FileType], int] = by_bits


@dataclass(frozen=True, slots=True)
class Target:
    """What `--to` names: a format and one of its types."""

    format: Format
    kind: FileType
