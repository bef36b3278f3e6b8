"""What an expert is worth, from what the router did with it on calibration text.

`reap`: Lasby et al. 2025, REAP the Experts, arXiv:2510.13999: the mean, over the tokens routed to an expert, of the
router's weight times the norm of the expert's output. Its baselines: `frequency`, how many tokens were routed to an
expert, and `output-norm`, the sum of its outputs' norms (EAN in its tables).

Letters: E = experts, T = tokens routed to one expert, H = hidden.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


class ExpertStatistics:
    """Sums over the tokens routed to each expert of one bank, fp32."""

    def __init__(self, num_experts: int) -> None:
        self.tokens_E = torch.zeros(num_experts)
        self.norms_E = torch.zeros(num_experts)
        self.weighted_norms_E = torch.zeros(num_experts)

    def add(self, expert: int, outputs_TH: Tensor, weights_T: Tensor) -> None:
        """Take the outputs of one expert and the router's weight of each."""
        norms_T = outputs_TH.float().norm(dim=1)
        self.tokens_E[expert] += len(norms_T)
        self.norms_E[expert] += norms_T.sum().cpu()
        self.weighted_norms_E[expert] += (norms_T * weights_T.float()).sum().cpu()


@dataclass(frozen=True, kw_only=True, slots=True)
class ExpertScore:
    """One line of the table `EXPERT_SCORES`; `score` gives (E), higher = keep."""

    name: str
    title: str
    paper: str
    idea: str
    when: str
    score: Callable[[ExpertStatistics], Tensor]


def reap(statistics: ExpertStatistics) -> Tensor:
    return statistics.weighted_norms_E / statistics.tokens_E.clamp_min(1)


def frequency(statistics: ExpertStatistics) -> Tensor:
    return statistics.tokens_E


def output_norm(statistics: ExpertStatistics) -> Tensor:
    return statistics.norms_E


_TABLE = (
    ExpertScore(
        name="reap",
        title="REAP",
        paper="Lasby et al. 2025, REAP the Experts, arXiv:2510.13999",
        idea="Remove experts that add little when the router calls them.",
        when="The default; calibrate on text like the use, since that decides who is called.",
        score=reap,
    ),
    ExpertScore(
        name="frequency",
        title="Frequency",
        paper="Baseline of arXiv:2510.13999",
        idea="Remove experts that the router rarely calls.",
        when="As the baseline.",
        score=frequency,
    ),
    ExpertScore(
        name="output-norm",
        title="Output norm",
        paper="Expert activation norm, baseline of arXiv:2510.13999",
        idea="Remove experts whose outputs sum to little over all text.",
        when="When both how often and how much should count.",
        score=output_norm,
    ),
)
EXPERT_SCORES: dict[str, ExpertScore] = {score.name: score for score in _TABLE}
