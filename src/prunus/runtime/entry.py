"""What config.json says of each packed matrix, and which tensors a file must hold for it. docs/sparse-format.md.

"quantization_config": {"quant_method": QUANT_METHOD, "version": 1, "matrices": {module name: {layout, type, rows,
columns, values, bias, transposed}}}. Nothing here touches a weight.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Self

import torch

from prunus.errors import UserError
from prunus.runtime import LAYOUTS, TYPES, Packed
from prunus.runtime.layout import Shapes

# Engines that do not know it quote it in their error: so it is the sentence that a user needs there.
QUANT_METHOD = "prunus-sparse (pip install prunus, then import prunus)"
KIND = "prunus-sparse"
VERSION = 1
SCALE, BIAS = "weight_scale", "bias"
LARGEST = 1 << 40  # no row, column or value count of a model is larger


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One packed matrix (O, I) = (rows, columns). `transposed`: the module that it stands for stores (I, O)."""

    layout: str
    type: str
    rows: int
    columns: int
    values: int  # numbers in the tensor `weight`
    bias: bool = False
    transposed: bool = False

    @classmethod
    def of(cls, packed: Packed, *, bias: bool = False, transposed: bool = False) -> Self:
        """What has to be said of this matrix."""
        return cls(
            layout=packed.layout,
            type=next(name for name, dtype in TYPES.items() if dtype == packed.dtype),
            rows=packed.rows,
            columns=packed.columns,
            values=packed.parts["weight"].numel(),
            bias=bias,
            transposed=transposed,
        )

    @property
    def dtype(self) -> torch.dtype:
        return TYPES[self.type]

    @property
    def parts(self) -> Shapes:
        """Shape and dtype of the layout's own tensors."""
        return LAYOUTS[self.layout].shapes(self.rows, self.columns, self.dtype, self.values)

    @property
    def matrix(self) -> Shapes:
        """The same, and the scales of an int8 matrix: all that the matrix is made of."""
        return {**self.parts, **({SCALE: ((self.rows,), torch.float32)} if self.type == "int8" else {})}

    @property
    def shapes(self) -> Shapes:
        """The same, and the bias: all that the module holds."""
        return {**self.matrix, **({BIAS: ((self.rows,), torch.bfloat16)} if self.bias else {})}

    @property
    def shape(self) -> tuple[int, int]:
        """As the module that it stands for has it."""
        return (self.columns, self.rows) if self.transposed else (self.rows, self.columns)


def is_packing(config: Any) -> bool:
    """Whether a `quantization_config` says that the model is packed, in whatever version."""
    return isinstance(config, Mapping) and str(config.get("quant_method", "")).startswith(KIND)


def packing(entries: Mapping[str, Entry]) -> dict[str, Any]:
    """What config.json has to say of a packed model, by module name."""
    matrices = {name: asdict(entry) for name, entry in entries.items()}
    return {"quant_method": QUANT_METHOD, "version": VERSION, "matrices": matrices}


def read_packing(config: Mapping[str, Any]) -> dict[str, Entry]:
    """The inverse. Raises UserError for another version, and for what describes no matrix."""
    version, matrices = config.get("version"), config.get("matrices")
    if version != VERSION or isinstance(version, bool):
        raise UserError(
            f"the model is packed in version {version!r} of the format, and this prunus reads version {VERSION}; "
            "install the prunus that wrote it, or pack the model again with `prunus export --to sparse`."
        )
    if not isinstance(matrices, Mapping) or not matrices:
        raise _damaged("it lists no matrices")
    return {str(name): _entry(str(name), raw) for name, raw in matrices.items()}


def _entry(name: str, raw: Any) -> Entry:
    known = {field.name for field in fields(Entry)}
    if not isinstance(raw, Mapping) or set(raw) - known or not set(raw) >= known - {BIAS, "transposed"}:
        raise _damaged(f"{name} is not described by {', '.join(sorted(known))}")
    if raw["layout"] not in list(LAYOUTS) or raw["type"] not in list(TYPES):
        raise _damaged(
            f"{name} has layout {raw['layout']!r} and type {raw['type']!r}, where one of {', '.join(LAYOUTS)} and one "
            f"of {', '.join(TYPES)} are known"
        )
    sizes = [raw["rows"], raw["columns"], raw["values"]]
    whole = all(type(size) is int and 0 <= size <= LARGEST for size in sizes) and min(sizes[:2]) > 0
    if not whole or not all(isinstance(raw.get(flag, False), bool) for flag in (BIAS, "transposed")):
        raise _damaged(f"{name} has sizes that no matrix has ({sizes})")
    return Entry(**raw)


def _damaged(what: str) -> UserError:
    return UserError(f"config.json of the packed model is damaged: {what}; restore it, or pack the model again.")


def check_tensors(name: str, entry: Entry, found: Mapping[str, tuple[tuple[int, ...], torch.dtype]]) -> None:
    """Raises UserError where the tensors of a file, by their names, are not those of the packed matrix `name`."""
    for part, (shape, dtype) in entry.shapes.items():
        there = found.get(f"{name}.{part}")
        if there is None:
            raise UserError(
                f"tensor {name}.{part} of the packed model is missing; restore it, or pack the model again."
            )
        if there != (shape, dtype):
            raise UserError(
                f"tensor {name}.{part} of the packed model is {there[1]} {there[0]}, and config.json asks for {dtype} "
                f"{shape}; restore it, or pack the model again."
            )
