"""Second-order removal: what the output error would be if the rest made up for the unit as well as it can.

Kurtic et al. 2023, ZipLM, arXiv:2302.04089, equations 2 and 3 (the line of OBS; also SlimGPT, arXiv:2412.18110, and
OSSCAR, arXiv:2403.12983): with the Gram G of the reader's inputs, removing the inputs P of a unit and refitting the
others by least squares costs

    loss(P) = tr( W_P ([G^-1]_PP)^-1 W_P^T ),

and leaves W <- W - W_P ([G^-1]_PP)^-1 [G^-1]_P: and G^-1 <- G^-1 - [G^-1]_:P ([G^-1]_PP)^-1 [G^-1]_P:. The cheapest
units go, the update is made, and the losses of the others are looked at again. `refit.py` then solves for the weights
that stay from the original ones, so no error of these updates is left in them.

Cost: ROUNDS passes over G^-1 (I, I), and 2 I^2 operations for every removed input.
Differs from the papers: several units go in one round (ROUNDS bounds how often the losses are looked at again), and G
is normalised to a unit diagonal before damping, so that one damping serves every layer.
"""

import math

import torch
from torch import Tensor

from prunus.shrinking.units import Choice, Units
from prunus.sparsity.gram import damped, normalise
from prunus.sparsity.select import keep_in_rows

ROUNDS = 64
DAMPING = 0.01


def remove_cheapest(units: Units, num_kept: int) -> Choice:
    """Remove the cheapest units round by round; a unit's score is its loss when it was last looked at."""
    unit_II, scale = normalise(units.statistics.gram())
    weight_OI = scale.scaled(units.reader_OI)
    _, factor_II, _ = damped(unit_II, DAMPING)
    inverse_II = torch.cholesky_inverse(factor_II)
    keep_U = torch.ones(units.num_units, dtype=torch.bool, device=weight_OI.device)
    score_U = torch.zeros(units.num_units, device=weight_OI.device)
    at_once = max(1, math.ceil((units.num_units - num_kept) / ROUNDS)) if units.runs == 1 else 1
    while (left := int(keep_U.sum()) - num_kept) > 0:
        may_go_U = keep_U & _run_has_more(keep_U, units.runs, num_kept)
        stays = may_go_U.nonzero()[:, 0]
        score_U[stays] = _losses(weight_OI, inverse_II, units.columns_UW[stays])
        goes = stays[~keep_in_rows(score_U[stays][None], min(at_once, left))[0]]
        _eliminate(weight_OI, inverse_II, units.inputs(goes))
        keep_U[goes] = False
    return Choice(keep_U, score_U)


def _run_has_more(keep_U: Tensor, runs: int, num_kept: int) -> Tensor:
    """Whether the run that a unit belongs to still keeps more than it may."""
    kept_R1 = keep_U.view(runs, -1).sum(1, keepdim=True)
    return (kept_R1 > num_kept // runs).expand(runs, len(keep_U) // runs).flatten()


def _losses(weight_OI: Tensor, inverse_II: Tensor, columns_UW: Tensor) -> Tensor:
    if columns_UW.shape[1] == 1:
        columns_U = columns_UW[:, 0]
        return weight_OI[:, columns_U].square().sum(0) / inverse_II.diagonal()[columns_U]
    blocks_UWW = inverse_II[columns_UW[:, :, None], columns_UW[:, None, :]]
    weights_UWO = weight_OI.T[columns_UW]
    factors_UWW = torch.linalg.cholesky(blocks_UWW)  # principal blocks of an inverse that is positive definite
    losses_U: Tensor = torch.linalg.solve_triangular(factors_UWW, weights_UWO, upper=False).square().sum((1, 2))
    return losses_U


def _eliminate(weight_OI: Tensor, inverse_II: Tensor, gone_P: Tensor) -> None:
    """Take inputs out of both in place, which leaves zeros there up to rounding: nobody looks at these again."""
    rows_PI = inverse_II[gone_P]
    solved_PI = torch.cholesky_solve(rows_PI, torch.linalg.cholesky(rows_PI[:, gone_P]))
    weight_OI.addmm_(weight_OI[:, gone_P], solved_PI, alpha=-1)
    inverse_II.addmm_(rows_PI.T, solved_PI, alpha=-1)
