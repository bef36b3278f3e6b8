"""Least squares for what stays: the kept columns of the reader make up for those that go.

min over W'_S of E || W x - W'_S x_S ||^2, so W'_S = W_S + W_P G_PS (G_SS + lambda)^-1 with the Gram G of the reader's
inputs, S the inputs that stay and P those that go (the closed form behind ZipLM, arXiv:2302.04089, and OSSCAR,
arXiv:2403.12983). One Cholesky factorisation of G_SS.
"""

import torch
from torch import Tensor

from prunus.sparsity.gram import damped, normalise

DAMPING = 0.001


@torch.no_grad()
def refit(weight_OI: Tensor, gram_II: Tensor, stays_I: Tensor) -> Tensor:
    """The reader with columns of exact zeros where `stays_I` (bool) is False, and the others refitted, all fp32."""
    unit_II, scale = normalise(gram_II)
    scaled_OI = scale.scaled(weight_OI)
    cross_PS = unit_II[~stays_I][:, stays_I]
    _, factor_SS, _ = damped(unit_II[stays_I][:, stays_I].contiguous(), DAMPING)
    made_up_SO = torch.cholesky_solve((scaled_OI[:, ~stays_I] @ cross_PS).T, factor_SS)
    scaled_OI[:, stays_I] += made_up_SO.T
    return drop(scale.unscaled(scaled_OI, weight_OI), stays_I)


def drop(weight_OI: Tensor, stays_I: Tensor) -> Tensor:
    """The reader with exact zeros in the columns that go, and the others as they were."""
    return torch.where(stays_I, weight_OI, torch.zeros_like(weight_OI))
