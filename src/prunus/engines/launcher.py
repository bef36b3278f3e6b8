"""Starts a script in an engine's environment: prunus's packages come last, and it dies with the process that asked.

Run by the engine's own Python, isolated (-I), so it imports nothing of prunus: launcher.py PACKAGES SCRIPT ARGUMENTS...
PACKAGES are folders, separated as in PATH. They come after the engine's own, so its pins win; in the Pythons that the
script starts they do too, by inside/sitecustomize.py.
"""

import ctypes
import os
import runpy
import signal
import sys
from pathlib import Path

PR_SET_PDEATHSIG = 1  # prctl(2)


def main() -> None:
    """Run the script as __main__."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    packages, script, *arguments = sys.argv[1:]
    if (folder := Path(script).parent) != Path(__file__).parent:
        sys.path.insert(0, str(folder))  # an engine's own script finds what lies beside it
    inside = Path(__file__).with_name("inside")
    sys.path += [str(inside), *packages.split(os.pathsep)]
    os.environ["PYTHONPATH"], os.environ["PRUNUS_PACKAGES"] = str(inside), packages
    sys.argv = [script, *arguments]
    runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    main()
