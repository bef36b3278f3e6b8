"""The machine and the software a number was measured on. Every record carries it."""

import os
import platform
import subprocess
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil
import torch


def machine() -> dict[str, Any]:
    """Describe this machine and the packages that decide a measurement.

    What does not exist here (a GPU, a git checkout) is None. `cores` are physical, `threads` logical.
    """
    return {
        "cpu": cpu_name(),
        "cores": psutil.cpu_count(logical=False),
        "threads": os.cpu_count(),
        "memory_bytes": psutil.virtual_memory().total,
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "os": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "prunus": version("prunus"),
        "commit": _commit(Path(__file__).parents[3]),
    }


def cpu_name() -> str:
    """The processor's name from /proc/cpuinfo, or what the platform calls it where that file does not say."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _commit(checkout: Path) -> str | None:
    """The commit of the source checkout, "-dirty" when files differ from it; None for an installed package."""
    if not (checkout / ".git").exists():
        return None
    command = ["git", "-C", str(checkout), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def peak_resident_bytes() -> int | None:
    """Peak resident memory of this process so far, bytes; None where the platform does not tell."""
    status = Path("/proc/self/status")
    if not status.exists():
        return None
    return next(int(line.split()[1]) * 1024 for line in status.read_text().splitlines() if line.startswith("VmHWM:"))


def reset_peak_resident() -> None:
    """Let `peak_resident_bytes` count from here, where the platform can: else it stays that of the whole process."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
