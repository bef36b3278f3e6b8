"""What is known of an engine before it is asked anything, and where an installed one lives."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prunus.engines.worker import Worker


@dataclass(frozen=True, slots=True)
class Installed:
    """An engine that can be started: its Python, the versions of its packages, and what it told when it was installed.

    `untested` says which versions differ from those that prunus was tested with; empty when none do.
    """

    python: Path
    home: Path
    versions: dict[str, str]
    facts: dict[str, Any] = field(default_factory=dict)
    untested: tuple[str, ...] = ()

    @property
    def told(self) -> str:
        """The versions of the engine itself, which its table names last."""
        return ", ".join(f"{name} {version}" for name, version in list(self.versions.items())[-2:])


@dataclass(frozen=True, slots=True, kw_only=True)
class Engine:
    """One engine: what to install for it, what it takes, and what pruning gains in it, with the reason.

    `packages` are exact pins, installed without their dependencies into an environment of its own; `apart` are pins
    that go into a folder beside it, since they would overwrite files of the others. An engine without packages is the
    transformers that prunus itself runs with. `check` is asked before an installation and raises UserError when it
    cannot work; `probe` asks the new installation what it can do, and raises when it cannot be started. `worker` starts
    a process that runs models in it. `together`: whether it runs several requests at the same time.
    """

    name: str
    title: str
    takes: str
    zeros: str
    shapes: str
    tested: dict[str, str]
    packages: tuple[str, ...] = ()
    apart: tuple[str, ...] = ()
    build: dict[str, str] = field(default_factory=dict)
    check: Callable[[], None] = lambda: None
    probe: Callable[[Installed], dict[str, Any]] = lambda _installed: {}
    worker: Callable[[Installed], Worker] | None = None
    together: bool = False

    def started(self, installed: Installed) -> Worker:
        """A fresh process of an engine that has packages of its own."""
        assert self.worker is not None, f"{self.name} runs in this process"
        return self.worker(installed)
