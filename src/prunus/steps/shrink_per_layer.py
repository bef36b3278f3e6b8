"""`prunus shrink --per-layer`: the better of two models, one of own widths, one with the same width in every layer.

Which is better, KL to the model they came from says, on calibration windows that neither has seen. Both are ordinary
shrink steps in `OUT.steps/`, so an interrupted call goes on where it stopped; the better one then gets the name.
"""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prunus.checkpoint import Checkpoint, OutputDirectory
from prunus.checkpoint.output import full_disk_is_an_error, sync_directory
from prunus.checkpoint.per_layer import OPENED_BY
from prunus.checkpoint.record import RECORD_NAME, read_record, write_json
from prunus.errors import UserError
from prunus.models import StreamedModel
from prunus.models.cut import ByLayer, Cut
from prunus.progress import say
from prunus.settings_shrink import ShrinkSettings
from prunus.steps.block_job import BlockJob
from prunus.steps.calibration_text import calibration_batch
from prunus.steps.held_out import held_out_kl, held_out_windows
from prunus.steps.identity import identity
from prunus.steps.shrink_own_widths import own_widths, width_budgets
from prunus.steps.shrink_shapes import planned_cut
from prunus.steps.shrink_width import WidthStep

UNIFORM = "uniform"
TIER = f"the layers of this result differ in width: {OPENED_BY}."
ORDINARY = (
    "with the same width in every layer the model loses no more on held-out text, so that is what was kept: an "
    "ordinary checkpoint, which transformers and engines open."
)
WILL = (
    f"per-layer widths: {OPENED_BY}. Two complete models are made, one of that kind and an ordinary one with the same "
    "width in every layer; the better on held-out text is kept."
)


def check_per_layer(model: StreamedModel, settings: ShrinkSettings, cut: Cut) -> None:
    """Raise UserError for what cannot be, before weights are read."""
    check_tier(model)
    width_budgets(model, settings, cut)


def check_tier(model: StreamedModel) -> None:
    """Raise UserError for a model of which no result with layers that differ could be opened."""
    if model.checkpoint.trust_remote_code and getattr(model.config, "auto_map", None):
        raise UserError(
            f"{model.checkpoint.path} brings code of its own, so layers of its results cannot differ; leave "
            "--per-layer, --attention and --mlp out."
        )


@dataclass(frozen=True, kw_only=True)
class PerLayerCall:
    """One call of shrink with own widths. `request` is what the record calls it, `between` where trials are made."""

    checkpoint: Checkpoint
    settings: ShrinkSettings
    model: StreamedModel
    place: Path
    between: Path
    max_memory: int | None
    request: str

    def run(self) -> None:
        """Make OUT. Raises UserError when the text has no window left to judge on."""
        held_out = held_out_windows(self.model, self.settings)
        self._make(UNIFORM, self.settings.model_copy(update={"per_layer": UNIFORM}), {})
        self._make(self.settings.per_layer, self.settings, self._widths())
        names = (UNIFORM, self.settings.per_layer)
        kls = {n: held_out_kl(self.model, self.between / n, held_out, self.max_memory) for n in names}
        better = min(kls, key=lambda name: (kls[name], name != UNIFORM))
        facts = {"of": "width", "asked": self.settings.per_layer, "used": better, "held_out_kl": kls}
        self._record(better, {**facts, "held_out_windows": len(held_out.tokens_NT)})
        (self.between / better).rename(self.place)
        sync_directory(self.place.parent)
        shutil.rmtree(self.between, ignore_errors=True)

    def _make(self, name: str, settings: ShrinkSettings, widths: ByLayer) -> None:
        output = OutputDirectory(self.between / name, self.checkpoint, {**identity(settings), "widths": _keys(widths)})
        if output.is_done:
            return
        step = WidthStep(settings, self._fresh_model(), widths)
        step.of_call, step.max_memory = {"request": self.request}, self.max_memory
        with output:
            BlockJob(step.model, step, self.max_memory).run(output)

    def _fresh_model(self) -> StreamedModel:
        return StreamedModel(self.checkpoint, dtype=self.model.dtype, device=str(self.model.device))

    def _widths(self) -> ByLayer:
        """Chosen once: a call that goes on uses the same ones."""
        file = self.between / f"widths-{self.request[:16]}.json"
        if not file.exists():
            trust = self.checkpoint.trust_remote_code
            cut = planned_cut(self.model.config, self.settings, trust)
            widths = own_widths(self.model, self.settings, cut, calibration_batch(self.model, self.settings))
            with full_disk_is_an_error(self.place):
                write_json(file, _keys(widths))
        found = json.loads(file.read_text(encoding="utf-8"))
        return {axis: {int(layer): units for layer, units in own.items()} for axis, own in found.items()}

    def _record(self, name: str, facts: dict[str, Any]) -> None:
        """Give the better one's record what was asked for, and why it is what it is."""
        directory = self.between / name
        record = read_record(directory)
        assert record is not None
        last = record["history"][-1]
        said = ORDINARY if name == UNIFORM else TIER
        notices = [*(note for note in last["notices"] if note not in (ORDINARY, TIER)), said]
        last |= {"settings": self.settings.model_dump(mode="json"), "allocation": facts, "notices": notices}
        write_json(directory / RECORD_NAME, record)
        say([said])


def _keys(widths: ByLayer) -> dict[str, dict[str, int]]:
    """As JSON has them."""
    return {axis: {str(layer): units for layer, units in own.items()} for axis, own in widths.items()}
