"""How far a model moved from its dense parent: KL divergence and top-1 agreement, token by token.

    KL(dense || sparse) = sum_v p_v (log p_v - log q_v),  p = softmax(dense logits), q = softmax(sparse logits), in nats

taken at every position that predicts a scored token. Perplexity can hide a change, when one text gets better as another
gets worse; KL cannot.

Shapes: V = vocabulary, t = positions.
"""

from dataclasses import dataclass

from torch import Tensor

from prunus.evaluation.perplexity import standard_error


@dataclass(frozen=True, slots=True, kw_only=True)
class Divergence:
    """Mean KL in nats per token with its standard error over windows, and the share of equal most likely tokens."""

    kl: float
    kl_standard_error: float | None
    top1_agreement: float


def token_kl(dense_tV: Tensor, sparse_tV: Tensor) -> Tensor:
    """Return KL(dense || sparse) in nats (t,) from float32 logits."""
    log_p_tV, log_q_tV = dense_tV.log_softmax(dim=-1), sparse_tV.log_softmax(dim=-1)
    return (log_p_tV.exp() * (log_p_tV - log_q_tV)).sum(dim=-1)


def token_agreement(dense_tV: Tensor, sparse_tV: Tensor) -> Tensor:
    """Return (t,) bool: do both models hold the same token for the most likely?"""
    return dense_tV.argmax(dim=-1) == sparse_tV.argmax(dim=-1)


def summarise_divergence(kl_NT: Tensor, agree_NT: Tensor) -> Divergence:
    """Turn the values of all positions into means."""
    return Divergence(
        kl=kl_NT.double().mean().item(),
        kl_standard_error=standard_error(kl_NT),
        top1_agreement=agree_NT.double().mean().item(),
    )
