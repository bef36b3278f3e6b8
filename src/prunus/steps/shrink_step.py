"""What every step has in common that cuts units out of tensors: a `BlockStep` but for how units are chosen."""

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from prunus.calibration import Edit
from prunus.calibration.block_pass import Propagate
from prunus.models import StreamedModel
from prunus.models.axes import Axis
from prunus.models.cut import Cut
from prunus.settings_shrink import ShrinkSettings
from prunus.steps.shrink_shapes import new_config, planned_cut, rounded, shape_facts
from prunus.text.batches import TokenBatch

MOST_SCORES = 512  # the record holds no more of one axis


class CutStep(ABC):
    """Cuts what the rows say: each names an axis, the units kept, and the block (None: all of the model)."""

    title: str
    prepares: bool
    needs: Collection[str]
    verb = "shrink"
    propagate: Propagate = "sparse"
    edits_head = False
    sizes = None

    def __init__(self, settings: ShrinkSettings, model: StreamedModel) -> None:
        self.settings, self.model = settings, model
        self.cut: Cut = planned_cut(model.config, settings, model.checkpoint.trust_remote_code)
        self.notices = rounded(settings, self.cut)
        self.rows: list[dict[str, Any]] = []
        self.max_memory: int | None = None
        self.of_call: dict[str, Any] = {}  # what the record says of the whole call that this step is a part of

    @staticmethod
    @abstractmethod
    def needs_of(settings: ShrinkSettings) -> set[str]:
        """What the step will want to know of calibration text, before the pass or in it; nothing: it takes no text."""

    @abstractmethod
    def prepare(self, batch: TokenBatch, rows: list[dict[str, Any]]) -> None: ...

    @abstractmethod
    def edit(self, rows: list[dict[str, Any]]) -> Edit: ...

    @abstractmethod
    def remarks(self, rows: list[dict[str, Any]]) -> list[str]: ...

    @staticmethod
    @abstractmethod
    def check(model: StreamedModel, settings: ShrinkSettings, axes: Mapping[str, Axis], max_memory: int | None) -> None:
        """Raise UserError for what cannot be, sizes apart, on the model as it is before any part of the call."""

    def finished(self, index: int, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """The block's tensors with the units that its rows keep."""
        return self._cut(state, index)

    def stored(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return tensors

    def outer(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """The tensors outside the blocks, which follow what holds for all of the model."""
        return self._cut(state, None)

    def _cut(self, state: dict[str, Tensor], index: int | None) -> dict[str, Tensor]:
        chosen: dict[str, Tensor] = {}
        for name in self.cut.axes:
            rows = [row for row in self.rows if row["block"] in (index, None) and row["axis"] == name]
            kept = [from_hex(row["kept"]) for row in rows]
            if kept:
                chosen[name] = kept[0] if rows[0]["expert"] is None else torch.stack(kept)
        return {name: self.cut.tensor(name, tensor, chosen) for name, tensor in state.items()}

    def config(self) -> dict[str, Any]:
        return new_config(self.model, self.cut.fields)

    def facts(self, rows: list[dict[str, Any]], num_zeros: int) -> dict[str, Any]:
        """Shapes before and after, all parts of the call so far taken together."""
        facts = shape_facts(self.model, [self.cut], self.settings)
        axes = self.of_call.get("axes", {}) | facts["axes"]
        return {**facts, **self.of_call, "axes": axes, "groups": rows}


def to_hex(keep_U: Tensor) -> str:
    """Which units stay, as hexadecimal digits of 4 units each, the first unit first."""
    bits = "".join("1" if kept else "0" for kept in keep_U.tolist())
    return "".join(f"{int(bits[i : i + 4].ljust(4, '0'), 2):x}" for i in range(0, len(bits), 4))


def from_hex(digits: str) -> Tensor:
    """The indices of the units that stay, ascending."""
    bits = "".join(f"{int(digit, 16):04b}" for digit in digits)
    return torch.tensor([unit for unit, bit in enumerate(bits) if bit == "1"])


def rounded_scores(score_U: Tensor) -> list[float]:
    """Scores for the record; of an axis with very many units, none."""
    return [float(f"{value:.6g}") for value in score_U.tolist()] if len(score_U) <= MOST_SCORES else []
