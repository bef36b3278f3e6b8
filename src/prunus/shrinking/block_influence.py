"""Block Influence: a layer that hardly turns the hidden states hardly matters.

Men et al. 2024, "ShortGPT: Layers in Large Language Models are More Redundant Than You Expect", arXiv:2403.03853,
equation 1:
    BI_l = 1 - E_t [ h_l,t . h_l+1,t / (|h_l,t| |h_l+1,t|) ]
with h_l the hidden states that enter layer l (T, H) and h_l+1 those that leave it. The layers of the lowest BI go, all
judged on the dense model at once.
Cost: one forward pass of the calibration text; two sets of hidden states.

Shapes: T = tokens, H = hidden.
"""

from collections.abc import Sequence

from torch import Tensor


def block_influence(hidden_in_TH: Tensor, hidden_out_TH: Tensor) -> Tensor:
    """1 - cosine similarity of each token's hidden states before and after a layer, fp32 (T)."""
    return 1 - cosine(hidden_in_TH, hidden_out_TH)


def cosine(a_TH: Tensor, b_TH: Tensor) -> Tensor:
    """Cosine similarity of rows, fp32 (T); 0 for a row of zeros, which has no direction."""
    a_TH, b_TH = a_TH.float(), b_TH.float()
    norms_T = a_TH.norm(dim=-1) * b_TH.norm(dim=-1)
    cosine_T: Tensor = (a_TH * b_TH).sum(-1) / norms_T.clamp_min(1e-30)
    return cosine_T.clamp(-1, 1)


def least_influential(influence: Sequence[float], candidates: Sequence[int], count: int) -> list[int]:
    """The `count` candidates of the lowest influence, ascending; of equals the earlier layer goes."""
    return sorted(sorted(candidates, key=lambda layer: (influence[layer], layer))[:count])
