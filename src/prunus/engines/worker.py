"""A process that runs models in an engine: the same few questions for all engines, answered by NAME_worker.py.

inside/worker_loop.py says how it talks. A worker answers `load` with `facts` (description, vocabulary, bos, ends,
chat_template), and can `tokenize`, `score`, `generate` and tell its peak `memory`; where the engine runs several
requests at the same time, it can `generate_together` as well.
"""

from pathlib import Path
from typing import Any, ClassVar

from prunus.engines.process import EngineProcess

SLOWEST = 2_000_000  # bytes a second: what converts, quantizes or loads slower hangs


class Worker(EngineProcess):
    """One engine with at most one model in it. `start`: seconds it may take before it answers its first question."""

    start: ClassVar[float] = 120.0

    def load(
        self, path: Path, *, context: int, threads: int, sequences: int = 1, timeout: float | None = None
    ) -> dict[str, Any]:
        """Load a file or directory with room for `sequences` texts of `context` tokens; returns what it made of it.

        Only an engine that runs several requests `together` is asked for more than one.
        """
        request = {"do": "load", "path": str(path), "context": context, "threads": threads}
        request |= {"sequences": sequences} if sequences > 1 else {}
        return self.ask(request, timeout=timeout or self.patience(bytes_of(path)))

    @classmethod
    def patience(cls, size: int) -> float:
        """Seconds after which work on so many bytes counts as hanging."""
        return cls.start + size / SLOWEST


def bytes_of(path: Path) -> int:
    """The size of a file, or of all files in a folder."""
    return sum(file.stat().st_size for file in (path.rglob("*") if path.is_dir() else [path]) if file.is_file())
