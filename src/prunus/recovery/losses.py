"""What training lowers: cross-entropy, forward KL to the teacher's logits, distance of hidden states.

    CE      = -log q_y                                              y the next token, q = softmax(student)
    KL      = tau^2 sum_v p_v (log p_v - log q_v)                   p, q at temperature tau
              Hinton et al. 2015, "Distilling the Knowledge in a Neural Network", arXiv:1503.02531; tau^2 keeps the size
              of the gradient
    top-k   = the same sum over the teacher's k likeliest tokens and one more outcome, "any other token", which keeps
              the student from moving mass where the teacher has none. It is at most the full KL
    hidden  = mean over layers of ||s - t||^2 / ||t||^2             SquareHead, Kurtic et al. 2023, arXiv:2310.06927

KL and cross-entropy are taken over a few positions at a time, gradient included: a vocabulary-wide float32 row for
every position of a batch would be read and written from main memory several times, and cost more than the head itself.

Shapes: B = sequences, T = tokens, t = positions, V = vocabulary, K = teacher's likeliest tokens, H = hidden width.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

VALUES_AT_ONCE = 1 << 21  # float32 logits of one piece; 8 MB stay in a processor's cache

# (student's logits of some positions, which positions) -> each loss of each of these positions
LossesOf = Callable[[Tensor, slice], dict[str, Tensor]]


def forward_kl(teacher_tV: Tensor, student_tV: Tensor, temperature: float = 1.0) -> Tensor:
    """Return tau^2 KL(teacher || student) in nats (t,)."""
    log_p_tV = (teacher_tV.float() / temperature).log_softmax(dim=-1)
    log_q_tV = (student_tV.float() / temperature).log_softmax(dim=-1)
    return temperature**2 * (log_p_tV.exp() * (log_p_tV - log_q_tV)).sum(dim=-1)


def top_k_log_p(teacher_tV: Tensor, k: int, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """Return the k likeliest tokens and their log-probabilities, each (t, K)."""
    log_p_tK, index_tK = (teacher_tV.float() / temperature).log_softmax(dim=-1).topk(k, dim=-1)
    return index_tK, log_p_tK


def top_k_kl(index_tK: Tensor, log_p_tK: Tensor, student_tV: Tensor, temperature: float = 1.0) -> Tensor:
    """Return tau^2 KL (t,) over the teacher's k likeliest tokens and, as one outcome, all others."""
    log_q_tV = (student_tV.float() / temperature).log_softmax(dim=-1)
    log_q_tK, log_p_tK = log_q_tV.gather(-1, index_tK), log_p_tK.float()
    likeliest_t = (log_p_tK.exp() * (log_p_tK - log_q_tK)).sum(dim=-1)
    other_p_t, other_q_t = _others(log_p_tK), _others(log_q_tK)
    return temperature**2 * (likeliest_t + other_p_t * (other_p_t.log() - other_q_t.log()))


def _others(log_p_tK: Tensor) -> Tensor:
    """The probability of all tokens that are not among the k, kept away from a logarithm of zero."""
    return (1 - log_p_tK.exp().sum(dim=-1)).clamp_min(1e-6)


def square_head(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
    """Return the mean over layers of the squared distance of (B, T, H) states, relative to the teacher's."""
    pairs = [(s_BTH.float(), t_BTH.float()) for s_BTH, t_BTH in zip(student, teacher, strict=True)]
    distances = [(s_BTH - t_BTH).square().mean() / t_BTH.square().mean() for s_BTH, t_BTH in pairs]
    return torch.stack(distances).mean()


class TeacherLogits(Protocol):
    """What the teacher thinks of some positions."""

    def kl(self, student_tV: Tensor, rows: slice, temperature: float) -> Tensor:
        """Return tau^2 KL(teacher || student) of the positions `rows` (t,)."""
        ...


@dataclass(frozen=True, slots=True)
class AllLogits:
    """The teacher's logits of all positions."""

    logits_tV: Tensor

    def kl(self, student_tV: Tensor, rows: slice, temperature: float) -> Tensor:
        return forward_kl(self.logits_tV[rows], student_tV, temperature)


@dataclass(frozen=True, slots=True)
class LikeliestLogits:
    """The teacher's k likeliest tokens of all positions; their log-probabilities are at the loss's temperature."""

    index_tK: Tensor
    log_p_tK: Tensor

    def kl(self, student_tV: Tensor, rows: slice, temperature: float) -> Tensor:
        return top_k_kl(self.index_tK[rows], self.log_p_tK[rows], student_tV, temperature)


def token_losses(
    names: Sequence[str], targets_t: Tensor, teacher: TeacherLogits | None, temperature: float
) -> LossesOf:
    """Return the function that `mean_losses` calls, for "ce" and "logits"."""

    def losses_of(student_tV: Tensor, rows: slice) -> dict[str, Tensor]:
        losses = {}
        if "ce" in names:
            losses["ce"] = cross_entropy(student_tV, targets_t[rows], reduction="none")
        if "logits" in names:
            assert teacher is not None
            losses["logits"] = teacher.kl(student_tV, rows, temperature)
        return losses

    return losses_of


def mean_losses(logits_tV: Tensor, losses_of: LossesOf, weights: dict[str, float]) -> tuple[Tensor, dict[str, float]]:
    """Return the weighted sum of the mean losses, which has a gradient, and each mean loss by name."""
    means: dict[str, float] = {}
    return _PieceByPiece.apply(logits_tV, losses_of, weights, means), means  # type: ignore[no-untyped-call]


class _PieceByPiece(torch.autograd.Function):
    """Forward and backward of a few positions at a time; what is kept is the gradient, in the logits' own dtype."""

    @staticmethod
    def forward(ctx: Any, logits_tV: Tensor, losses_of: LossesOf, weights: dict[str, float], means: Any) -> Tensor:
        num, at_once = len(logits_tV), max(VALUES_AT_ONCE // logits_tV.shape[1], 1)
        wanted = ctx.needs_input_grad[0]
        gradient_tV = torch.empty_like(logits_tV) if wanted else logits_tV
        sums: dict[str, Tensor] = {}
        for start in range(0, num, at_once):
            rows = slice(start, min(start + at_once, num))
            with torch.enable_grad(), torch.autocast(logits_tV.device.type, enabled=False):
                piece_tV = logits_tV[rows].detach().float().requires_grad_(wanted)
                losses = {name: loss_t.sum() for name, loss_t in losses_of(piece_tV, rows).items()}
                if wanted:
                    total = sum((weights[name] * loss for name, loss in losses.items()), torch.zeros(()))
                    gradient_tV[rows] = torch.autograd.grad(total, piece_tV)[0] / num
            sums = {name: loss.detach() + sums.get(name, 0) for name, loss in losses.items()}
        means |= {name: loss.item() / num for name, loss in sums.items()}
        ctx.gradient_tV = gradient_tV if wanted else None
        return logits_tV.new_tensor(sum(weights[n] * mean for n, mean in means.items()), dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, None, None, None]:
        gradient_tV, ctx.gradient_tV = ctx.gradient_tV, None
        return gradient_tV.mul_(upstream[0]), None, None, None
