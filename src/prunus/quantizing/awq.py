"""AWQ: weights that read large inputs are stored larger, so that rounding moves them by less.

Lin et al. 2023, "AWQ: Activation-aware Weight Quantization for On-Device LLM Compression and Acceleration",
arXiv:2306.00978, section 3.2. For the matrices W that read one input x, with Gram matrix G = E[x x^T], and every alpha
from 0 up to 1 in steps of 1/20:
    s_i = rms(x_i)^alpha, over the root of its largest times its smallest
    least  sum over W of  tr(E G E^T),    E = Q(W diag(s)) diag(s)^-1 - W
What makes x is divided by s, so the model stays the same function; without such a source, alpha is 0.
Unlike the authors' code: s is rounded to powers of two, so that both factors change exponents alone and nothing stored
is rounded for them; the root mean square stands for the mean magnitude; what clips is decided afterwards, by the
scheme's own search. A weight of 0 stays 0.
Cost: for each of 20 alphas, a product of the matrix with its Gram.

Letters: O = out_features, I = in_features.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from prunus.quantizing.schemes import Scheme
from prunus.sparsity.methods import Statistics, output_energy

STEPS = 20


@torch.no_grad()
def awq_scales(weights_OI: Sequence[Tensor], scheme: Scheme, statistics: Statistics) -> Tensor:
    """The factors (I), powers of two in fp32, that matrices with the same input are to be multiplied by."""
    plain = replace(scheme, searches=False)
    best_I = torch.ones_like(statistics.sq_norm())
    least = _error(weights_OI, best_I, plain, statistics)
    for step in range(1, STEPS):
        scale_I = powers_of_two(statistics, step / STEPS)
        error = _error(weights_OI, scale_I, plain, statistics)
        if error < least:
            best_I, least = scale_I, error
    return best_I


def powers_of_two(statistics: Statistics, alpha: float) -> Tensor:
    """rms^alpha (I) around 1, each rounded to the nearest power of two; 1 for inputs that are always 0."""
    rms_I = statistics.sq_norm().sqrt()
    seen_I = rms_I > 0
    if not bool(seen_I.any()):
        return torch.ones_like(rms_I)
    log_I = alpha * rms_I.where(seen_I, rms_I[seen_I].min()).log2()
    middle = (log_I.max() + log_I.min()) / 2
    return torch.exp2((log_I - middle).round()).where(seen_I, torch.ones_like(rms_I))


def _error(weights_OI: Sequence[Tensor], scale_I: Tensor, scheme: Scheme, statistics: Statistics) -> float:
    """The squared output error of all matrices together, for each token."""
    total = 0.0
    for weight_OI in weights_OI:
        wider_OI = weight_OI.float() * scale_I
        rounded_OI = scheme.quantized(wider_OI, scheme.scales(wider_OI, weight_OI.dtype)).float() / scale_I
        total += output_energy(rounded_OI - weight_OI.float(), statistics)
    return total
