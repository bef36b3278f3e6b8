"""From the source distribution, with a compiler and without one. No network: what building needs has to be there."""

import os
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

from native_driver import ROOT, run, tool

pytestmark = pytest.mark.slow

pytest.importorskip("setuptools", minversion="77", reason="setuptools 77 is what builds prunus")
pytest.importorskip("pip")

OFFLINE = ("--quiet", "--no-deps", "--no-index", "--no-build-isolation")
PRODUCT = """
import sys, warnings
import torch
import prunus
from prunus.runtime import pack, unpack
from prunus.runtime.multiply import Multiplier
from prunus.runtime.native import library_file
assert prunus.__file__.startswith(sys.argv[1]), prunus.__file__
assert (library_file() is not None) == (sys.argv[2] == "compiler")
weight_OI = torch.randn(40, 72) * (torch.rand(40, 72) < 0.5)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    packed = pack(weight_OI, "bitmask", torch.bfloat16)
    x_MI = torch.randn(3, 72)
    torch.testing.assert_close(Multiplier(packed)(x_MI), x_MI @ unpack(packed).float().T)
print(*(one.message for one in caught))
"""


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Made from a copy of what git knows, so that nothing built here gets into it."""
    folder = tmp_path_factory.mktemp("source")
    for name in run([tool("git"), "-C", str(ROOT), "ls-files", "--cached", "-z"]).split("\0"):
        if name and (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes((ROOT / name).read_bytes())
    code = "from setuptools.build_meta import build_sdist; build_sdist('dist')"
    subprocess.run([sys.executable, "-c", code], cwd=folder, check=True, capture_output=True)
    (found,) = (folder / "dist").iterdir()
    return found


def _installed(sdist: Path, target: Path, **environment: str) -> str:
    """What a product says in a process that finds prunus in `target`, installed there."""
    command = [sys.executable, "-m", "pip", "install", *OFFLINE, "--target", str(target), str(sdist)]
    subprocess.run(command, check=True, capture_output=True, env=os.environ | environment)
    kind = "none" if "CXX" in environment else "compiler"
    command = [sys.executable, "-c", PRODUCT, str(target), kind]
    found = subprocess.run(
        command, check=False, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(target)}
    )
    assert found.returncode == 0, found.stderr
    return found.stdout


def test_the_wheel_has_the_kernels_and_says_for_whom_it_is(sdist: Path, tmp_path: Path) -> None:
    tool("g++")
    run([sys.executable, "-m", "pip", "wheel", *OFFLINE, "--wheel-dir", str(tmp_path), str(sdist)])
    (wheel,) = tmp_path.glob("*.whl")
    platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
    assert wheel.name.endswith(f"-cp311-abi3-{platform}.whl")
    assert "prunus/runtime/_kernels.abi3.so" in zipfile.ZipFile(wheel).namelist()


def test_installed_with_a_compiler(sdist: Path, tmp_path: Path) -> None:
    tool("g++")
    assert _installed(sdist, tmp_path).strip() == ""


def test_installed_without_a_compiler_the_reference_runs_and_says_so(sdist: Path, tmp_path: Path) -> None:
    assert "no C++ compiler" in _installed(sdist, tmp_path, CC="/bin/false", CXX="/bin/false")
