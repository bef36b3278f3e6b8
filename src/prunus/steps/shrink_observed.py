"""Cut what can only be chosen after the whole model was seen: the hidden width, and experts.

One forward pass over the blocks watches; then each block is read again, cut and written.

Letters: H = hidden, E = experts.
"""

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from prunus.calibration import HiddenStates, Tensors, walk
from prunus.models import StreamedModel
from prunus.models.axes import Axis
from prunus.models.experts import fused_weights
from prunus.models.spec import BlockSpec, Group, Stage
from prunus.settings_shrink import ShrinkSettings
from prunus.shrinking.expert_scores import EXPERT_SCORES, ExpertStatistics
from prunus.shrinking.hidden_width import normalised_magnitude
from prunus.sparsity import Statistics
from prunus.sparsity.select import keep_in_rows
from prunus.steps.shrink_step import CutStep, rounded_scores, to_hex
from prunus.text.batches import TokenBatch

AXES = ("hidden", "experts")


class NoEdit:
    """An Edit that stops nowhere."""

    def needs_at(self, block: BlockSpec, stage: Stage) -> None:
        return None

    def __call__(
        self, block: BlockSpec, group: Group, weights_OI: list[Tensor], statistics: Statistics, tensors: Tensors
    ) -> list[Tensor]:
        raise AssertionError("nobody stopped here")


class ObservedStep(CutStep):
    """A `BlockStep`. Raises UserError for sizes or axes that cannot be."""

    title = "Cut"
    prepares = True
    needs: Collection[str] = ()

    @staticmethod
    def needs_of(settings: ShrinkSettings) -> set[str]:
        return {"hidden_states"}

    @staticmethod
    def check(model: StreamedModel, settings: ShrinkSettings, axes: Mapping[str, Axis], max_memory: int | None) -> None:
        return None  # it takes one block and two files of hidden states

    def prepare(self, batch: TokenBatch, rows: list[dict[str, Any]]) -> None:
        """Watch the model on the text and choose; an interrupted run finds its choice in `rows`."""
        if rows:
            return
        hidden_H, banks = _watch(self.model, batch, self.max_memory)
        if "hidden" in self.cut.axes:
            rows.append(self._row("hidden", None, hidden_H))
        if "experts" in self.cut.axes:
            assert self.settings.expert_score is not None
            score = EXPERT_SCORES[self.settings.expert_score].score
            rows += [self._row("experts", i, score(bank)) for i, bank in banks.items()]

    def _row(self, axis: str, block: int | None, score_U: Tensor) -> dict[str, Any]:
        keep_U = keep_in_rows(score_U[None], len(score_U) - self.cut.left[axis])[0]
        return {
            "name": axis if block is None else f"{self.model.spec.blocks[block].name}, {axis}",
            "block": block,
            "axis": axis,
            "expert": None,
            "units": len(score_U),
            "kept": to_hex(keep_U),
            "scores": rounded_scores(score_U),
        }

    def edit(self, rows: list[dict[str, Any]]) -> NoEdit:
        self.rows = rows
        return NoEdit()

    def remarks(self, rows: list[dict[str, Any]]) -> list[str]:
        return []


@torch.no_grad()
def _watch(
    model: StreamedModel, batch: TokenBatch, max_memory: int | None
) -> tuple[Tensor, dict[int, ExpertStatistics]]:
    """(worth of each dimension of the residual stream, what the router did in each block that has experts)."""
    half = None if max_memory is None else max_memory // 2
    with _watched_experts(model) as banks:
        scores = [_magnitude(hidden) for hidden in walk(model, batch, "Watch", max_memory=half)]
    return torch.stack(scores).sum(0), banks


def _magnitude(hidden: HiddenStates) -> Tensor:
    each = [normalised_magnitude(hidden_TH) for hidden_TH in hidden.states_NTH]
    return torch.stack(each).mean(0)


@contextmanager
def _watched_experts(model: StreamedModel) -> Iterator[dict[int, ExpertStatistics]]:
    """Within the context, what the experts of each block give is counted; empty when there are none."""
    found = {i: next((m for m in block.modules() if fused_weights(m)), None) for i, block in enumerate(model.blocks)}
    banks: dict[int, Any] = {index: bank for index, bank in found.items() if bank is not None}
    statistics = {index: ExpertStatistics(bank.num_experts) for index, bank in banks.items()}
    for index, bank in banks.items():
        bank.observe_outputs = statistics[index].add
    try:
        yield statistics
    finally:
        for bank in banks.values():
            del bank.observe_outputs
