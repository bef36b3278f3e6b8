"""`prunus.shrink` along layers alone, for tests that know of no other axis."""

from pathlib import Path
from typing import Any

from prunus.result import Run
from prunus.steps.shrink import shrink


def remove_layers(model: Path, out: Path, *, score: str = "angular", **settings: Any) -> Run:
    """`score` is that of layers."""
    return shrink(model, out, layer_score=score, **settings)
