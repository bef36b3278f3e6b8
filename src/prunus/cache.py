"""Where prunus keeps what is costly to make again: one folder per user."""

import os
from pathlib import Path


def cache_dir() -> Path:
    """Return the cache folder, made when missing.

    `PRUNUS_CACHE` when set, else `prunus` under `XDG_CACHE_HOME`, else `~/.cache/prunus`.
    """
    chosen = os.environ.get("PRUNUS_CACHE")
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    folder = (Path(chosen) if chosen else Path(base) / "prunus").expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    return folder
