"""ADMM: find mask and remaining weights together, with a penalty that grows, then polish the weights that stay.

Boza 2024, "Fast and Effective Weight Update for Pruned Large Language Models", arXiv:2401.02938, Algorithms 1 and 2;
penalty schedule and polish after Meng et al. 2024, "ALPS: Improved Optimization for Highly Sparse One-Shot Pruning for
Large Language Models", arXiv:2406.07831, Algorithm 1 and section 3.3.

In the space of a unit Gram (see `gram.py`), with V0 the scaled dense weights and H = G + damping I, we minimise
    1/2 tr((V - V0) H (V - V0)^T)    subject to V having the pattern,
by alternating, with the scaled dual U,
    Z = the entries of V + U with the highest |V + U| that the pattern allows, else 0,     U = U + V - Z,
    V = V0 + (Z - U - V0) P_rho,     P_rho = rho (H + rho I)^-1.
rho doubles from stage to stage: a small rho first lets the mask wander, a large one then settles it. The polish solves
for the kept weights: conjugate gradients on all rows at once, restricted to the support (rows are independent, and the
diagonal is constant, so there is nothing to precondition).

Cost: one inverse per stage and Gram, shared by the matrices with the same input; per matrix one (O, I) x (I, I) product
per iteration and per polish step, and one selection per iteration. Memory: (stages + 4) I^2 floats; five I^2 where I is
over 4096, as in the down projections of large models, whose inverses no other matrix shares.
Unlike ALPS, whose penalty follows the changes of each matrix's own support, ours is fixed in advance: so the inverses
can be shared, where an eigendecomposition that serves every rho would double the products. Unlike Boza, the sparsity
is asked in full from the first iteration: growing it by his cubic rule was no better with this schedule.

Letters: O = out_features, I = in_features.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from prunus.errors import UserError
from prunus.sparsity.gram import InputScale, damped, normalise
from prunus.sparsity.methods import PruneResult, Statistics
from prunus.sparsity.patterns import Pattern
from prunus.sparsity.select import keep_highest

KEPT_WIDTH = 4096  # inverses of wider inputs are made anew for each matrix: four of them would be the peak of a run


@dataclass(frozen=True, kw_only=True, slots=True)
class AdmmOptions:
    """`stages` penalties, `penalty` and its doublings, `iterations` each; then `polish` conjugate-gradient steps.

    `damping` and `penalty` are relative to the diagonal of the Gram. Boza's own setting, but for the growing sparsity,
    is `AdmmOptions(stages=1, penalty=1.0, iterations=20, damping=0.1, polish=0)`.
    """

    stages: int = 4
    iterations: int = 3
    penalty: float = 0.25
    damping: float = 0.1
    polish: int = 2

    def __post_init__(self) -> None:
        if self.stages < 1 or self.iterations < 1 or self.polish < 0:
            raise UserError(f"{self}: stages and iterations are at least 1, polish at least 0.")
        if not (self.penalty > 0 and self.damping > 0):
            raise UserError(f"{self}: penalty and damping are above 0.")


@dataclass(frozen=True, slots=True)
class Prepared:
    """The scale of the inputs, H = G + damping I for a unit G, the damping that was needed, and P_rho of every stage.

    `propagators` is empty for an input wider than KEPT_WIDTH: each is then made when it is used, one at a time.
    """

    scale: InputScale
    damped_II: Tensor
    propagators: tuple[Tensor, ...]
    damping: float


def prepare_admm(gram_II: Tensor, options: AdmmOptions) -> Prepared:
    """One inverse per stage, for all matrices with this input."""
    unit_II, scale = normalise(gram_II)
    damped_II, factor_II, damping = damped(unit_II, options.damping)
    del factor_II  # as large as everything that stays
    kept = len(damped_II) <= KEPT_WIDTH
    propagators = tuple(_propagator(damped_II, rho) for rho in _penalties(options)) if kept else ()
    return Prepared(scale, damped_II, propagators, damping)


def prune_admm(
    weight_OI: Tensor, statistics: Statistics, pattern: Pattern, options: AdmmOptions, prepared: Prepared
) -> PruneResult:
    """Alternate, then polish."""
    dense_OI = prepared.scale.scaled(weight_OI)
    propagators = prepared.propagators or (_propagator(prepared.damped_II, rho) for rho in _penalties(options))
    sparse_OI, keep_OI = _alternate(dense_OI, propagators, pattern, options.iterations)
    polished_OI = _polish(sparse_OI, keep_OI, dense_OI, prepared.damped_II, options.polish)
    return PruneResult(prepared.scale.unscaled(polished_OI, weight_OI), keep_OI, {"damping": prepared.damping})


def _penalties(options: AdmmOptions) -> list[float]:
    return [options.penalty * 2**stage for stage in range(options.stages)]


def _propagator(damped_II: Tensor, rho: float) -> Tensor:
    """P_rho = rho (H + rho I)^-1."""
    shifted_II = damped_II.clone()
    shifted_II.diagonal().add_(rho)
    torch.linalg.cholesky(shifted_II, out=shifted_II)
    return torch.cholesky_inverse(shifted_II).mul_(rho)


def _alternate(
    dense_OI: Tensor, propagators: Iterable[Tensor], pattern: Pattern, iterations: int
) -> tuple[Tensor, Tensor]:
    """All ADMM iterations, from U = 0 and V = V0; returns Z and its support."""
    sparse_OI, keep_OI, dual_OI = _project(dense_OI.clone(), pattern)
    for propagator_II in propagators:
        for _ in range(iterations):
            target_OI = torch.addmm(dense_OI, (sparse_OI - dual_OI).sub_(dense_OI), propagator_II).add_(dual_OI)
            sparse_OI, keep_OI, dual_OI = _project(target_OI, pattern)
        dual_OI.div_(2)  # the dual is scaled by 1 / rho, and rho doubles
    return sparse_OI, keep_OI


def _project(target_OI: Tensor, pattern: Pattern) -> tuple[Tensor, Tensor, Tensor]:
    """Nearest matrix with the pattern, its support, and what is left of the target: the new scaled dual, in place."""
    keep_OI = keep_highest(target_OI.square(), pattern)
    sparse_OI = target_OI * keep_OI
    return sparse_OI, keep_OI, target_OI.sub_(sparse_OI)


def _polish(sparse_OI: Tensor, keep_OI: Tensor, dense_OI: Tensor, damped_II: Tensor, steps: int) -> Tensor:
    """Conjugate gradients for (V - V0) H = 0 on the support, every row with its own step lengths."""
    tiny = torch.finfo(sparse_OI.dtype).tiny
    residual_OI = ((dense_OI - sparse_OI) @ damped_II) * keep_OI
    direction_OI, energy_O1 = residual_OI, residual_OI.square().sum(1, keepdim=True)
    for _ in range(steps):
        image_OI = (direction_OI @ damped_II) * keep_OI
        length_O1 = energy_O1 / (direction_OI * image_OI).sum(1, keepdim=True).clamp_min(tiny)
        sparse_OI = sparse_OI + length_O1 * direction_OI
        residual_OI = residual_OI - length_O1 * image_OI
        before_O1, energy_O1 = energy_O1, residual_OI.square().sum(1, keepdim=True)
        direction_OI = residual_OI + (energy_O1 / before_O1.clamp_min(tiny)) * direction_OI
    return sparse_OI
