"""What every step that changes shapes plans, says and records: sizes before and after, and the new config."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from transformers import PretrainedConfig

from prunus.checkpoint.directory import read_raw_config
from prunus.models import StreamedModel
from prunus.models.axes import shapes_of
from prunus.models.configs import changed_config, edited_config
from prunus.models.cut import Cut, axes_named, granularity, plan_cut
from prunus.models.footprint import Footprint, footprint
from prunus.settings_shrink import ShrinkSettings
from prunus.steps.shrink_sizes import units_left


def planned_cut(config: PretrainedConfig, settings: ShrinkSettings, trust_remote_code: bool = False) -> Cut:
    """How many units are to stay on each axis that was asked for. Raises UserError for what cannot be."""
    axes = axes_named(config, settings.wishes, trust_remote_code=trust_remote_code)
    left = {}
    for name, wish in settings.wishes.items():
        grain = axes[name].runs
        if name == "hidden":
            grain = granularity(config, axes[name], trust_remote_code=trust_remote_code)
        left[name] = units_left(name, wish, axes[name].units, settings.multiple_of, grain)
    return plan_cut(config, axes, left, trust_remote_code=trust_remote_code)


def rounded(settings: ShrinkSettings, cut: Cut) -> list[str]:
    """Sentences on sizes that rounding moved away from what was asked."""
    said = []
    for name, wish in settings.wishes.items():
        units, left = cut.axes[name].units, cut.mean_left(name)
        wanted = wish if isinstance(wish, int) else wish * units
        if abs(left - wanted) >= 1:
            said.append(
                f"{name}: {wish} of {units} would be {wanted:g}; rounded to {left:g} ({left / units:.3f}). "
                "--multiple-of 1 takes what was asked."
            )
    return said


def differing(cut: Cut) -> list[str]:
    """Sentences on widths that are not the same in every layer."""
    said = []
    for name, own in cut.by_layer.items():
        least, most = min(own.values()), max(own.values())
        units = cut.axes[name].units
        said.append(f"{name}: layers keep {least} to {most} of {units}, {cut.mean_left(name):g} on average.")
    return said


def new_config(model: StreamedModel, fields: dict[str, Any]) -> dict[str, Any]:
    """The content of config.json of the smaller model."""
    return edited_config(read_raw_config(model.checkpoint.path), model.config, fields)


def shape_facts(model: StreamedModel, cuts: Sequence[Cut], settings: ShrinkSettings) -> dict[str, Any]:
    """What the record says of shapes: units along each axis and what the model weighs, before and after the cuts."""
    return {
        "axes": {
            name: {"asked": settings.wishes[name], "before": axis.units, **_left(cut, name)}
            for cut in cuts
            for name, axis in cut.axes.items()
        },
        "before": asdict(footprint(model, cuts[0].before, model.config)),
        "after": asdict(footprint(model, cuts[-1].after, cuts[-1].config)),
    }


def _left(cut: Cut, name: str) -> dict[str, Any]:
    """Units left: of every layer, or on average and layer by layer."""
    after = {"after": cut.mean_left(name)}
    own = cut.by_layer.get(name)
    return {**after, "per_layer": {str(layer): units for layer, units in own.items()}} if own else after


def weight_without_layers(
    model: StreamedModel, kept: Collection[int], fields: Mapping[str, Any], cut: Cut | None = None
) -> Footprint:
    """What the model weighs with these layers alone, after `cut` too; `fields` is what its config then says."""
    gone = tuple(f"{block.name}." for layer, block in enumerate(model.spec.blocks) if layer not in kept)
    config = cut.config if cut else model.config
    shapes = cut.after if cut else shapes_of(config, trust_remote_code=model.checkpoint.trust_remote_code)
    left = {name: shape for name, shape in shapes.items() if not gone or not name.startswith(gone)}
    return footprint(model, left, changed_config(config, fields))
