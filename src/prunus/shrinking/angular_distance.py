"""Angular distance: the contiguous run of layers goes whose input and output point the same way.

Gromov et al. 2024, "The Unreasonable Ineffectiveness of the Deeper Layers", arXiv:2403.17887, Eq. 7:
    d(h_l, h_l+n) = E_t [ arccos( h_l,t . h_l+n,t / (|h_l,t| |h_l+n,t|) ) / pi ]
with h_l the hidden states that enter layer l (T, H). The n layers from the l of the least distance go.
Cost: one forward pass of the calibration text; n + 1 sets of hidden states.
Versus the authors: they look at each sequence's last token alone; here every token counts, so that as much text says
more.

Shapes: T = tokens, H = hidden.
"""

import math
from collections.abc import Sequence

from torch import Tensor

from prunus.shrinking.block_influence import cosine


def angular_distance(hidden_in_TH: Tensor, hidden_out_TH: Tensor) -> Tensor:
    """The angle between each token's hidden states before and after a run of layers, as a share of pi, fp32 (T)."""
    return cosine(hidden_in_TH, hidden_out_TH).arccos() / math.pi


def least_distant_run(distance: Sequence[float], candidates: Sequence[int], count: int) -> list[int]:
    """The run of `count` layers, all of them candidates, of the least distance; of equals the earlier.

    `distance[l]` belongs to the run that begins at layer l.
    """
    allowed = set(candidates)
    starts = [start for start in candidates if allowed >= set(range(start, start + count))]
    best = min(starts, key=lambda start: (distance[start], start))
    return list(range(best, best + count))
