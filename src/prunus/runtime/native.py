"""The native kernels, through their plain C interface (native/interface.cpp): found, loaded once, called by ctypes."""

import ctypes
import importlib.util
import os
import warnings
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from prunus.errors import UserError
from prunus.runtime.layout import Layout
from prunus.runtime.packed import Packed, strips

INTERFACE = 3  # of native/interface.cpp: another number where a function or a struct of it changed
LEVEL = "PRUNUS_KERNELS"  # names the instruction set to use, or "reference" for none of them
TYPES = {torch.bfloat16: 0, torch.int8: 1, torch.float32: 2}
RUNS_IN = (torch.bfloat16, torch.float32)  # everything of a model but its packed matrices
HUGE_PAGE = 2 << 20
EXPANDING = ("amx", "avx512-vbmi2")  # levels whose processors spread values by a mask in one instruction
INDEX = ("weight_mask", "weight_place", "weight_tile")


class Matrix(ctypes.Structure):
    """`prunus::Matrix` of native/matrix.h. Whoever makes one keeps the tensors that it points into."""

    _fields_ = (
        ("layout", ctypes.c_int32),
        ("type", ctypes.c_int32),
        ("rows", ctypes.c_int64),
        ("columns", ctypes.c_int64),
        ("weight", ctypes.c_void_p),
        ("index", ctypes.c_void_p),
        ("start", ctypes.c_void_p),
        ("scale", ctypes.c_void_p),
    )


class Attention(ctypes.Structure):
    """`prunus::Attention` of native/attention.h."""

    _fields_ = (
        ("type", ctypes.c_int32),
        *((name, ctypes.c_int64) for name in ("batch", "heads", "groups", "positions", "width")),
        *((name, ctypes.c_void_p) for name in ("query", "key", "value")),
        *((f"query_{name}", ctypes.c_int64) for name in ("batch", "head")),
        *((f"key_{name}", ctypes.c_int64) for name in ("batch", "group", "position")),
        *((f"value_{name}", ctypes.c_int64) for name in ("batch", "group", "position")),
        ("mask", ctypes.c_void_p),
        ("mask_batch", ctypes.c_int64),
        ("scale", ctypes.c_float),
        ("out", ctypes.c_void_p),
    )


class Norm(ctypes.Structure):
    """`prunus::Norm` of native/rows.h."""

    _fields_ = (("weight", ctypes.c_void_p), ("epsilon", ctypes.c_float))


class Projection(ctypes.Structure):
    """`prunus::Projection` of native/block.h: the first half of a block."""

    _fields_ = (
        ("type", ctypes.c_int32),
        *((name, ctypes.c_int64) for name in ("batch", "width", "head_width")),
        *((name, ctypes.c_void_p) for name in ("hidden", "cos", "sin")),
        ("angles", ctypes.c_int64),
        *((name, Norm) for name in ("norm", "query_norm", "key_norm")),
        ("matrices", Matrix * 3),
        ("bias", ctypes.c_void_p * 3),
        ("out", ctypes.c_void_p * 3),
    )


class Completion(ctypes.Structure):
    """`prunus::Completion` of native/block.h: the second half."""

    _fields_ = (
        ("type", ctypes.c_int32),
        *((name, ctypes.c_int64) for name in ("batch", "width")),
        *((name, ctypes.c_void_p) for name in ("hidden", "attended")),
        ("norm", Norm),
        ("matrices", Matrix * 4),
        ("bias", ctypes.c_void_p * 4),
        ("out", ctypes.c_void_p),
    )


def described(packed: Packed, layout: Layout) -> Matrix:
    """What the kernels are told of a checked matrix; its tensors have to be contiguous and to outlive this."""
    parts = packed.parts
    index = next((parts[name].data_ptr() for name in INDEX if name in parts), None)
    start = parts["weight_start"].data_ptr() if "weight_start" in parts else None
    scale = None if packed.scale_O is None else packed.scale_O.data_ptr()
    kind = TYPES[packed.dtype]
    return Matrix(layout.number, kind, packed.rows, packed.columns, parts["weight"].data_ptr(), index, start, scale)


class Kernels:
    """The loaded library. Every function takes as many threads as torch has, from torch's own pool where it can."""

    def __init__(self, file: Path) -> None:
        self._library = ctypes.CDLL(str(file))
        if self._library.prunus_interface_version() != INTERFACE:
            raise UserError(f"{file} was built from other sources than this prunus; install prunus again.")
        self._library.prunus_level.restype = ctypes.c_char_p
        self._library.prunus_level_named.restype = ctypes.c_char_p
        self._library.prunus_read.restype = ctypes.c_uint64
        self._level = str(self._library.prunus_level().decode())
        if openmp := _torchs_openmp():
            self._library.prunus_use_openmp(openmp)

    @property
    def level(self) -> str:
        """The instruction set that is used."""
        return self._level

    @property
    def expands(self) -> bool:
        """Whether bitmasks are unpacked as fast as they are read: elsewhere dense weights are faster."""
        return self._level in EXPANDING

    @property
    def levels(self) -> list[str]:
        """Those that this processor has, best first."""
        found: list[str] = []
        while name := self._library.prunus_level_named(len(found)):
            found.append(name.decode())
        return found

    def use_level(self, name: str) -> None:
        """Raises UserError for one that this processor has not."""
        if self._library.prunus_use_level(name.encode()):
            raise UserError(f"{LEVEL}={name} is not to be had here; this processor has {', '.join(self.levels)}.")
        self._level = name

    def multiply(self, matrices: Sequence[Matrix], x_MI: Tensor) -> list[Tensor]:
        """Products of several matrices with the same inputs (M, I), bfloat16 or fp32 and contiguous."""
        out = [x_MI.new_empty(len(x_MI), matrix.rows) for matrix in matrices]
        array = (Matrix * len(matrices))(*matrices)
        pointers = (ctypes.c_void_p * len(out))(*(one.data_ptr() for one in out))
        self._library.prunus_multiply(
            array,
            len(matrices),
            ctypes.c_void_p(x_MI.data_ptr()),
            TYPES[x_MI.dtype],
            ctypes.c_int64(len(x_MI)),
            pointers,
            torch.get_num_threads(),
        )
        return out

    def expand(self, matrix: Matrix, first_strip: int, out_OI: Tensor) -> None:
        """Fill `out_OI` (bfloat16 or fp32, contiguous) with the rows from a strip on."""
        self._library.prunus_expand(
            ctypes.byref(matrix),
            ctypes.c_int64(first_strip),
            ctypes.c_int64(strips(len(out_OI))),
            ctypes.c_void_p(out_OI.data_ptr()),
            TYPES[out_OI.dtype],
            torch.get_num_threads(),
        )

    def attend(
        self, query_BHW: Tensor, key_BGTW: Tensor, value_BGTW: Tensor, mask_BT: Tensor | None, scale: float
    ) -> Tensor:
        """Attention of one token (B, H, W), as if each group's keys and values were repeated for its H / G heads.

        Types are the same, bfloat16 or fp32, and the last dimension is contiguous; True in the mask is looked at.
        """
        out_BHW = query_BHW.new_empty(query_BHW.shape)
        batch, groups, positions, width = key_BGTW.shape
        told = Attention(
            TYPES[query_BHW.dtype],
            *(batch, query_BHW.shape[1], groups, positions, width),
            *(one.data_ptr() for one in (query_BHW, key_BGTW, value_BGTW)),
            *(*query_BHW.stride()[:2], *key_BGTW.stride()[:3], *value_BGTW.stride()[:3]),
            *((None, 0) if mask_BT is None else (mask_BT.data_ptr(), mask_BT.stride(0))),
            scale,
            out_BHW.data_ptr(),
        )
        self._library.prunus_attend(ctypes.byref(told), torch.get_num_threads())
        return out_BHW

    def project(self, told: Projection) -> None:
        """A block up to its attention; whoever asks has seen to it that every tensor lies as block.h says."""
        self._library.prunus_project(ctypes.byref(told), torch.get_num_threads())

    def complete(self, told: Completion) -> None:
        """A block from its attention on."""
        self._library.prunus_complete(ctypes.byref(told), torch.get_num_threads())

    def use_huge_pages(self, memory: Tensor) -> None:
        """Large pages for a tensor that will be read many times, where the system has them."""
        size = memory.numel() * memory.element_size()
        if size >= HUGE_PAGE:
            self._library.prunus_use_huge_pages(ctypes.c_void_p(memory.data_ptr()), ctypes.c_int64(size))

    def read(self, memory: Tensor) -> None:
        """Read a tensor's bytes and do nothing with them."""
        size = ctypes.c_int64(memory.numel() * memory.element_size())
        self._library.prunus_read(ctypes.c_void_p(memory.data_ptr()), size, torch.get_num_threads())


@cache
def kernels() -> Kernels | None:
    """The native library; None, with a warning, where it was not built: everything then goes by torch, slowly."""
    level = os.environ.get(LEVEL)
    if level == "reference":
        return None
    file = library_file()
    if file is None:
        warnings.warn(
            "prunus was installed without its kernels (no C++ compiler was found): packed models run through a slow "
            "reference; install a compiler and then prunus again.",
            stacklevel=2,
        )
        return None
    library = Kernels(file)
    if level:
        library.use_level(level)
    return library


def library_file() -> Path | None:
    """Where the library lies, installed or editable."""
    found = importlib.util.find_spec("prunus.runtime._kernels")
    return None if found is None or found.origin is None else Path(found.origin)


def _torchs_openmp() -> ctypes.c_void_p | None:
    """`GOMP_parallel` of the very library that torch has loaded; None where torch uses another kind of threads."""
    maps = Path("/proc/self/maps")
    if not maps.is_file():
        return None
    files = {line.split()[-1] for line in maps.read_text().splitlines() if "libgomp" in line}
    if len(files) != 1:
        return None
    return ctypes.cast(ctypes.CDLL(files.pop()).GOMP_parallel, ctypes.c_void_p)
