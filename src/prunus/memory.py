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
