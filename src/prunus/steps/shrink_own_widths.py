"""How wide each layer is to be (`prunus shrink --per-layer`), chosen on the dense model before anything is cut.

The layers keep together what they would keep if all were alike, so a model of own widths has as many parameters.

Letters: U = units.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from prunus.calibration import Tensors, walk
from prunus.errors import UserError
from prunus.models import StreamedModel
from prunus.models.cut import ByLayer, Cut
from prunus.models.spec import BlockSpec, Group, Stage
from prunus.settings_shrink import ShrinkSettings
from prunus.shrinking import WIDTH_SCORES, choose_units
from prunus.shrinking.own_widths import pooled_widths
from prunus.shrinking.units import FROM_THE_LOSS
from prunus.sparsity import Statistics
from prunus.sparsity.allocation import by_sensitivity
from prunus.steps.held_out import spread
from prunus.steps.sensitivity import kl_of_each
from prunus.steps.shrink_budget import LEAST
from prunus.steps.shrink_gradients import from_the_loss
from prunus.steps.shrink_sizes import MULTIPLES, WIDTHS
from prunus.steps.shrink_width_edit import WidthEdit, axis_read, number_of
from prunus.text.batches import TokenBatch


@dataclass(frozen=True, slots=True)
class WidthBudget:
    """One axis: the layers that are `free` to differ share `total` units, in steps of `multiple`."""

    units: int  # of every layer as it is
    layers: tuple[int, ...]  # that have the axis
    free: tuple[int, ...]
    multiple: int
    total: int

    def by_layer(self, of_free: Sequence[int]) -> dict[int, int]:
        """Layer -> units that stay, protected layers included."""
        return {**dict.fromkeys(self.layers, self.units), **dict(zip(self.free, of_free, strict=True))}


def width_budgets(model: StreamedModel, settings: ShrinkSettings, cut: Cut) -> dict[str, WidthBudget]:
    """By axis. Raises UserError when experts have it, or protected layers leave too little for the others."""
    depth = len(model.spec.blocks)
    return {name: _budget(name, _layers_with(model, cut, name), depth, settings, cut) for name in cut.axes}


def _layers_with(model: StreamedModel, cut: Cut, name: str) -> tuple[int, ...]:
    axes, found = {name: cut.axes[name]}, []
    for block in model.spec.blocks:
        readers = [linear for linear in block.linears if axis_read(axes, block, linear)]
        if any(linear.expert is not None for linear in readers):
            raise UserError(
                f"{name} of {model.spec.family} is that of its experts, which keep one width in all layers; leave "
                "--per-layer out."
            )
        found += [number_of(block)] if readers else []
    return tuple(found)


def _budget(name: str, layers: tuple[int, ...], depth: int, settings: ShrinkSettings, cut: Cut) -> WidthBudget:
    units, left = cut.axes[name].units, cut.left[name]
    free = tuple(n for n in layers if settings.protect_first <= n < depth - settings.protect_last)
    multiple = _multiple(name, units, left, settings.multiple_of)
    wanted = left * len(layers) - units * (len(layers) - len(free))
    total = min(round(wanted / multiple), units // multiple * len(free)) * multiple
    if not free or total < multiple * len(free):
        raise UserError(
            f"{name}={settings.wishes[name]} leaves {left} of {units} on average, but {len(layers) - len(free)} of "
            f"{len(layers)} layers are protected and keep all, so the others would keep less than {multiple} each; "
            "ask for more, or lower --protect-first and --protect-last."
        )
    return WidthBudget(units, layers, free, multiple, total)


def _multiple(name: str, units: int, left: int, multiple_of: int | None) -> int:
    """Steps in which layers differ: what was asked, or the largest that both widths are multiples of."""
    if name not in WIDTHS:
        return 1
    return multiple_of or next((m for m in MULTIPLES if units % m == 0 and left % m == 0), 1)


def own_widths(model: StreamedModel, settings: ShrinkSettings, cut: Cut, batch: TokenBatch) -> ByLayer:
    """The widths that the settings ask for, chosen on calibration text."""
    budgets = width_budgets(model, settings, cut)
    choose = {"global": _by_scores, "sensitivity": _by_harm}[settings.per_layer]
    return choose(model, settings, cut, budgets, batch)


Budgets = Mapping[str, WidthBudget]


def _by_scores(
    model: StreamedModel, settings: ShrinkSettings, cut: Cut, budgets: Budgets, batch: TokenBatch
) -> ByLayer:
    """Units of all layers compete by their scores, standardised layer by layer."""
    edit = ScoreEdit(_width_edit(model, settings, cut, batch), budgets)
    with torch.no_grad():
        for _ in walk(model, batch, "Widths", edit=edit):
            pass  # the edit notes what it sees
    pooled = {
        name: pooled_widths([edit.scores[name, layer] for layer in budget.free], budget.total, budget.multiple)
        for name, budget in budgets.items()
    }
    return {name: budget.by_layer(pooled[name]) for name, budget in budgets.items()}


def _by_harm(model: StreamedModel, settings: ShrinkSettings, cut: Cut, budgets: Budgets, batch: TokenBatch) -> ByLayer:
    """Layers whose cut alone, to the same width, changes the predictions most keep most."""
    few = spread(batch, range(len(batch.tokens_NT)))
    found: ByLayer = {}
    for name, budget in budgets.items():
        alone = replace(cut, axes={name: cut.axes[name]}, left={name: cut.left[name]})
        edit = _width_edit(model, settings, alone, few)
        where = [(n, f"{name} of {model.spec.blocks[n].name}", edit) for n in budget.free]
        harm = dict(zip(budget.free, kl_of_each(model, few.tokens_NT, where), strict=True))
        found[name] = budget.by_layer(_widths_by_harm(budget, harm))
    return found


def _widths_by_harm(budget: WidthBudget, harm: Mapping[int, float]) -> list[int]:
    """Equal harm of the last step in every free layer; see `by_sensitivity`."""
    steps = budget.units // budget.multiple
    sizes = {str(layer): steps for layer in budget.free}
    share = 1 - budget.total / (budget.multiple * steps * len(budget.free))
    gone = by_sensitivity(sizes, {str(layer): max(kl, 1e-9) for layer, kl in harm.items()}, share)
    return [(steps - gone[str(layer)]) * budget.multiple for layer in budget.free]


def _width_edit(model: StreamedModel, settings: ShrinkSettings, cut: Cut, batch: TokenBatch) -> WidthEdit:
    score = WIDTH_SCORES[settings.score]
    return WidthEdit(score, settings.refit, cut, from_the_loss(model, cut.axes, batch, score.needs))


@dataclass
class ScoreEdit:
    """An Edit that changes nothing: it notes what every unit is worth."""

    widths: WidthEdit
    budgets: Budgets
    scores: dict[tuple[str, int], Tensor] = field(default_factory=dict)  # (axis, layer) -> (U)

    def needs_at(self, block: BlockSpec, stage: Stage) -> Collection[str] | None:
        if axis_read(self.widths.cut.axes, block, stage.groups[0].linears[0]) is None:
            return None
        return set(self.widths.score.needs) - FROM_THE_LOSS

    def __call__(
        self, block: BlockSpec, group: Group, weights_OI: list[Tensor], statistics: Statistics, tensors: Tensors
    ) -> list[Tensor]:
        linear = group.linears[0]
        axis = axis_read(self.widths.cut.axes, block, linear)
        assert axis is not None
        units = self.widths.units(axis, block, linear, weights_OI[0], statistics, tensors)
        least = max(self.budgets[axis.name].multiple, math.ceil(LEAST * axis.units))
        choice = choose_units(self.widths.score, units, min(least, axis.units))
        self.scores[axis.name, number_of(block)] = choice.score_U.cpu()
        return weights_OI
