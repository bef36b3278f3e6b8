"""Prunus prunes large language models, with the evidence beside every claim.

>>> import prunus
>>> run = prunus.sparsify("org/model", "out", method="admm", pattern="2:4")
"""

import importlib
from typing import TYPE_CHECKING, Any

from prunus.registration import register

__version__ = "0.1.0"

if TYPE_CHECKING:
    from prunus.errors import UserError
    from prunus.models.whole import load
    from prunus.pipeline import run
    from prunus.result import Run
    from prunus.steps.bench import bench
    from prunus.steps.evaluate import evaluate
    from prunus.steps.export import export
    from prunus.steps.profile import profile
    from prunus.steps.quantize import quantize
    from prunus.steps.recover import recover
    from prunus.steps.report import report
    from prunus.steps.shrink import shrink
    from prunus.steps.sparsify import estimate, sparsify

# Loaded on first use, so that `prunus --help` does not wait for torch.
_HOMES = {
    "UserError": "prunus.errors",
    "Run": "prunus.result",
    "run": "prunus.pipeline",
    "bench": "prunus.steps.bench",
    "estimate": "prunus.steps.sparsify",
    "evaluate": "prunus.steps.evaluate",
    "export": "prunus.steps.export",
    "load": "prunus.models.whole",
    "profile": "prunus.steps.profile",
    "quantize": "prunus.steps.quantize",
    "recover": "prunus.steps.recover",
    "report": "prunus.steps.report",
    "shrink": "prunus.steps.shrink",
    "sparsify": "prunus.steps.sparsify",
}
__all__ = [
    "Run",
    "UserError",
    "__version__",
    "bench",
    "estimate",
    "evaluate",
    "export",
    "load",
    "profile",
    "quantize",
    "recover",
    "report",
    "run",
    "shrink",
    "sparsify",
]


register()  # so that AutoModelForCausalLM.from_pretrained opens what `prunus export --to sparse` writes


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'prunus' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
