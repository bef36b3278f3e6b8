"""Packed models on disk, read as the ordinary models that they stand for. docs/sparse-format.md."""

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from prunus.checkpoint.compressed_tensors import WEIGHT
from prunus.runtime import check_packed, unpack
from prunus.runtime.entry import SCALE, Entry, check_tensors, is_packing, read_packing
from prunus.runtime.packed import Packed

if TYPE_CHECKING:
    from prunus.checkpoint.directory import TensorInfo


def matrices_of(quantization: Any) -> dict[str, Entry]:
    """What a `quantization_config` says of each packed matrix "X.weight"; nothing when it is of another kind."""
    if not is_packing(quantization):
        return {}
    return {name + WEIGHT: entry for name, entry in read_packing(quantization).items()}


def as_whole(tensors: "dict[str, TensorInfo]", packed: dict[str, Entry]) -> "dict[str, TensorInfo]":
    """The tensors as they are read: in place of its parts, each packed matrix. UserError for parts that misfit."""
    found = dict(tensors)
    headers = {name: (info.shape, info.dtype) for name, info in tensors.items()}
    for name, entry in packed.items():
        base = name.removesuffix(WEIGHT)
        check_tensors(base, entry, headers)
        stored = sum(found.pop(f"{base}.{part}").num_bytes for part in entry.matrix)
        dtype = torch.float32 if entry.type == "int8" else entry.dtype
        found[name] = replace(tensors[name], shape=entry.shape, dtype=dtype, stored_bytes=stored)
    return found


def packed_matrix(name: str, entry: Entry, read: Callable[[str], Tensor]) -> Packed:
    """The matrix "X.weight" as it is stored. Raises UserError when its parts are not those of one matrix."""
    tensors = {part: read(f"{name.removesuffix(WEIGHT)}.{part}") for part in entry.matrix}
    scale_O = tensors.pop(SCALE, None)
    packed = Packed(entry.layout, entry.rows, entry.columns, tensors, scale_O)
    check_packed(packed)
    return packed


def whole_matrix(name: str, entry: Entry, read: Callable[[str], Tensor]) -> Tensor:
    """The matrix as the model's own module holds it: in bfloat16, or fp32 where it is stored as int8."""
    weight_OI = unpack(packed_matrix(name, entry, read))
    return weight_OI.T.contiguous() if entry.transposed else weight_OI
