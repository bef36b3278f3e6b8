"""GPTQ: round column by column and let the columns to the right make up for every rounding.

Frantar et al. 2022, "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers",
arXiv:2210.17323, Algorithm 1. With H = G + damping I and H^-1 = U^T U (U upper triangular), for every column c:
    round   q_rc = nearest grid value of w_rc, 0 where w_rc was pruned
    update  w_r,c: -= ((w_rc - q_rc) / U_cc) * U_c,c:
It is SparseGPT's sweep (`sparsity/sparsegpt.py`) with another value that each column is fixed at. A pruned weight is
fixed at 0, whatever earlier columns wanted of it: that too is made up for further right.
With a pattern, zeros are chosen in the same sweep by SparseGPT's criterion (arXiv:2301.00774, section 3.5), and what is
kept is rounded: one error to make up for, instead of one after the other.
The scales of a group are set when the sweep reaches it, from its weights as they then are; those of a whole row before.
Unlike the authors' code: zeros stay, columns keep their order, and Gram and weights are scaled to a unit diagonal.
Cost: that of SparseGPT.

Letters: O = out_features, I = in_features, G = scales in a row, S = columns of a span.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from prunus.quantizing.grid import on_grid
from prunus.quantizing.methods import Quantized
from prunus.quantizing.schemes import Scheme
from prunus.sparsity.methods import Statistics
from prunus.sparsity.patterns import Pattern
from prunus.sparsity.sparsegpt import (
    Prepared,
    SparseGptOptions,
    columns_together,
    prepare_sparsegpt,
    select_columns,
    sweep_columns,
)

OPTIONS = SparseGptOptions()


def prepare_gptq(gram_II: Tensor) -> Prepared:
    """Factorise once for all matrices with this input."""
    return prepare_sparsegpt(gram_II, OPTIONS)


def quantize_gptq(
    weight_OI: Tensor, scheme: Scheme, statistics: Statistics, prepared: Prepared, pattern: Pattern | None
) -> Quantized:
    """Sweep over the columns; works on the transpose, so that a column is contiguous."""
    work_IO = prepared.scale.scaled(weight_OI.float()).T.contiguous()
    fixing = _Fixing(weight_OI, scheme, prepared, pattern, work_IO)
    sweep_columns(work_IO, prepared.upper_II, max(fixing.span, OPTIONS.block // fixing.span * fixing.span), fixing)
    return Quantized(fixing.values_IO.T.contiguous(), fixing.scale_OG, {"damping": prepared.damping})


@dataclass
class _Fixing:
    """Says what each column becomes when the sweep reaches it: on the grid, and 0 where it is pruned.

    `work_IO` is the sweep's own: weights times input scale. A group's scale depends on what is kept of it, so zeros are
    chosen for all of it in advance; in N:M groups they are chosen again when the sweep reaches them.
    """

    weight_OI: Tensor
    scheme: Scheme
    prepared: Prepared
    pattern: Pattern | None
    work_IO: Tensor

    def __post_init__(self) -> None:
        self.original_OI = self.weight_OI.float()
        self.nonzero_IO = (self.weight_OI != 0).T.contiguous()
        self.keep_IO = self.nonzero_IO.clone()
        self.values_IO = torch.empty_like(self.work_IO, dtype=self.weight_OI.dtype)
        width = self.weight_OI.shape[1]
        self.group = self.scheme.group_of(width)
        self.together = 1 if self.pattern is None else columns_together(self.pattern, OPTIONS.block)
        self.span = math.lcm(self.scheme.group or 1, self.together)
        scale_shape = (len(self.weight_OI), width // self.group)
        self.scale_OG = torch.empty(scale_shape, dtype=self.weight_OI.dtype, device=self.weight_OI.device)
        if self.scheme.group is None:
            self.scale_OG.copy_(self.scheme.scales(self.original_OI, self.weight_OI.dtype))

    def __call__(self, column: int) -> Tensor:
        """The value of a column (O), times the scale of its input."""
        if self.pattern is not None and column % self.together == 0:
            self._choose_zeros(self.pattern, column, self.together if column % self.span else self.span)
        if self.scheme.group is not None and column % self.group == 0:
            self._set_scale(column)
        scale_O = self.scale_OG[:, column // self.group]
        value_O = on_grid(self._weights(column, column + 1)[:, 0], scale_O, self.scheme.grid)
        self.values_IO[column] = value_O.where(self.keep_IO[column], torch.zeros_like(value_O))
        return self.values_IO[column].float() * self.prepared.scale.scale_I[column]

    def _choose_zeros(self, pattern: Pattern, start: int, count: int) -> None:
        """Among some columns; what was 0 before goes first, and stays 0 in any case."""
        columns = slice(start, min(start + count, len(self.work_IO)))
        self.work_IO[columns] *= self.nonzero_IO[columns]
        select_columns(self.work_IO, self.keep_IO, self.prepared.upper_II, pattern, (columns.start, columns.stop))
        self.keep_IO[columns] &= self.nonzero_IO[columns]

    def _set_scale(self, start: int) -> None:
        weight_OS = self._weights(start, start + self.group)
        kept_OS = self.keep_IO[start : start + self.group].T
        self.scale_OG[:, start // self.group] = self.scheme.scales(weight_OS * kept_OS, self.weight_OI.dtype)[:, 0]

    def _weights(self, start: int, end: int) -> Tensor:
        """Some columns (O, S) as they now are, in the units of the weights."""
        columns = slice(start, end)
        scale = type(self.prepared.scale)(self.prepared.scale.scale_I[columns])
        return scale.unscaled(self.work_IO[columns].T, self.original_OI[:, columns])
