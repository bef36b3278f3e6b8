"""Packed matrices that read the very same tensor (q, k and v; gate and up) are multiplied in one go.

That prepares the inputs once, calls the kernels once, and leaves Python once: 3 to 5% of a token's time on a quiet
machine, more on a busy one (docs/log.md). Nobody is told which matrices these are: the first pass shows it.
"""

import threading
import weakref
from typing import Protocol, Self

from torch import Tensor

from prunus.runtime.multiply import Multiplier, multiply_together


class Reader(Protocol):
    """A module with a packed matrix."""

    in_features: int

    @property
    def multiplier(self) -> Multiplier: ...


class Readers(threading.local):
    """Who reads what, in one model; each thread has its own.

    Whoever is first to read a tensor multiplies for all that read the same one as it did last time. A wrong guess costs
    time and nothing else, and is not made again.
    """

    def __init__(self) -> None:
        self._input: tuple[weakref.ref[Tensor], int] | None = None
        self._asked: dict[Reader, None] = {}
        self._ahead: dict[Reader, Tensor] = {}
        self._together: dict[Reader, tuple[Reader, ...]] = {}  # by who reads first

    def product(self, module: Reader, x: Tensor) -> Tensor:
        """x W^T (M, O) of a module's matrix, for an x of (..., I)."""
        state = 0 if x.is_inference() else x._version  # an edit in place makes it another input
        if self._input is None or self._input[0]() is not x or self._input[1] != state:
            self._begin(x, state)
        self._asked[module] = None
        if module not in self._ahead:
            group = self._together.get(module, (module,))
            x_MI = x.reshape(-1, module.in_features)
            self._ahead |= zip(group, multiply_together([one.multiplier for one in group], x_MI), strict=True)
        return self._ahead.pop(module)

    def _begin(self, x: Tensor, state: int) -> None:
        if self._asked:
            self._together[next(iter(self._asked))] = tuple(self._asked)
        self._input, self._asked, self._ahead = (weakref.ref(x), state), {}, {}

    def __reduce__(self) -> tuple[type[Self], tuple[()]]:
        """A copy has seen nothing yet."""
        return type(self), ()
