"""Streaming statistics of a layer's inputs, in fp32, for as many tokens as pass by.

Shapes: T = tokens, I = in_features.
"""

from collections.abc import Collection
from itertools import pairwise

import torch
from torch import Tensor

from prunus.sparsity.methods import Statistics

PANELS = 8


class Recorder:
    """Accumulates what a method needs to know of one input, as means over tokens.

    These are `input_sq_norm` (I), `input_mean` (I) and `gram` (I, I).
    """

    def __init__(self, needs: Collection[str]) -> None:
        self._needs = needs
        self._num_tokens = 0
        self._sq_norm_I: Tensor | None = None
        self._sum_I: Tensor | None = None
        self._gram_II: Tensor | None = None
        self._scratch_TI: Tensor | None = None

    def add(self, x_TI: Tensor) -> None:
        """Take the inputs of some tokens, padding already removed."""
        self._num_tokens += x_TI.shape[0]
        if "input_mean" in self._needs:
            sum_I = x_TI.sum(0, dtype=torch.float32)
            self._sum_I = sum_I if self._sum_I is None else self._sum_I.add_(sum_I)
        if "gram" in self._needs:
            if self._gram_II is None:
                self._gram_II = torch.zeros(x_TI.shape[1], x_TI.shape[1], device=x_TI.device)
            _add_upper_products(self._gram_II, x_TI if x_TI.dtype == torch.float32 else self._scratch(x_TI).copy_(x_TI))
        elif "input_sq_norm" in self._needs:
            sq_norm_I = self._scratch(x_TI).copy_(x_TI).square_().sum(0)  # six times as fast as a norm over the rows
            self._sq_norm_I = sq_norm_I if self._sq_norm_I is None else self._sq_norm_I.add_(sq_norm_I)

    def _scratch(self, x_TI: Tensor) -> Tensor:
        """Room for fp32 values of this shape, the same for every call: fresh memory costs more than the arithmetic."""
        if self._scratch_TI is None or len(self._scratch_TI) < len(x_TI):
            self._scratch_TI = torch.empty(x_TI.shape, device=x_TI.device)
        return self._scratch_TI[: len(x_TI)]

    def statistics(self) -> Statistics:
        """Return the means over all tokens seen. The recorder is spent afterwards: the Gram is finished in place."""
        count = max(self._num_tokens, 1)
        mean_I = None if self._sum_I is None else self._sum_I / count
        if self._gram_II is not None:
            gram_II = _mirror_upper(self._gram_II.div_(count))
            return Statistics(self._num_tokens, gram_II.diagonal().clone(), gram_II, mean_I)
        sq_norm_I = None if self._sq_norm_I is None else self._sq_norm_I / count
        return Statistics(self._num_tokens, sq_norm_I, None, mean_I)


def _edges(size: int) -> list[int]:
    return [size * panel // PANELS for panel in range(PANELS + 1)]


def _add_upper_products(gram_II: Tensor, x_TI: Tensor) -> None:
    """gram += X^T X, upper block triangle only: 9/16 of the multiplications of the full product."""
    edges = _edges(gram_II.shape[0])
    for start, stop in pairwise(edges):
        if stop > start:
            gram_II[start:stop, start:].addmm_(x_TI[:, start:stop].T, x_TI[:, start:])


def _mirror_upper(gram_II: Tensor) -> Tensor:
    edges = _edges(gram_II.shape[0])
    for start, stop in pairwise(edges):
        gram_II[stop:, start:stop] = gram_II[start:stop, stop:].T
    return gram_II
