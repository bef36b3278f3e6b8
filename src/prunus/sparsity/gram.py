"""Gram matrices made fit for solving: unit diagonal, then damping raised stepwise until Cholesky accepts.

With n = sqrt(diag G), the solvers work on the weights V = W * n and the unit Gram G / (n n^T): the output error is
the same, and one damping value means the same in every layer. An input that was always 0 (n_i = 0) is "dead":
it becomes independent of the rest, its scaled weights are 0, and so they are the first to be pruned.

Letters: I = in_features, O = out_features.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

_RAISE = 10.0  # factor between damping attempts; with a unit diagonal, damping above I always succeeds


@dataclass(frozen=True, slots=True)
class InputScale:
    """The scale n_I that was divided out of a Gram; 0 for dead inputs."""

    scale_I: Tensor

    def scaled(self, weight_OI: Tensor) -> Tensor:
        """V = W * n."""
        return weight_OI * self.scale_I

    def unscaled(self, scaled_OI: Tensor, weight_OI: Tensor) -> Tensor:
        """W = V / n; weights on dead inputs, which no data can judge, keep their value from `weight_OI`."""
        alive_I = self.scale_I > 0
        return torch.where(alive_I, scaled_OI / self.scale_I.where(alive_I, torch.ones_like(self.scale_I)), weight_OI)


def normalise(gram_II: Tensor) -> tuple[Tensor, InputScale]:
    """(the fp32 Gram divided by the square roots of its diagonal, a new matrix with ones there; what was divided)."""
    assert bool(gram_II.isfinite().all()), "the Gram matrix holds NaN or Inf"
    scale_I = gram_II.diagonal().clamp_min(0).sqrt()
    inverse_I = torch.where(scale_I > 0, 1 / scale_I, torch.zeros_like(scale_I))
    unit_II = (gram_II * inverse_I[:, None]).mul_(inverse_I)
    unit_II.fill_diagonal_(1.0)
    return unit_II, InputScale(scale_I)


def damped(unit_II: Tensor, damping: float) -> tuple[Tensor, Tensor, float]:
    """(G + damping I, its lower Cholesky factor, the damping that was needed); `unit_II` itself is changed.

    An indefinite Gram (few tokens, low precision) makes Cholesky fail: damping is then raised tenfold, again and again.
    """
    assert damping > 0
    diagonal_I = unit_II.diagonal().clone()
    while True:
        unit_II.diagonal().copy_(diagonal_I + damping)
        factor_II, failed = torch.linalg.cholesky_ex(unit_II)
        if not int(failed):
            return unit_II, factor_II, damping
        damping *= _RAISE
