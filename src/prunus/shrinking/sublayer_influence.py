"""Influence of a sublayer: attention or an MLP that hardly turns the residual stream hardly matters.

He et al. 2024, "What Matters in Transformers? Not All Attention is Needed", arXiv:2406.15786, section 3.2: Block
Influence (`block_influence.py`) of the sublayer together with its norm and its residual,

    S = 1 - E_t [ x_t . y_t / (|x_t| |y_t|) ],   y = x + sublayer(norm(x)),

all sublayers judged on the dense model at once, those of the lowest S removed.
Cost: two forward passes of the calibration text, one of them without MLPs; one set of hidden states.
Differs from the paper: where both kinds go, an MLP stays in a block that loses its attention, since a block without
both is a layer removed.
"""

from collections.abc import Mapping, Sequence

from prunus.shrinking.block_influence import least_influential


def least_influential_sublayers(
    influence: Mapping[str, Sequence[float]], removable: Sequence[int], counts: Mapping[str, int]
) -> dict[str, list[int]]:
    """Of each kind the layers that lose it, ascending; of equals the earlier. The first kind chooses first."""
    gone: dict[str, list[int]] = {}
    for kind, count in counts.items():
        taken = {layer for layers in gone.values() for layer in layers}
        gone[kind] = least_influential(influence[kind], [n for n in removable if n not in taken], count)
    return gone
