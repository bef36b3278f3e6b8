"""Programs that play an engine: each a script for `EngineProcess`, written where a test wants it."""

import json
import sys
from pathlib import Path
from typing import Any

from prunus.engines.engine import Engine
from prunus.engines.environment import READY, home_of

ANSWERS = """
import json, os, signal, subprocess, sys, time
for line in sys.stdin:
    request = json.loads(line)
    do = request["do"]
    if do == "crash":
        print("loading", "tensor 7 is torn", sep="\\n", file=sys.stderr, flush=True)
        os.kill(os.getpid(), signal.SIGSEGV)
    if do == "hang":
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        print(f"child {child.pid}", file=sys.stderr, flush=True)
        time.sleep(600)
    answer = {"garbage": "ggml 3 4 5", "fail": json.dumps({"error": "no such file"})}.get(do)
    print(answer or json.dumps({"did": do, "paths": sys.path, "me": os.getpid()}), flush=True)
"""


def fake_install(engine: Engine, **facts: Any) -> Path:
    """Make it look installed, in the cache of PRUNUS_CACHE, with this Python as its own; returns its home."""
    home = home_of(engine)
    (home / "bin").mkdir(parents=True)
    (home / "bin" / "python").symlink_to(sys.executable)
    say_ready(home, **facts)
    return home


def say_ready(home: Path, **facts: Any) -> None:
    """What the probe of that installation found."""
    (home / READY).write_text(json.dumps({"versions": {}, "facts": facts}))


def write_script(folder: Path, text: str = ANSWERS) -> Path:
    script = folder / "script.py"
    script.write_text(text)
    return script
