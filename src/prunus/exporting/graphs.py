"""Engines that keep a model as a graph of their own: a process of theirs writes it, and counts what it holds."""

from pathlib import Path
from typing import Any

from prunus.engines.worker import Worker
from prunus.exporting.formats import Conversion


def convert(worker: Worker, job: Conversion, kind: str) -> Path:
    """Write the graph, its weights of a `kind` as the engine calls it, into a folder of its own."""
    checkpoint, folder = job.checkpoint, job.folder / "model"
    request = {"source": str(checkpoint.path), "target": str(folder), "trust": checkpoint.trust_remote_code}
    with worker:
        worker.ask({"do": "convert", "type": kind, **request}, timeout=job.timeout)
    return folder


def contents(worker: Worker, folder: Path) -> dict[str, Any]:
    """What the folder holds, as `Format.describe` tells it."""
    with worker:
        return worker.ask({"do": "contents", "path": str(folder)}, timeout=worker.start)
