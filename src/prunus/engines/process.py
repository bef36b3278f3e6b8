"""A process of an engine: asked line by line, never waited for without end, and gone when prunus is.

One JSON object a line goes in at stdin, one comes back at stdout; no port is opened. The process leads a group of its
own, which is killed whole. What it says on stderr is kept, and its last lines are shown when it fails.
"""

import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from prunus.errors import EngineError

LAUNCHER = Path(__file__).with_name("launcher.py")
LAST_LINES = 12
GRACE = 5.0  # seconds to end by itself once its input has ended


class EngineProcess:
    """Use as a context manager: nothing of the process is left behind, whatever happens inside."""

    def __init__(self, python: Path, script: Path, arguments: Sequence[str] = (), *, name: str) -> None:
        self.name = name
        command = [str(python), "-I", str(LAUNCHER), os.pathsep.join(own_packages()), str(script), *arguments]
        self._said = tempfile.TemporaryFile()  # noqa: SIM115 it lives as long as the process
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._said,
            text=True,
            encoding="utf-8",
            errors="replace",
            start_new_session=True,
        )
        self._lines: queue.Queue[str | None] = queue.Queue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._lines.put(line)
        self._lines.put(None)  # the end

    def ask(self, request: dict[str, Any], *, timeout: float) -> dict[str, Any]:
        """Send one request and return its answer. EngineError when none comes within `timeout` seconds."""
        what = str(request["do"])
        self._send(request)
        answer = _parsed(line := self._next(what, timeout))
        if answer is None:
            raise self._failed(f"answered {what!r} with what is no answer: {line.strip()[:200]!r}")
        if "error" in answer:
            raise self._failed(f"failed to {what}: {answer['error']}")
        return answer

    def run_to_end(self, what: str, *, timeout: float) -> str:
        """Wait until the program has ended and return what it printed. EngineError when it fails or takes longer."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            code = self._process.wait(timeout)
        except subprocess.TimeoutExpired as error:
            raise self._failed(f"had not finished to {what} after {timeout:.0f} s") from error
        if code != 0:
            raise self._failed(f"failed to {what}", by_itself=True)
        return "".join(iter(lambda: self._lines.get() or "", ""))

    def _send(self, request: dict[str, Any]) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        except OSError as error:
            raise self._failed(f"was gone when asked to {request['do']}") from error

    def _next(self, what: str, timeout: float) -> str:
        try:
            line = self._lines.get(timeout=timeout)
        except queue.Empty as error:
            raise self._failed(f"had not finished to {what} after {timeout:.0f} s") from error
        if line is None:
            raise self._failed(f"died while asked to {what}", by_itself=True)
        return line

    def _failed(self, what: str, *, by_itself: bool = False) -> EngineError:
        """Stop the process; the error carries what it said last and, where it ended `by_itself`, the signal."""
        code = self._stop(GRACE if by_itself else 0)
        lines = self.said().strip().splitlines()[-LAST_LINES:]
        ended = f" (signal {signal.Signals(-code).name})" if code is not None and code < 0 else ""
        said = "; it said last:\n  " + "\n  ".join(lines) if lines else "; it said nothing"
        return EngineError(f"{self.name} {what}{ended}{said}")

    def said(self) -> str:
        """All that the process wrote on stderr so far."""
        self._said.seek(0)
        return self._said.read().decode(errors="replace")

    def _stop(self, grace: float) -> int | None:
        """Kill the whole group; returns the exit code where the process had ended by itself within `grace` seconds."""
        code = None
        with suppress(subprocess.TimeoutExpired):
            code = self._process.wait(grace)
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)  # its children too, when it has ended itself
        self._process.wait()
        return code

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, _type: type[BaseException] | None, _error: BaseException | None, _traceback: TracebackType | None
    ) -> None:
        assert self._process.stdin is not None
        with suppress(OSError):  # it was gone already
            self._process.stdin.close()
        self._stop(0 if _type else GRACE)
        self._reader.join()
        assert self._process.stdout is not None
        self._process.stdout.close()
        self._said.close()


def own_packages() -> list[str]:
    """The folders of packages that prunus itself runs with: an engine borrows torch and transformers from there."""
    return [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]


def _parsed(line: str) -> dict[str, Any] | None:
    try:
        answer = json.loads(line)
    except ValueError:
        return None
    return answer if isinstance(answer, dict) else None
