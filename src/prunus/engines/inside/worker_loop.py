"""How a worker talks: one JSON request a line on stdin, one answer a line on stdout, until its input ends.

Every request names what to `do`; the answers are the dictionaries that the worker's functions return, or
{"error": sentence}. Times are seconds, sizes bytes.
"""

import json
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any


def serve(
    load: Callable[[dict[str, Any]], Any], do: dict[str, Callable[[Any, dict[str, Any]], dict[str, Any]]]
) -> None:
    """Answer until the input ends. `load` makes what the functions of `do` get first: None before it was asked.

    Loading is answered with what `facts` says of the loaded model.
    """
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print goes to stderr, so that answers stay alone
    model = None
    for line in sys.stdin:
        request = json.loads(line)
        try:
            if request["do"] == "load":
                model = load(request)
                answer = do["facts"](model, request)
            else:
                answer = do[request["do"]](model, request)
        except (ValueError, OSError, MemoryError) as error:
            answer = {"error": str(error) or type(error).__name__}
        except Exception as error:  # whatever else an engine raises is told as well, and shown where it happened
            traceback.print_exc()
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=answers, flush=True)


def memory(_model: Any, _request: dict[str, Any]) -> dict[str, Any]:
    """The peak resident memory of this process, mapped weights included, and of those it has started and that live.

    None where the platform does not tell.
    """
    if not Path("/proc/self/status").exists():
        return {"peak_memory_bytes": None}
    return {"peak_memory_bytes": sum(map(_peak, [os.getpid(), *_descendants(os.getpid())]))}


def _peak(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:  # it has ended meanwhile
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")), 0)


def _descendants(pid: int) -> list[int]:
    files = Path(f"/proc/{pid}/task").glob("*/children")
    children = [int(child) for file in files for child in file.read_text().split()]
    return [*children, *(below for child in children for below in _descendants(child))]
