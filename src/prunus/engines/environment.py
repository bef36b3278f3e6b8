"""An engine's own virtual environment in the user's cache: complete, which its marker `ready` tells, or absent.

Its pins never meet those of prunus: the two talk as processes. What an engine needs of torch and transformers it
borrows from prunus's packages when it is started, so they are not installed twice.
"""

import fcntl
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

from prunus.cache import cache_dir
from prunus.checkpoint.record import write_json
from prunus.engines.engine import Engine, Installed
from prunus.errors import UserError
from prunus.progress import progress

READY = "ready"


def home_of(engine: Engine) -> Path:
    """Where an engine is installed; one folder for each Python, since compiled packages fit only theirs."""
    return cache_dir() / "engines" / f"{engine.name}-py{sys.version_info.major}.{sys.version_info.minor}"


def find(engine: Engine) -> Installed | None:
    """The installed engine, None when it is not there or its installation was interrupted."""
    if not engine.packages:
        versions = {name: metadata.version(name) for name in engine.tested}
        return Installed(Path(sys.executable), Path(sys.prefix), versions, {}, _untested(engine, versions))
    home = home_of(engine)
    if not (home / READY).is_file():
        return None
    saved = json.loads((home / READY).read_text(encoding="utf-8"))
    versions = _versions(engine, home)
    return Installed(home / "bin" / "python", home, versions, saved["facts"], _untested(engine, versions))


def require(engine: Engine) -> Installed:
    """The installed engine. Raises UserError with the command that installs it."""
    installed = find(engine)
    if installed is None:
        raise UserError(f"{engine.name} is not installed; run `prunus engines install {engine.name}` first.")
    return installed


def install(engine: Engine) -> Installed:
    """Make the engine's environment, or return the one that is there with exactly the tested versions.

    The same call again goes on where an interrupted one stopped. Raises UserError when it cannot be done here.
    """
    there = find(engine)
    if there is not None and not there.untested:
        return there
    if not engine.packages:
        raise UserError(f"{engine.name} comes with prunus itself; its version is that of your own environment.")
    engine.check()
    home = home_of(engine)
    home.mkdir(parents=True, exist_ok=True)
    with _alone(engine, home):
        (home / READY).unlink(missing_ok=True)
        _build(engine, home)
        bare = Installed(home / "bin" / "python", home, _versions(engine, home))
        write_json(home / READY, {"versions": bare.versions, "facts": engine.probe(bare)})
    return require(engine)


@contextmanager
def _alone(engine: Engine, home: Path) -> Iterator[None]:
    """Keep a second installation of the same engine out while the body runs."""
    with (home / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"another process is installing {engine.name}; wait for it.") from error
        yield


def _build(engine: Engine, home: Path) -> None:
    """The environment and its packages, one after the other; what is there already costs pip a moment."""
    pip = [str(home / "bin" / "python"), "-m", "pip", "install", "--quiet", "--no-deps", "--no-input"]
    pip += ["--disable-pip-version-check"]
    with progress(f"Installing {engine.name}", total=1 + len(engine.packages) + len(engine.apart)) as advance:
        if not (home / "bin" / "pip").exists():
            _call([sys.executable, "-m", "venv", str(home)], {}, f"the environment {home}")
        advance(1, _next(engine, 0))
        for number, pin in enumerate(engine.packages, start=1):
            _call([*pip, pin], engine.build, pin)
            advance(1, _next(engine, number))
        for pin in engine.apart:
            if _version_in(_apart(home), pin) is None:
                _call([*pip, "--target", str(_apart(home)), pin], engine.build, pin)
            advance(1)


def _next(engine: Engine, number: int) -> str:
    """What is being installed now: some of it is compiled, for minutes."""
    return [*engine.packages, *engine.apart, ""][number]


def _call(command: list[str], extra: dict[str, str], what: str) -> None:
    """Run an installer's command. What the user has set in the environment wins over `extra`."""
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={**extra, **os.environ})
    if done.returncode != 0:
        said = [line for line in (done.stderr + done.stdout).strip().splitlines() if line.strip()]
        reason = next((line for line in said if line.lower().startswith("error")), said[-1] if said else "no message")
        raise UserError(f"{what} could not be installed ({reason.strip()}); mend that and run the same command again.")


def _apart(home: Path) -> Path:
    return home / "apart"


def _folders(home: Path) -> list[str]:
    return [*map(str, home.glob("lib/python*/site-packages")), str(_apart(home))]


def _versions(engine: Engine, home: Path) -> dict[str, str]:
    """The installed version of each package, read off the environment: what stands there now, whoever put it there."""
    pins = [*engine.packages, *engine.apart]
    found = {_name(pin): next(filter(None, (_version_in(Path(f), pin) for f in _folders(home))), None) for pin in pins}
    return {name: version or "missing" for name, version in found.items()}


def _version_in(folder: Path, pin: str) -> str | None:
    found = metadata.distributions(name=_name(pin), path=[str(folder)])
    return next((one.version for one in found), None)


def _name(pin: str) -> str:
    return pin.partition("==")[0]


def _untested(engine: Engine, versions: dict[str, str]) -> tuple[str, ...]:
    """What differs from the versions that were tested. A tested version ending in `.*` leaves its last part open."""
    wanted: dict[str, Any] = engine.tested or dict(pin.split("==") for pin in (*engine.packages, *engine.apart))
    return tuple(
        f"{name} {versions[name]} (tested: {tested})"
        for name, tested in wanted.items()
        if versions[name] != tested and not (tested.endswith(".*") and versions[name].startswith(tested[:-1]))
    )
