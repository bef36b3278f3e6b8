"""What a layout is: how it packs values, how it unpacks them, and which files of it are sound."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from prunus.errors import UserError

Parts = dict[str, Tensor]
Shapes = dict[str, tuple[tuple[int, ...], torch.dtype]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """One layout. All functions are pure.

    `pack` gives the parts of the values (O, I), or None when the zeros do not lie as this layout wants them.
    `shapes` says which shape and dtype each part has, from (rows, columns, dtype, number of values).
    `check` raises UserError for parts that have those shapes and contradict each other; the kernels trust it.
    `unpack` gives the values (O, I) back, from checked parts.
    """

    name: str
    number: int  # in the native interface
    about: str
    pack: Callable[[Tensor], Parts | None]
    shapes: Callable[[int, int, torch.dtype, int], Shapes]
    check: Callable[[Mapping[str, Tensor], int, int], None]
    unpack: Callable[[Mapping[str, Tensor], int, int], Tensor]


def malformed(what: str) -> UserError:
    return UserError(f"the packed matrix is damaged: {what}; pack the model again with `prunus export --to sparse`.")


def starts(counts_S: Tensor) -> Tensor:
    """Where each strip starts, from how much each holds; and behind the last, how much they hold together."""
    start_S = torch.zeros(len(counts_S) + 1, dtype=torch.int64)
    start_S[1:] = counts_S.cumsum(0)
    return start_S


def check_starts(start_S: Tensor, counts_S: Tensor, total: int) -> None:
    """Raises UserError where `start_S` is not what the strips hold, or that is not as many values as there are."""
    if not torch.equal(start_S, starts(counts_S)) or int(start_S[-1]) != total:
        raise malformed("where its strips start does not agree with how much they hold")
