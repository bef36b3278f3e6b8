"""Lets transformers open packed models once prunus is imported, before or after transformers, and costs no import.

transformers keeps its ways to store weights in a table of one module, and knows no plugins. So where that module is not
there yet, its import is waited for.
"""

import importlib
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

TABLE = "transformers.quantizers.auto"  # the module that holds the table
OURS = "prunus.runtime.quantizer"  # the one that adds a line to it


def register() -> None:
    """Now, where transformers has its table already; else right after it is made."""
    if TABLE in sys.modules:
        importlib.import_module(OURS)
    elif not any(isinstance(finder, _AfterTable) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterTable())


class _AfterTable:
    """Finds that module alone, as Python itself would, and adds our line when its code has run."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != TABLE:
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            run = spec.loader.exec_module

            def run_and_register(module: ModuleType) -> None:
                run(module)
                sys.meta_path.remove(self)
                importlib.import_module(OURS)

            spec.loader.exec_module = run_and_register  # type: ignore[method-assign]
        return spec
