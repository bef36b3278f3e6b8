"""What every step returns: the directory it wrote and its record."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prunus.checkpoint import read_record

# What a step's record may have, in the order in which it is told.
BRIEF = (
    "sparsity",
    "allocation",
    "axes",
    "before",
    "after",
    "method",
    "tokens",
    "tokens_per_second",
    "held_out_before",
    "held_out_after",
    "best_step",
    "stopped",
    "scheme",
    "num_zeros",
    "type",
    "file",
    "bytes",
    "layouts",
    "coverage",
    "proof",
    "seconds",
    "peak_memory_bytes",
)


@dataclass(frozen=True, slots=True)
class Run:
    """A model directory made by prunus. `reused` tells that it was already there, made by the same step.

    `steps`, of a recipe, is what each of its steps gave, in order: what the step's own command ends its output with.
    `stopped` says what was outside the recipe's envelope, where that ended it.
    """

    path: Path
    record: dict[str, Any]
    reused: bool = False
    steps: tuple[dict[str, Any], ...] = ()
    stopped: str | None = None

    @property
    def last_step(self) -> dict[str, Any]:
        step: dict[str, Any] = self.record["history"][-1]
        return step

    @classmethod
    def open(cls, path: Path, *, reused: bool = False) -> "Run":
        record = read_record(path)
        assert record is not None
        return cls(path, record, reused)

    def summary(self) -> dict[str, Any]:
        """The JSON object that ends the command's output: what the last step says of itself, in brief."""
        step = self.last_step
        told = {name: step[name] for name in BRIEF if name in step}
        return {"step": step["step"], "out": str(self.path), "reused": self.reused, **told}
