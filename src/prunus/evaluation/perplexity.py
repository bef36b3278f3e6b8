"""Perplexity by the papers' convention: exp of the mean negative log-likelihood of a token, in nats.

The joined text is cut into consecutive windows without overlap (stride = window). Each window starts fresh, its first
token is given and the other T - 1 are scored. This is not lm-eval's `word_perplexity`; between tokenizers compare
`bits_per_byte`. The standard error takes windows as the sampling units, since tokens of one window are not independent.

Shapes: N = windows, T = tokens in a window, V = vocabulary.
"""

import math
from dataclasses import dataclass

from torch import Tensor
from torch.nn.functional import cross_entropy


@dataclass(frozen=True, slots=True, kw_only=True)
class Perplexity:
    """A perplexity; `nll` is nats per token, the standard errors are None for a single window."""

    perplexity: float
    perplexity_standard_error: float | None
    nll: float
    nll_standard_error: float | None
    bits_per_byte: float | None
    scored_tokens: int


def token_nll(logits_tV: Tensor, targets_t: Tensor) -> Tensor:
    """Return the negative log-likelihood (t,) in nats of each target."""
    return cross_entropy(logits_tV, targets_t, reduction="none")


def summarise_nll(nll_NT: Tensor, scored_bytes: int | None = None) -> Perplexity:
    """Turn the NLL of every scored token (N windows of T - 1) into a perplexity; infinite when no float64 holds it."""
    nll = nll_NT.double().mean().item()
    error = standard_error(nll_NT)
    return Perplexity(
        perplexity=_exp(nll),
        perplexity_standard_error=None if error is None else _exp(nll) * error,
        nll=nll,
        nll_standard_error=error,
        bits_per_byte=nll * nll_NT.numel() / math.log(2) / scored_bytes if scored_bytes else None,
        scored_tokens=nll_NT.numel(),
    )


def _exp(x: float) -> float:
    try:
        return math.exp(x)
    except OverflowError:
        return math.inf


def standard_error(values_NT: Tensor) -> float | None:
    """Return the standard error of the mean over windows of equal size; None for a single window."""
    if len(values_NT) < 2:
        return None
    return float(values_NT.double().mean(dim=1).std().item() / math.sqrt(len(values_NT)))
