"""The table of scores that say which layers may go."""

from dataclasses import dataclass
from typing import Literal

from prunus.shrinking.taylor_layers import PROTECTED_FIRST, PROTECTED_LAST

LayerNeed = Literal["neighbours", "run", "candidates", "gradients"]


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerScore:
    """One line of the table: what a reader and the step need to know.

    `needs`: hidden states on both sides of each layer (neighbours), on both sides of each run of layers (run), the
    predictions without each candidate (candidates), or the loss's gradients by weights (gradients).
    """

    name: str
    title: str
    paper: str
    needs: LayerNeed
    folds: bool = False  # candidates are judged as they are after folding
    protects: tuple[int, int] = (0, 0)  # so many first and last layers are never candidates, whatever the user says
    idea: str
    cost: str
    when: str


_TABLE = (
    LayerScore(
        name="greedy-kl",
        title="Greedy KL",
        paper="Song et al. 2024, SLEB, arXiv:2402.09025",
        needs="candidates",
        idea="Remove the layer without which the predictions change least, and again.",
        cost="For each layer removed, as many forward passes of the judging text as half the layers.",
        when="With --no-fold, where it loses least; it takes minutes to hours.",
    ),
    LayerScore(
        name="greedy-kl-folded",
        title="Greedy KL, folded",
        paper="Song et al. 2024, SLEB, arXiv:2402.09025; Shopkhoev et al. 2025, ReplaceMe, arXiv:2505.02819",
        needs="candidates",
        folds=True,
        idea="As Greedy KL, each candidate judged after it was folded into the layer before it.",
        cost="That of Greedy KL, and two or three forward passes of the calibration text for each layer removed.",
        when="To look for a better set when hours do not matter; its gain is not measured yet.",
    ),
    LayerScore(
        name="angular",
        title="Angular distance",
        paper="Gromov et al. 2024, The Unreasonable Ineffectiveness of the Deeper Layers, arXiv:2403.17887",
        needs="run",
        idea="Remove the contiguous run whose input and output point the same way.",
        cost="One forward pass of the calibration text.",
        when="The default: with the fold, which makes up best for one run, the best and the cheapest.",
    ),
    LayerScore(
        name="block-influence",
        title="Block Influence",
        paper="Men et al. 2024, ShortGPT, arXiv:2403.03853",
        needs="neighbours",
        idea="Remove the layers that turn the hidden states least.",
        cost="One forward pass of the calibration text.",
        when="To compare with published figures.",
    ),
    LayerScore(
        name="taylor+",
        title="Taylor+",
        paper="Kim et al. 2024, Shortened LLaMA, arXiv:2402.02834",
        needs="gradients",
        protects=(PROTECTED_FIRST, PROTECTED_LAST),
        idea="Remove the layers whose weights matter least to the loss, to first order; the first 4 and last 2 stay.",
        cost="Two forward passes and a backward pass of the judging text, one layer in memory with its gradients.",
        when="To compare with published figures.",
    ),
)
LAYER_SCORES: dict[str, LayerScore] = {score.name: score for score in _TABLE}
