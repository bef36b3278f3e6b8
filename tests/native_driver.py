"""The kernels as a program of its own (slow/kernels_driver.cpp): built any way a compiler can, run by anything."""

import shutil
import struct
import subprocess
import tomllib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from packed_case import bytes_of
from prunus.runtime import LAYOUTS, Packed
from prunus.runtime.attention import WIDEST
from prunus.runtime.native import INDEX, TYPES

ROOT = Path(__file__).parents[1]
DRIVER = Path(__file__).parent / "slow" / "kernels_driver.cpp"
Case = tuple[Packed, Tensor]
ATTENDING = 6  # heads at most


def sources_and_options() -> tuple[list[Path], list[str]]:
    """What pyproject.toml builds the library of, and how."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    (module,) = project["tool"]["setuptools"]["ext-modules"]
    return [ROOT / source for source in module["sources"]], [*module["extra-compile-args"], *module["extra-link-args"]]


def tool(name: str) -> str:
    """Where a program is; the test is skipped without it."""
    found = shutil.which(name)
    if found is None:
        pytest.skip(f"{name} is not installed")
    return found


def build(folder: Path, *options: str, compiler: str = "g++", name: str = "driver") -> Path:
    """The driver and the library's sources in one program, with options after the library's own."""
    sources, own = sources_and_options()
    program, native = folder / name, sources[0].parent
    command = [tool(compiler), *own, *options, f"-I{native}", *map(str, sources), str(DRIVER), "-o", str(program)]
    run(command)
    return program


def run(command: Sequence[str], timeout: float = 1800) -> str:
    """What a program printed; what it printed as an error is the failure."""
    found = subprocess.run(command, check=False, capture_output=True, text=True, timeout=timeout)
    assert found.returncode == 0, found.stdout[-2000:] + found.stderr[-6000:]
    return found.stdout


def write_cases(file: Path, cases: Iterable[Case]) -> Path:
    """Little-endian, one after another: layout, type, rows, columns, type and number of inputs; then the parts,
    each behind its size and that of an element."""
    with file.open("wb") as to:
        for packed, x_MI in cases:
            number, kind = LAYOUTS[packed.layout].number, TYPES[packed.dtype]
            to.write(struct.pack("<2i4q", number, kind, packed.rows, packed.columns, TYPES[x_MI.dtype], len(x_MI)))
            index = next((packed.parts[name] for name in INDEX if name in packed.parts), None)
            for part in (packed.parts["weight"], index, packed.parts.get("weight_start"), packed.scale_O, x_MI):
                raw = b"" if part is None else bytes_of(part).numpy().tobytes()
                to.write(struct.pack("<2q", len(raw), 1 if part is None else part.element_size()) + raw)
    return file


def is_square(packed: Packed) -> bool:
    """Whether the driver makes a whole block of it."""
    return packed.rows == packed.columns and packed.rows % 4 == 0


def read_results(file: Path, cases: Iterable[Case]) -> Iterator[list[Tensor]]:
    """Of each case: the product (M, O), the matrix (O, I) in the dtype of the inputs, attention (heads, width), and for
    a square one what comes out of a block (M, I)."""
    raw, at = bytearray(file.read_bytes()), 0
    for packed, x_MI in cases:
        found = []
        attended = (min(len(x_MI), ATTENDING), min(packed.columns, WIDEST))
        products = [(len(x_MI), packed.rows)] * (2 if is_square(packed) else 1)
        for shape in (products[0], (packed.rows, packed.columns), attended, *products[1:]):
            count = shape[0] * shape[1]
            found.append(torch.frombuffer(raw, dtype=x_MI.dtype, count=count, offset=at).view(shape))
            at += count * x_MI.element_size()
        yield found
    assert at == len(raw)
