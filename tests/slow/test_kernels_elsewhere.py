"""The kernels under what finds mistakes that results do not show, and on the processors that are not here.

The library's own sources become a program (native_driver.py) that reads matrices from a file and gives each part memory
of exactly its size, so that a byte read behind a part is seen.
"""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from native_driver import ATTENDING, Case, build, read_results, run, sources_and_options, tool, write_cases
from packed_case import CASES, expected, inputs, packed_case
from prunus.runtime import Packed, unpack
from prunus.runtime.attention import WIDEST
from prunus.runtime.multiply import FEW

pytestmark = pytest.mark.slow

SHAPES = ((1, 1), (16, 64), (17, 65), (33, 3), (15, 130), (50, 200), (20, 20))
STRICT = ("-Wall", "-Wextra", "-Werror")


@pytest.fixture(scope="module")
def cases() -> list[Case]:
    """Every layout, type and kind of input; shapes, sparsities and batches as they come."""
    found = []
    for layout, kind in CASES:
        for index, shape in enumerate(SHAPES):
            packed = packed_case(layout, kind, *shape, (0.0, 0.5, 0.9, 1.0)[index % 4])
            for batch, dtype in ((1, torch.bfloat16), (1, torch.float32), (3, torch.float32), (21, torch.bfloat16)):
                found.append((packed, inputs(batch, packed.columns, dtype)))
    return found


@pytest.fixture(scope="module")
def file(cases: list[Case], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_cases(tmp_path_factory.mktemp("cases") / "cases", cases)


def _check(out: Path, level: str, cases: list[Case]) -> None:
    """Results of a level, against float64; expanded matrices have to be exact."""
    results = read_results(Path(f"{out}.{level}"), cases)
    for (packed, x_MI), (y_MO, weight_OI, attended_HW, *stepped) in zip(cases, results, strict=True):
        y64_MO, off_MO = (torch.cat(each) for each in zip(*_by_few(packed, x_MI), strict=True))
        assert ((y_MO.double() - y64_MO).abs() <= off_MO).all(), (level, packed.layout, packed.rows, packed.columns)
        assert torch.equal(weight_OI, unpack(packed).to(x_MI.dtype)), (level, packed.layout)
        assert torch.allclose(attended_HW, _attended(x_MI), rtol=1e-2 if x_MI.dtype == torch.bfloat16 else 1e-4), level
        exact = packed.scale_O is None and x_MI.dtype == torch.float32
        for found_MI in stepped:
            off, size = (found_MI - _stepped(packed, x_MI)).norm(), found_MI.double().norm()
            assert off <= (1e-5 if exact else 0.05) * size, (level, packed.layout, float(off / size))


def _attended(x_MI: Tensor) -> Tensor:
    """What the driver asks for: the inputs as keys and values, the first few also as the heads of a query."""
    key_TW = x_MI[:, :WIDEST].double()
    score_HT = key_TW[:ATTENDING] @ key_TW.T / 4
    score_HT[:, 1::3] = -torch.inf
    return (score_HT.softmax(-1) @ key_TW).to(x_MI.dtype)


def _stepped(packed: Packed, x_MI: Tensor) -> Tensor:
    """What the driver has a block make of the inputs, in float64."""
    weight_OI, x_MI = unpack(packed).double(), x_MI.double()
    weight_I, half = x_MI[0], x_MI.shape[1] // 2
    cos, sin = (one.unsqueeze(1) for one in x_MI.split(half, 1))
    normed_MI = _norm(x_MI, weight_I, 1e-5) @ weight_OI.T
    query = _norm((normed_MI + weight_I).unflatten(1, (2, half)), weight_I[:half], 1e-6)
    query_MI, key_MI = (_turned(one, cos, sin).flatten(1) for one in (query, normed_MI.unflatten(1, (2, half))))
    after_MI = key_MI + query_MI @ weight_OI.T
    inner_MI = _norm(after_MI, weight_I, 1e-5) @ weight_OI.T
    gated_MI = torch.nn.functional.silu(inner_MI + weight_I) * inner_MI
    return after_MI + gated_MI @ weight_OI.T + weight_I


def _norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + epsilon).sqrt() * weight


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat([-second, first], -1) * sin


def _by_few(packed: Packed, x_MI: Tensor) -> list[tuple[Tensor, Tensor]]:
    """The driver calls the kernels for any number of inputs; Python would not for so many at once."""
    return [expected(packed, part_MI, native=True) for part_MI in x_MI.split(FEW)]


def _run_all(program: Path, file: Path, out: Path, cases: list[Case], *before: str) -> list[str]:
    levels = run([*before, str(program), str(file), str(out)]).split()
    for level in levels:
        _check(out, level, cases)
    return levels


def test_as_it_is_built_with_nothing_to_touch_behind_a_part(tmp_path: Path, file: Path, cases: list[Case]) -> None:
    """And the compiler has nothing to say of any source."""
    program = build(tmp_path, "-O3", *STRICT, "-DGUARDED")
    assert "portable" in _run_all(program, file, tmp_path / "out", cases)


def test_nothing_of_an_instruction_set_runs_unasked(tmp_path: Path) -> None:
    """Of a function that several files define inline, one is linked: it could be that for a processor not here. And
    what sets up a file's variables runs on every processor that loads the library.
    """
    own = [source for source in sources_and_options()[0] if "PRUNUS_TARGET" in source.read_text()]
    assert own
    for source in own:
        run([tool("g++"), *sources_and_options()[1], "-O0", "-c", str(source), "-o", str(tmp_path / "one.o")])
        symbols = run([tool("nm"), "-C", "--defined-only", str(tmp_path / "one.o")]).splitlines()
        assert not [line for line in symbols if line.split(maxsplit=2)[1] in "WVu" or "_GLOBAL__" in line], source


def test_address_and_undefined_behaviour_sanitizers(tmp_path: Path, file: Path, cases: list[Case]) -> None:
    checks = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer")
    program = build(tmp_path, "-O1", "-g", *checks)
    assert "portable" in _run_all(program, file, tmp_path / "out", cases)
    run([str(program), str(file), "--hammer"])


def test_threads_under_the_thread_sanitizer(tmp_path: Path, file: Path) -> None:
    """With threads of the library's own: those of OpenMP are not the sanitizer's, and it would see races in them."""
    run([str(build(tmp_path, "-O1", "-g", "-fsanitize=thread")), str(file), "--hammer"], timeout=900)


def test_valgrind_and_the_processor_that_it_plays(tmp_path: Path, file: Path, cases: list[Case]) -> None:
    command = [tool("valgrind"), "--quiet", "--error-exitcode=1", "--leak-check=full", "--show-leak-kinds=definite"]
    levels = _run_all(build(tmp_path, "-O2", "-g"), file, tmp_path / "out", cases, *command)
    assert levels == ["avx2", "portable"]


def test_aarch64(tmp_path: Path, file: Path, cases: list[Case]) -> None:
    """int8 results are those of this processor to the bit; floats are summed in another order."""
    emulator = tool("qemu-aarch64")
    there = build(tmp_path, "-O3", "-static", *STRICT, compiler="aarch64-linux-gnu-g++", name="there")
    run([str(build(tmp_path, "-O3", name="here")), str(file), str(tmp_path / "out"), "portable"])
    wanted = list(read_results(tmp_path / "out.portable", cases))
    for processor in ("cortex-a53", "max"):  # the second has products of bytes
        out = tmp_path / processor
        for level in _run_all(there, file, out, cases, emulator, "-cpu", processor):
            results = zip(cases, read_results(Path(f"{out}.{level}"), cases), wanted, strict=True)
            for (packed, _), (y_MO, *_), (wanted_MO, *_) in results:
                assert packed.scale_O is None or torch.equal(y_MO, wanted_MO), level
