"""Which weights may be zero: unstructured, N:M, or whole tiles. Each pattern knows its exact count.

Letters: O = out_features (rows), I = in_features (columns).
`keep_OI` is boolean, True = the weight stays. N:M names what is KEPT: 1:4 keeps one weight in four.
Counts are `round(sparsity * n)` by Python's rule (halves go to the even number).
"""

import math
import re
from dataclasses import dataclass
from typing import Literal, TypeAlias

from torch import Tensor
from torch.nn.functional import pad

from prunus.errors import UserError

Compare: TypeAlias = Literal["row", "matrix"]
Shape: TypeAlias = tuple[int, int]

_NUMBER = re.compile(r"([0-9]+\.?[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?", re.ASCII)
_ALLOWED = "allowed are a sparsity such as 0.5 (or 0.5@row, 0.5@matrix), N:M such as 2:4, or tiles such as 16x16:0.8"


@dataclass(frozen=True, slots=True)
class Unstructured:
    """Any weight may go. `compare` is the set inside which scores are ranked; None = the method's own default.

    With "row" each row loses exactly `round(sparsity * I)` weights, with "matrix" the matrix `round(sparsity * O * I)`,
    so `Unstructured(count / (O * I), "matrix")` carries any exact count.
    """

    sparsity: float
    compare: Compare | None = None

    def __post_init__(self) -> None:
        _check_sparsity(self.sparsity)
        if self.compare not in (None, "row", "matrix"):
            raise UserError(f"compare={self.compare!r} is not a comparison group: write 'row' or 'matrix'.")

    def check(self, shape: Shape, name: str) -> None:
        """Every matrix can be pruned without structure."""

    def num_pruned(self, shape: Shape) -> int:
        """Exact number of zeros asked of a matrix of this shape; `compare` must be decided (`Method.resolve`)."""
        rows, cols = shape
        if self._compare() == "row":
            return rows * round(self.sparsity * cols)
        return round(self.sparsity * rows * cols)

    def satisfied_by(self, keep_OI: Tensor) -> bool:
        """True when every comparison group lost exactly the number of weights asked for."""
        rows, cols = keep_OI.shape
        if self._compare() == "row":
            return bool(((~keep_OI).sum(1) == round(self.sparsity * cols)).all())
        return int((~keep_OI).sum()) == self.num_pruned((rows, cols))

    def _compare(self) -> Compare:
        assert self.compare is not None, "the comparison group is open: call Method.resolve(pattern) first"
        return self.compare

    def __str__(self) -> str:
        return repr(float(self.sparsity)) + (f"@{self.compare}" if self.compare else "")


@dataclass(frozen=True, slots=True)
class NM:
    """N:M: in every group of `of` consecutive inputs of a row, exactly `keep` weights stay."""

    keep: int
    of: int

    def __post_init__(self) -> None:
        if not 1 <= self.keep < self.of:
            raise UserError(f"pattern {self} keeps {self.keep} of {self.of}: N:M needs 1 <= N < M, for example 2:4.")

    @property
    def sparsity(self) -> float:
        """Fraction of zeros."""
        return 1 - self.keep / self.of

    def check(self, shape: Shape, name: str) -> None:
        """Raise UserError when M does not divide the number of inputs of matrix `name`."""
        if shape[1] % self.of:
            raise UserError(
                f"pattern {self} does not fit {name}: its {shape[1]} inputs are no multiple of {self.of}; "
                "choose an M that divides them or leave this matrix out."
            )

    def num_pruned(self, shape: Shape) -> int:
        """Exact number of zeros in a matrix of this shape."""
        return shape[0] * shape[1] // self.of * (self.of - self.keep)

    def satisfied_by(self, keep_OI: Tensor) -> bool:
        """True when every group keeps exactly N weights."""
        return bool((keep_OI.reshape(-1, self.of).sum(1) == self.keep).all())

    def __str__(self) -> str:
        return f"{self.keep}:{self.of}"


@dataclass(frozen=True, slots=True)
class Tile:
    """Whole rows x cols tiles go, ranked over the matrix: exactly `round(sparsity * number of tiles)` of them.

    Where tiles do not divide the matrix, the cut-off tiles at the right and bottom edge are tiles like any other.
    """

    rows: int
    cols: int
    sparsity: float

    def __post_init__(self) -> None:
        _check_sparsity(self.sparsity)
        if self.rows < 1 or self.cols < 1:
            raise UserError(f"pattern {self} has an empty tile: write rows and columns, for example 16x16:0.8.")

    def check(self, shape: Shape, name: str) -> None:
        """Raise UserError when the tile is larger than matrix `name`."""
        if self.rows > shape[0] or self.cols > shape[1]:
            raise UserError(
                f"pattern {self} does not fit {name}: the tile is larger than its {shape[0]}x{shape[1]} weights; "
                "choose a smaller tile or leave this matrix out."
            )

    def grid(self, shape: Shape) -> Shape:
        """Tiles down and across, cut-off ones included."""
        return math.ceil(shape[0] / self.rows), math.ceil(shape[1] / self.cols)

    def num_pruned_tiles(self, shape: Shape) -> int:
        """Exact number of tiles that go."""
        return round(self.sparsity * math.prod(self.grid(shape)))

    def num_pruned(self, shape: Shape) -> int:
        """Zeros in a matrix of this shape: exact where tiles divide it, else for tiles of average size."""
        return round(self.num_pruned_tiles(shape) * math.prod(shape) / math.prod(self.grid(shape)))

    def satisfied_by(self, keep_OI: Tensor) -> bool:
        """True when every tile is wholly kept or wholly pruned and the number of pruned tiles is exact."""
        shape = (keep_OI.shape[0], keep_OI.shape[1])
        kept_tile = self.sums(keep_OI.float())
        whole = (kept_tile == 0) | (kept_tile == self.sums(keep_OI.new_ones(shape).float()))
        return bool(whole.all()) and int((kept_tile == 0).sum()) == self.num_pruned_tiles(shape)

    def sums(self, value_OI: Tensor) -> Tensor:
        """Sum of the values in each tile, shape `grid(value_OI.shape)`."""
        down, across = self.grid((value_OI.shape[0], value_OI.shape[1]))
        missing = (0, across * self.cols - value_OI.shape[1], 0, down * self.rows - value_OI.shape[0])
        return pad(value_OI, missing).reshape(down, self.rows, across, self.cols).sum((1, 3))

    def spread(self, tile: Tensor, shape: Shape) -> Tensor:
        """One value per tile to one value per weight: the inverse of `sums` for constants."""
        rows_OT = tile.repeat_interleave(self.rows, 0)[: shape[0]]
        return rows_OT.repeat_interleave(self.cols, 1)[:, : shape[1]]

    def __str__(self) -> str:
        return f"{self.rows}x{self.cols}:{float(self.sparsity)!r}"


Pattern: TypeAlias = Unstructured | NM | Tile


def parse_pattern(text: object) -> Pattern:
    """Read "0.5", 0.5, "0.5@row", "2:4" or "16x16:0.8"; `str(pattern)` reads back as the same pattern."""
    if isinstance(text, Unstructured | NM | Tile):
        return text
    if isinstance(text, int):
        raise UserError(_integer_message(text))
    if isinstance(text, float):
        return Unstructured(text)
    if not isinstance(text, str):
        raise UserError(f"pattern={text!r} is not a pattern: {_ALLOWED}.")
    return _parse_text(text.strip())


def _parse_text(text: str) -> Pattern:
    if found := re.fullmatch(r"([0-9]{1,6}):([0-9]{1,6})", text, re.ASCII):
        return NM(int(found[1]), int(found[2]))
    if found := re.fullmatch(r"([0-9]{1,6})x([0-9]{1,6}):(.+)", text, re.ASCII):
        return Tile(int(found[1]), int(found[2]), _parse_number(found[3], text))
    number, _, compare = text.partition("@")
    if compare not in ("row", "matrix") and compare != text[len(number) :]:
        raise UserError(f"pattern={text!r} is not a pattern: {_ALLOWED}.")
    return Unstructured(_parse_number(number, text), compare or None)  # type: ignore[arg-type]


def _parse_number(number: str, text: str) -> float:
    if not _NUMBER.fullmatch(number):
        raise UserError(f"pattern={text!r} is not a pattern: {_ALLOWED}.")
    return float(number)


def _check_sparsity(sparsity: float) -> None:
    if not 0 <= sparsity < 1:  # also refuses NaN
        raise UserError(f"sparsity={sparsity} is outside [0, 1): give the fraction of zeros, for example 0.5.")


def _integer_message(value: int) -> str:
    if isinstance(value, bool):
        return f"pattern={value} is not a pattern: {_ALLOWED}."
    example = value if value >= 60 else 124
    read = f"YAML reads an unquoted {example // 60}:{example % 60} as {example}"
    return f"pattern={value} is an integer ({read}): put the pattern in quotes, for example '2:4' or '0.5'."
