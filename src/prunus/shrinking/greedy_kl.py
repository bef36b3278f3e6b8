"""Greedy KL: remove the layer without which the model's predictions change least, and again, until enough are gone.

Song et al. 2024, "SLEB: Streamlining LLMs through Redundancy Verification and Elimination of Transformer Blocks",
arXiv:2402.09025, Algorithm 1, with another judge:
    next = argmin_l E_t KL( p_dense( . | x_<t) || p_without_l( . | x_<t) )
where "without l" is without all layers removed before, too.
Versus the authors: they take the loss on the text; KL to the dense model needs no right answer and is less noisy on as
little text, since it compares whole distributions. Layers before a candidate are not run again for it: the hidden
states in front of every layer are kept, so a round of L candidates costs half of L forward passes.
Cost: rounds x L / 2 forward passes of the text that judges; a set of hidden states for every candidate.
"""

from collections.abc import Mapping


def next_to_go(kl: Mapping[int, float]) -> int:
    """The layer of the lowest KL; of equals the earlier."""
    return min(kl, key=lambda layer: (kl[layer], layer))
