"""Cut units inside the blocks (FFN channels, KV groups) in one pass over them."""

from collections.abc import Mapping
from typing import Any

from prunus.errors import UserError
from prunus.models import StreamedModel
from prunus.models.axes import Axis
from prunus.models.cut import ByLayer, with_own_widths
from prunus.settings_shrink import ShrinkSettings
from prunus.shrinking import WIDTH_SCORES
from prunus.shrinking.units import FROM_THE_LOSS
from prunus.steps.shrink_gradients import check_gradients, from_the_loss
from prunus.steps.shrink_shapes import differing, rounded
from prunus.steps.shrink_step import CutStep
from prunus.steps.shrink_width_edit import FromTheLoss, WidthEdit, axis_read
from prunus.text.batches import TokenBatch

AXES = ("kv_groups", "ffn", "expert_ffn", "shared_ffn")
QUERY_HEADS = ("query_heads",)  # read by the matrix that reads the groups too, so they go after these


class WidthStep(CutStep):
    """A `BlockStep`. Raises UserError for sizes or axes that cannot be."""

    def __init__(self, settings: ShrinkSettings, model: StreamedModel, widths: ByLayer | None = None) -> None:
        """`widths`: of each layer, where they are not all alike."""
        super().__init__(settings, model)
        if widths:
            trust = model.checkpoint.trust_remote_code
            self.cut = with_own_widths(model.config, self.cut, widths, trust_remote_code=trust)
            self.notices = [*rounded(settings, self.cut), *differing(self.cut)]
        self.score = WIDTH_SCORES[settings.score]
        self.title = f"Shrink, {self.score.name}"
        self.prepares = bool(FROM_THE_LOSS & set(self.score.needs))
        self.needs = self.needs_of(settings) - FROM_THE_LOSS
        self._loss = FromTheLoss()

    @staticmethod
    def needs_of(settings: ShrinkSettings) -> set[str]:
        return {*WIDTH_SCORES[settings.score].needs, *({"gram"} if settings.refit else ())}

    @staticmethod
    def check(model: StreamedModel, settings: ShrinkSettings, axes: Mapping[str, Axis], max_memory: int | None) -> None:
        _check_readers(model, axes)
        needs = FROM_THE_LOSS & set(WIDTH_SCORES[settings.score].needs)
        if needs:
            check_gradients(model, axes, settings.length, max_memory, by_weights="weight_gradient" in needs)

    def prepare(self, batch: TokenBatch, rows: list[dict[str, Any]]) -> None:
        """Scores that look at the loss see the model as it was: one backward pass before anything is cut."""
        self._loss = from_the_loss(self.model, self.cut.axes, batch, self.score.needs)

    def edit(self, rows: list[dict[str, Any]]) -> WidthEdit:
        self.rows = rows
        return WidthEdit(self.score, self.settings.refit, self.cut, self._loss, rows)

    def remarks(self, rows: list[dict[str, Any]]) -> list[str]:
        unseen = [row["name"] for row in rows if row["tokens"] == 0]
        if not self.needs or not unseen:
            return []
        return [
            f"{len(unseen)} experts, such as {unseen[0]}, met no calibration token and were cut as if all their inputs "
            "were alike; give more, or more varied, calibration text."
        ]


def _check_readers(model: StreamedModel, axes: Mapping[str, Axis]) -> None:
    """Refuse a block whose units of one axis are read by more than one matrix: nobody could choose for both."""
    for block in model.spec.blocks:
        readers: dict[str, set[str]] = {}
        for linear in block.linears:
            if axis := axis_read(axes, block, linear):
                readers.setdefault(axis.name, set()).add(linear.parameter)
        for name, found in readers.items():
            if len(found) > 1:
                raise UserError(
                    f"{model.spec.family} cannot be cut along {name}: in {block.name}, {' and '.join(sorted(found))} "
                    "both read its units."
                )
