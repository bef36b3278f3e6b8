"""Fold a removed run of layers into the last matrix before it, by least squares: no parameter more, no training.

After Shopkhoev et al. 2025, "ReplaceMe: Network Simplification via Depth Pruning and Transformer Block Linearization",
arXiv:2505.02819, Section 3.2 (least squares). With x the inputs of the last matrix W of the block before the run, `out`
that block's output and `target` the dense model's hidden states after the run,
    dW = argmin  E_t | target - (out + dW x) |^2  =  C G^-1,   C = E_t (target - out) x^T,   G = E_t x x^T
which is exact because a pre-norm block adds W x to its output as it is. Where W has a bias, x has one more entry that
is always 1, whose column of dW is what the bias takes on. G is normalised by the roots of its diagonal and damped, see
`sparsity/gram.py`.
Cost: one more forward of the block before the run; two matrices, I x I and H x I, and one Cholesky factorisation.
Versus the authors: they solve for an H x H matrix T between the product and the residual, dW = (T - I) W and for the
bias (T - I) b; solving for both themselves has at least that many freedoms and fits what comes from earlier folds too.

Shapes: T = tokens, H = hidden, I = in_features of W.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from prunus.sparsity.gram import damped, normalise

DAMPING = 0.001


@dataclass(frozen=True, slots=True)
class Folded:
    """What to add to W and to its bias (None: it has none), and E |target - out|^2 / E |target|^2 before and after."""

    delta_HI: Tensor
    delta_bias_H: Tensor | None
    error_before: float
    error_after: float
    damping: float


class FoldStatistics:
    """Accumulates what the fold of one matrix needs, for one or several targets that share its inputs, in fp32.

    With `bias` the last column of all that is kept, beside the I inputs, stands for the bias.
    """

    def __init__(self, num_targets: int = 1, *, bias: bool = False) -> None:
        self._bias = bias
        self._gram_II: Tensor | None = None
        self._cross_HI: list[Tensor] = []
        self._missing = [0.0] * num_targets
        self._energy = [0.0] * num_targets

    def add(self, x_TI: Tensor, out_TH: Tensor, targets: list[Tensor], share: float = 1.0) -> None:
        """Take the inputs, the output and, for each target, the wanted output of some tokens, padding removed.

        The output has `share` times the matrix's product in it.
        """
        x_TI, out_TH = x_TI.float(), out_TH.float()
        x_TI = share * (torch.cat([x_TI, torch.ones_like(x_TI[:, :1])], dim=1) if self._bias else x_TI)
        if self._gram_II is None:
            self._gram_II = x_TI.new_zeros(x_TI.shape[1], x_TI.shape[1])
            self._cross_HI = [x_TI.new_zeros(out_TH.shape[1], x_TI.shape[1]) for _ in targets]
        self._gram_II.addmm_(x_TI.T, x_TI)
        for index, target_TH in enumerate(targets):
            wanted_TH = target_TH.to(out_TH) - out_TH
            self._cross_HI[index].addmm_(wanted_TH.T, x_TI)
            self._missing[index] += float(wanted_TH.double().square().sum())
            self._energy[index] += float(target_TH.double().square().sum())

    def solve(self, damping: float = DAMPING) -> list[Folded]:
        """One fold for each target."""
        assert self._gram_II is not None, "no token was seen"
        unit_II, scale = normalise(self._gram_II)
        _, factor_II, used = damped(unit_II, damping)
        return [self._solved(index, factor_II, scale.scale_I, used) for index in range(len(self._cross_HI))]

    def _solved(self, index: int, factor_II: Tensor, scale_I: Tensor, damping: float) -> Folded:
        assert self._gram_II is not None
        cross_HI = self._cross_HI[index]
        inverse_I = torch.where(scale_I > 0, 1 / scale_I, torch.zeros_like(scale_I))  # a dead input teaches nothing
        delta_HI = torch.cholesky_solve((cross_HI * inverse_I).T, factor_II).T * inverse_I
        gained = 2 * (delta_HI * cross_HI).sum() - ((delta_HI @ self._gram_II) * delta_HI).sum()
        missing, energy = self._missing[index], max(self._energy[index], 1e-30)
        errors = (missing / energy, (missing - float(gained)) / energy)
        if self._bias:
            return Folded(delta_HI[:, :-1], delta_HI[:, -1], *errors, damping)
        return Folded(delta_HI, None, *errors, damping)
