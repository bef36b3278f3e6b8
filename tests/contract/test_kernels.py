"""Every instruction set of this processor, and the reference, on every layout and type: against float64."""

import ctypes
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fresh_process import run_fresh
from packed_case import CASES, DTYPES, SHAPES, all_packed, all_products, bytes_of, inputs, packed_case
from prunus.errors import UserError
from prunus.runtime import LAYOUTS, multiply, native, unpack
from prunus.runtime.multiply import Multiplier, multiply_together
from prunus.runtime.native import INDEX, Kernels, described, kernels, library_file

BUILT = library_file() is not None
NATIVE = kernels().levels if BUILT else []  # type: ignore[union-attr]
LEVELS = [*NATIVE, "reference"]
needs_kernels = pytest.mark.skipif(not BUILT, reason="prunus was installed without its kernels: no C++ compiler")
each_case = pytest.mark.parametrize(("layout", "kind"), CASES, ids=["-".join(case) for case in CASES])


@pytest.fixture(autouse=True)
def _one_thread_and_the_best_level() -> Iterator[None]:
    threads, level = torch.get_num_threads(), NATIVE[0] if NATIVE else None
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    if level:
        _native().use_level(level)


def _native() -> Kernels:
    native = kernels()
    assert native is not None
    return native


def _use(level: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if level == "reference":
        monkeypatch.setattr(multiply, "kernels", lambda: None)
    else:
        _native().use_level(level)


def _assert_close(y_MO: Tensor, y64_MO: Tensor, off_MO: Tensor, about: str) -> None:
    worst = ((y_MO.double() - y64_MO).abs() - off_MO).max().item()
    assert worst <= 0, f"{about}: {worst:.3g} further off than its arithmetic allows"


@pytest.mark.parametrize("level", LEVELS)
@each_case
def test_products_against_float64(level: str, layout: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _use(level, monkeypatch)
    for packed, x_MI, y64_MO, off_MO in all_products(layout, kind, native=level != "reference"):
        y_MO = Multiplier(packed)(x_MI)
        assert y_MO.dtype == x_MI.dtype
        about = f"{packed.rows}x{packed.columns}, batch {len(x_MI)}, {x_MI.dtype}"
        _assert_close(y_MO, y64_MO, off_MO, about)


@needs_kernels
@pytest.mark.parametrize("level", NATIVE)
@each_case
def test_expanded_rows_are_the_unpacked_matrix(level: str, layout: str, kind: str) -> None:
    _native().use_level(level)
    for packed in all_packed(layout, kind):
        matrix, weight_OI = described(packed, LAYOUTS[layout]), unpack(packed)
        for dtype in DTYPES:
            out_OI = torch.full((packed.rows, packed.columns), torch.nan, dtype=dtype)
            _native().expand(matrix, 0, out_OI)
            assert torch.equal(out_OI, weight_OI.to(dtype))
        if packed.rows > 16:
            out_OI = torch.full((packed.rows - 16, packed.columns), torch.nan)
            _native().expand(matrix, 1, out_OI)
            assert torch.equal(out_OI, weight_OI[16:].float())


@needs_kernels
@pytest.mark.parametrize("layout", LAYOUTS)
def test_int8_results_are_equal_to_the_bit_on_every_level_and_in_every_batch(layout: str) -> None:
    for packed in all_packed(layout, "int8"):
        multiplier, x_MI = Multiplier(packed), inputs(16, packed.columns, torch.float32)
        _native().use_level("portable")
        y_MO = multiplier(x_MI)
        for level in NATIVE:
            _native().use_level(level)
            assert torch.equal(multiplier(x_MI), y_MO), level
            for batch in (1, 2, 3, 11):
                assert torch.equal(multiplier(x_MI[:batch]), y_MO[:batch]), f"{level}, batch {batch}"


@needs_kernels
@pytest.mark.parametrize("level", NATIVE)
@each_case
def test_results_do_not_depend_on_threads(level: str, layout: str, kind: str) -> None:
    _native().use_level(level)
    packed = packed_case(layout, kind, 200, 132, 0.5)
    for batch in (1, 3, 16):
        x_MI = inputs(batch, packed.columns, torch.float32)
        found = []
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            found.append(Multiplier(packed)(x_MI))
        assert torch.equal(found[0], found[1])
        assert torch.equal(found[0], found[2])


@pytest.mark.parametrize("level", LEVELS)
def test_several_matrices_together_are_each_of_them_alone(level: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _use(level, monkeypatch)
    several = [Multiplier(packed_case(*case, rows, 132, 0.5)) for rows, case in enumerate(CASES, 15)]
    of_a_type = [one for one in several if one.packed.dtype == torch.int8]
    for batch, together in ((1, several), (5, several), (16, several), (17, of_a_type)):
        for dtype in DTYPES:
            x_MI = inputs(batch, 132, dtype)
            for one, y_MO in zip(together, multiply_together(together, x_MI), strict=True):
                assert torch.equal(one(x_MI), y_MO)


def test_float16_inputs_are_multiplied_in_fp32() -> None:
    packed = packed_case("bitmask", "bf16", 17, 65, 0.5)
    x_MI = inputs(3, 65, torch.float32).half()
    y_MO = Multiplier(packed)(x_MI)
    assert torch.equal(y_MO, Multiplier(packed)(x_MI.float()).half())


class _Anywhere:
    """A copy of the bytes of a tensor that starts any number of bytes from where an allocation starts."""

    def __init__(self, part: Tensor, offset: int) -> None:
        self.bytes = torch.full((part.nbytes + offset,), 0xA5, dtype=torch.uint8)
        self.bytes[offset:] = bytes_of(part)
        self.address = self.bytes.data_ptr() + offset


@needs_kernels
@pytest.mark.parametrize("level", NATIVE)
@each_case
def test_parts_may_lie_anywhere(level: str, layout: str, kind: str) -> None:
    """A file's tensors are slices of one buffer: values and places start at any multiple of their own size."""
    _native().use_level(level)
    for shape in SHAPES:
        packed = packed_case(layout, kind, *shape, 0.5)
        x_MI = inputs(3, packed.columns, torch.float32)
        y_MO = Multiplier(packed)(x_MI)
        for elements in (1, 3):
            matrix = described(packed, LAYOUTS[layout])
            weight = packed.parts["weight"]
            moved = {"weight": _Anywhere(weight, elements * weight.element_size())}
            for name, field in [(name, "index") for name in INDEX] + [("weight_start", "start")]:
                if name in packed.parts:
                    part = packed.parts[name]
                    moved[field] = _Anywhere(part, elements * part.element_size())
            for field, part in moved.items():
                setattr(matrix, field, ctypes.c_void_p(part.address))
            assert torch.equal(_native().multiply([matrix], x_MI)[0], y_MO)


@needs_kernels
@pytest.mark.parametrize("level", NATIVE)
@each_case
def test_what_is_no_number_stays_in_its_row(level: str, layout: str, kind: str) -> None:
    """NaN and infinity spoil the products they are part of, visibly, and no other."""
    _native().use_level(level)
    packed = packed_case(layout, kind, 33, 132, 0.5 if layout == "2:4" else 0.0)
    for dtype in DTYPES:
        x_MI = inputs(5, packed.columns, dtype)
        sound = Multiplier(packed)(x_MI)
        x_MI = x_MI.clone()
        x_MI[1, 70], x_MI[3, 5], x_MI[3, 100] = torch.nan, torch.inf, -torch.inf
        y_MO = Multiplier(packed)(x_MI)
        assert torch.equal(y_MO[::2], sound[::2])
        if layout != "2:4":
            assert y_MO[1].isnan().all()
            assert not y_MO[3].isfinite().any()


CONCURRENT = """
import sys
from concurrent.futures import ThreadPoolExecutor
import torch
sys.path.insert(0, sys.argv[1])
from packed_case import CASES, inputs, packed_case
from prunus.runtime.multiply import Multiplier, multiply_together
torch.set_num_threads(2)
several = [Multiplier(packed_case(*case, 200, 132, 0.5)) for case in CASES]
x_MI = [inputs(1 + index % 5, 132, torch.bfloat16) for index in range(100)]
alone = [multiply_together(several, one) for one in x_MI]
with ThreadPoolExecutor(100) as threads:
    for found, wanted in zip(threads.map(lambda one: multiply_together(several, one), x_MI), alone, strict=True):
        assert all(map(torch.equal, found, wanted))
print("equal")
"""


@needs_kernels
def test_a_hundred_threads_at_once() -> None:
    """In a process of its own, which is ended if its threads wait for each other for ever."""
    assert run_fresh(CONCURRENT, Path(__file__).parents[1], timeout=120).strip() == "equal"


@needs_kernels
def test_a_library_of_other_sources_is_refused(monkeypatch):
    file = library_file()
    assert file is not None
    monkeypatch.setattr(native, "INTERFACE", native.INTERFACE + 1)
    with pytest.raises(UserError, match="built from other sources than this prunus; install prunus again"):
        Kernels(file)
