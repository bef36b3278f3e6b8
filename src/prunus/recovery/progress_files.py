"""What an interrupted training goes on from: weights and Adam's moments as safetensors, everything else as JSON.

Weights and moments of a step are written first, then the progress that names them, then older ones are removed: at any
moment the progress names files that are whole.
"""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from prunus.checkpoint.output import TRAINING, write_tensors

METRICS_NAME = "metrics.jsonl"

Tensors = dict[str, Tensor]


@dataclass
class Progress:
    """How far a training has come. `best` is the lowest held-out loss so far; `worse` counts evaluations since."""

    step: int = 0
    best: float | None = None
    best_step: int = 0
    worse: int = 0
    stopped: str | None = None
    seconds: float = 0.0
    train_seconds: float = 0.0
    peak_memory_bytes: int = 0
    dtype: str = ""
    evaluations: list[dict[str, Any]] = field(default_factory=list)
    curve: list[dict[str, float]] = field(default_factory=list)
    parts: dict[str, float] = field(default_factory=dict)


class ProgressFiles:
    """The files in `folder`; `save_progress` makes the JSON durable, and is None in a process that only reads."""

    def __init__(self, folder: Path, save_progress: Callable[[dict[str, Any]], None] | None) -> None:
        self.folder, self._save_progress = folder, save_progress

    def save(self, progress: Progress, weights: Tensors, moments: Tensors) -> None:
        """Keep this step, and the best one."""
        if self._save_progress is None:
            return
        write_tensors(self._weights(progress.step), weights)
        write_tensors(self._moments(progress.step), moments)
        self._save_progress(asdict(progress))
        kept = {self._weights(progress.step), self._moments(progress.step), self._weights(progress.best_step)}
        for file in self.folder.glob(f"{TRAINING}-*"):
            if file not in kept:
                file.unlink()

    def weights(self, step: int) -> Tensors:
        return load_file(self._weights(step))

    def moments(self, step: int) -> Tensors:
        return load_file(self._moments(step))

    def _weights(self, step: int) -> Path:
        return self.folder / f"{TRAINING}-weights-{step:08d}.safetensors"

    def _moments(self, step: int) -> Path:
        return self.folder / f"{TRAINING}-moments-{step:08d}.safetensors"


class Metrics:
    """One JSON object a line, for each step and each evaluation; `also` hands them on (TensorBoard)."""

    def __init__(self, folder: Path, *, resumed_at: int, writes: bool, also: Callable[[dict[str, Any]], None]) -> None:
        self._file, self._writes, self._also = folder / METRICS_NAME, writes, also
        if writes and self._file.exists():  # what a killed run had written beyond the step that is gone on from
            lines = self._file.read_text(encoding="utf-8").splitlines(keepends=True)
            kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= resumed_at]
            self._file.write_text("".join(kept), encoding="utf-8")

    def write(self, row: dict[str, Any]) -> None:
        if self._writes:
            with self._file.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(row) + "\n")
            self._also(row)
