"""`prunus.shrink`: model directory in, a model of smaller shapes out, an ordinary checkpoint of its architecture.

Several axes in one call are cut one kind after the other, each on the result of the one before: first what the whole
model decides (layers, hidden width, experts), last what each block can make up for by itself (KV groups, FFN channels).
"""

import json
import shutil
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import PretrainedConfig

from prunus.checkpoint import Checkpoint, OutputDirectory, open_checkpoint, open_dense, read_record
from prunus.checkpoint.output import check_place, fingerprint, full_disk_is_an_error
from prunus.checkpoint.per_layer import layer_fields
from prunus.checkpoint.record import write_json
from prunus.errors import UserError
from prunus.machine_choice import DTYPES, choose_device, choose_dtype, parse_memory
from prunus.models import StreamedModel
from prunus.models.cut import Cut, axes_named
from prunus.result import Run
from prunus.settings_shrink import AXES, LayersSettings, ShrinkSettings
from prunus.steps.block_job import BlockJob
from prunus.steps.calibration_text import calibration_batch
from prunus.steps.identity import identity
from prunus.steps.layer_job import LayerJob
from prunus.steps.layer_step import LayersStep
from prunus.steps.length import fit_length
from prunus.steps.remove_sublayers import SublayerStep
from prunus.steps.shrink_budget import Mix, choose_mix, mixes
from prunus.steps.shrink_observed import ObservedStep
from prunus.steps.shrink_per_layer import UNIFORM, PerLayerCall, check_per_layer, check_tier
from prunus.steps.shrink_shapes import planned_cut
from prunus.steps.shrink_step import CutStep
from prunus.steps.shrink_width import AXES as WIDTHS
from prunus.steps.shrink_width import QUERY_HEADS, WidthStep

# In the order they are cut: the axes of each kind, and the step that cuts them
KINDS: tuple[tuple[tuple[str, ...], type[CutStep]], ...] = (
    (("hidden",), ObservedStep),
    (("experts",), ObservedStep),
    (WIDTHS, WidthStep),
    (QUERY_HEADS, WidthStep),
)


def shrink(
    model: str | Path,
    out: str | Path,
    *,
    max_memory: str | int | None = None,
    trust_remote_code: bool = False,
    **settings: Any,
) -> Run:
    """Write a smaller copy of `model` to `out`, which opens in plain transformers.

    The exceptions are `per_layer`, `attention` and `mlp`: layers that differ open in `prunus.load` and prunus alone.
    `settings` are the fields of `ShrinkSettings`: what stays along each axis (ffn=0.75, kv_groups=2, ...), score,
    refit, calibration, ... The same call again goes on where an interrupted one stopped, and returns at once when `out`
    is already its result. Raises UserError for anything the user can mend, before weights are read.
    """
    call = ShrinkCall(model, out, max_memory, trust_remote_code, settings)
    if call.is_done:
        return Run.open(call.place, reused=True)
    call.check()
    return call.run()


class ShrinkCall:
    """One call of `shrink`, checked as far as names and settings go."""

    def __init__(
        self, model: str | Path, out: str | Path, max_memory: str | int | None, trust: bool, settings: dict[str, Any]
    ) -> None:
        checked = ShrinkSettings.check(**settings)
        self.checkpoint = open_dense(model, trust_remote_code=trust)
        self.settings = fit_length(checked, self.checkpoint.config)
        self.place, self.max_memory = Path(out).expanduser().absolute(), parse_memory(max_memory)
        check_place(self.place, self.checkpoint.path)
        if layer_fields(self.checkpoint.config) is not None:
            raise UserError(
                f"the layers of {self.checkpoint.path} differ already; shrink the model that it was made from."
            )

    @cached_property
    def request(self) -> str:
        """What decides the content of OUT, all parts of the call together."""
        return fingerprint(identity(self.settings), self.checkpoint)

    @cached_property
    def dtype(self) -> torch.dtype:
        """The forward dtype of all parts. Measured once, as two measurements may come out differently."""
        width_H = int(self.checkpoint.config.get_text_config(decoder=True).hidden_size)
        return choose_dtype(self.settings.dtype, choose_device(self.settings.device), width_H)

    @property
    def is_done(self) -> bool:
        """Whether OUT is the result of this call. Raises UserError when it is something else."""
        if not self.place.exists():
            return False
        record = read_record(self.place) if self.place.is_dir() else None
        if record and record["history"] and record["history"][-1].get("request") == self.request:
            return True
        raise UserError(
            f"{self.place} exists and is not the result of these settings; remove it or choose another OUT."
        )

    def check(self) -> tuple[StreamedModel, list[Cut]]:
        """The model, and the cuts that will be made. Raises UserError for what cannot be."""
        trust = self.checkpoint.trust_remote_code
        model = self._streamed(self.checkpoint)
        settings = self.settings
        if settings.sublayers:
            check_tier(model)
            SublayerStep(settings, model)
            return model, []
        if settings.budget:
            settings = with_mix(settings, mixes(model, settings)[0])
        if settings.layers is not None:
            LayersStep(settings.of_layers, self.checkpoint, self.dtype).check_memory(self.max_memory)
        for part in parts(settings):
            axes = axes_named(model.config, part.wishes, trust_remote_code=trust)
            kind_of(part).check(model, part, axes, self.max_memory)
        cuts = plan_cuts(model.config, settings, trust)
        if self.has_own_widths:
            check_per_layer(model, settings, cuts[0])
        return model, cuts

    @property
    def has_own_widths(self) -> bool:
        """Whether layers may differ in width."""
        return self.settings.per_layer != UNIFORM

    def run(self) -> Run:
        """Each part on the result of the one before. What lies between is removed once OUT is there."""
        between = Path(f"{self.place}.steps")
        if self.has_own_widths:
            self._per_layer(between).run()
            return Run.open(self.place)
        if self.settings.sublayers:
            return self._without_sublayers()
        settings, mixes_seen = self._resolved(between)
        of_layers = [] if settings.layers is None else [settings.of_layers]
        todo: list[ShrinkSettings | LayersSettings] = [*of_layers, *parts(settings)]
        checkpoint, said = self.checkpoint, {"request": self.request, **({"mixes": mixes_seen} if mixes_seen else {})}
        for number, part in enumerate(todo, start=1):
            target = self.place if number == len(todo) else between / f"{number}-{_name(part)}"
            output = OutputDirectory(target, checkpoint, identity(part))
            if not output.is_done:
                with output:
                    self._make(part, checkpoint, output, said)
            checkpoint = open_checkpoint(target, trust_remote_code=checkpoint.trust_remote_code)
            done = Run.open(target).last_step
            self.dtype = DTYPES[done["dtype"]]  # a call that goes on takes that of the one before it
            said |= {"axes": done["axes"], "before": done["before"]}
        shutil.rmtree(between, ignore_errors=True)
        return Run.open(self.place)

    def _without_sublayers(self) -> Run:
        output = OutputDirectory(self.place, self.checkpoint, identity(self.settings))
        step = SublayerStep(self.settings, self._streamed(self.checkpoint))
        step.of_call = {"request": self.request}
        with output:
            BlockJob(step.model, step, self.max_memory).run(output)
        return Run.open(self.place)

    def _per_layer(self, between: Path) -> PerLayerCall:
        return PerLayerCall(
            checkpoint=self.checkpoint,
            settings=self.settings,
            model=self._streamed(self.checkpoint),
            place=self.place,
            between=between,
            max_memory=self.max_memory,
            request=self.request,
        )

    def _make(
        self,
        part: ShrinkSettings | LayersSettings,
        checkpoint: Checkpoint,
        output: OutputDirectory,
        said: dict[str, Any],
    ) -> None:
        """`said` is what the record says of the whole call: the request, and the shapes before this part."""
        if isinstance(part, LayersSettings):
            LayerJob(LayersStep(part, checkpoint, self.dtype), output, self.max_memory, said).run()
            return
        step = kind_of(part)(part, self._streamed(checkpoint))
        step.of_call, step.max_memory = said, self.max_memory
        BlockJob(step.model, step, self.max_memory).run(output)

    def _streamed(self, checkpoint: Checkpoint) -> StreamedModel:
        return StreamedModel(checkpoint, dtype=self.dtype, device=choose_device(self.settings.device))

    def _resolved(self, between: Path) -> tuple[ShrinkSettings, list[dict[str, Any]]]:
        """The settings with the mix that the budget leads to, and what it was chosen from; an earlier choice holds."""
        if not self.settings.budget:
            return self.settings, []
        file, found = between / f"mix-{self.request[:16]}.json", []
        if file.exists():
            found = json.loads(file.read_text(encoding="utf-8"))
        else:
            model = self._streamed(self.checkpoint)
            found = choose_mix(model, self.settings, calibration_batch(model, self.settings))
            with full_disk_is_an_error(self.place):
                between.mkdir(parents=True, exist_ok=True)
                write_json(file, found)
        return with_mix(self.settings, found[0]["mix"]), found


def _name(part: ShrinkSettings | LayersSettings) -> str:
    return "layers" if isinstance(part, LayersSettings) else next(iter(part.wishes))


def with_mix(settings: ShrinkSettings, mix: Mix) -> ShrinkSettings:
    """The settings with sizes in place of the budget."""
    return settings.model_copy(update={"parameters": None, "decode_bytes": None, **mix})


def parts(settings: ShrinkSettings) -> list[ShrinkSettings]:
    """The settings of each step on the way, every one with the axes of its kind alone, and what decides on them."""
    found = []
    for axes, _ in KINDS:
        if set(axes) & set(settings.wishes):
            others = [axis for axis in AXES if axis not in axes]
            unused = [*others, *(["expert_score"] if "experts" in others else [])]
            found.append(settings.model_copy(update=dict.fromkeys(unused)))
    return found


def plan_cuts(config: PretrainedConfig, settings: ShrinkSettings, trust_remote_code: bool = False) -> list[Cut]:
    """One cut per part, each planned on the config that the one before leaves. Raises UserError for what cannot be."""
    cuts: list[Cut] = []
    if settings.budget:
        return cuts  # the sizes are known only after the model was seen
    for part in parts(settings):
        cuts.append(planned_cut(cuts[-1].config if cuts else config, part, trust_remote_code))
    return cuts


def kind_of(part: ShrinkSettings) -> type[CutStep]:
    """The step that cuts the axes of a part."""
    return next(step for axes, step in KINDS if set(axes) & set(part.wishes))
