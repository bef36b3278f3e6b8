"""From a budget (`--parameters 0.8`, `--decode-bytes 0.8`) to a mix of KV groups and FFN channels.

For every number of KV groups the budget leaves one FFN width. One forward pass over the unchanged model tells, for
each block and axis, what any number of units fewer would cost: the squared output error that least squares cannot make
up for (second-order scores), relative to the energy of the residual stream it is added to. The mix with the lowest sum
over all blocks is taken.

Letters: U = units, R = units removed, N = sequences, T = tokens, H = hidden.
"""

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from prunus.calibration import HiddenStates, Tensors, walk
from prunus.errors import UserError
from prunus.models import StreamedModel
from prunus.models.axes import Axis, find_axes
from prunus.models.cut import plan_cut
from prunus.models.footprint import footprint
from prunus.models.spec import BlockSpec, Group, Stage
from prunus.settings_shrink import ShrinkSettings
from prunus.shrinking import WIDTH_SCORES, Units, choose_units
from prunus.sparsity import Statistics
from prunus.steps.shrink_sizes import MOST_MOVED, MULTIPLES
from prunus.steps.shrink_width_edit import axis_read, input_dim
from prunus.text.batches import TokenBatch

GROUPS = "kv_groups"
CHANNELS = ("expert_ffn", "ffn")  # the first that the model has
LEAST = 0.25  # of an axis that a mix may leave

Mix = dict[str, int]  # axis -> units that stay


def mixes(model: StreamedModel, settings: ShrinkSettings) -> list[Mix]:
    """Every mix that meets the budget, the one with most KV groups first. Raises UserError when none does."""
    axes = _axes(model)
    channels = next(name for name in CHANNELS if name in axes)
    all_groups = axes[GROUPS].units if GROUPS in axes else 1
    found = []
    for count in range(all_groups, math.ceil(LEAST * all_groups) - 1, -1):
        groups = {GROUPS: count} if count < all_groups else {}
        width = _width(model, settings, axes, channels, groups)
        if width is not None and width >= LEAST * axes[channels].units:
            found.append({**groups, channels: width})
    if not found:
        name, ratio = settings.budget or ("", 0.0)
        raise UserError(
            f"{name}={ratio} is out of reach by KV groups and FFN channels alone, of which a mix leaves at least a "
            "quarter; ask for more, or cut hidden width or layers too."
        )
    return found


def _axes(model: StreamedModel) -> dict[str, Axis]:
    axes, _ = find_axes(model.config, trust_remote_code=model.checkpoint.trust_remote_code)
    return {name: axis for name, axis in axes.items() if name == GROUPS or name in CHANNELS}


def _width(
    model: StreamedModel, settings: ShrinkSettings, axes: Mapping[str, Axis], channels: str, groups: Mix
) -> int | None:
    """The widest FFN within the budget beside so many groups; None when the architecture takes no such model.

    What a model weighs grows by the same amount with every channel.
    """
    assert settings.budget is not None
    units = axes[channels].units
    try:
        whole, half = (_weight(model, settings, axes, {**groups, channels: n}) for n in (units, units // 2))
        dense = _weight(model, settings, {}, {})
    except UserError:
        return None
    each = (whole - half) / (units - units // 2)
    wanted = math.floor(units - (whole - settings.budget[1] * dense) / each)
    if wanted >= units:
        return units
    bears = (m for m in MULTIPLES if units % m == 0 and wanted % m <= MOST_MOVED * wanted)
    multiple = settings.multiple_of or next(bears, 1)
    return wanted // multiple * multiple


def _weight(model: StreamedModel, settings: ShrinkSettings, axes: Mapping[str, Axis], mix: Mix) -> int:
    cut = plan_cut(
        model.config, {name: axes[name] for name in mix}, mix, trust_remote_code=model.checkpoint.trust_remote_code
    )
    assert settings.budget is not None
    weight: int = getattr(footprint(model, cut.after, cut.config), settings.budget[0])
    return weight


@dataclass
class CurveEdit:
    """An Edit that changes nothing: it notes what so many units fewer would cost in a block."""

    axes: Mapping[str, Axis]
    num_tokens: int
    losses: dict[str, Tensor] = field(default_factory=dict)  # axis -> (R): of one unit fewer, two, ...

    def needs_at(self, block: BlockSpec, stage: Stage) -> Collection[str] | None:
        return {"gram"} if axis_read(self.axes, block, stage.groups[0].linears[0]) else None

    def __call__(
        self, block: BlockSpec, group: Group, weights_OI: list[Tensor], statistics: Statistics, tensors: Tensors
    ) -> list[Tensor]:
        linear, weight_OI = group.linears[0], weights_OI[0]
        axis = axis_read(self.axes, block, linear)
        assert axis is not None
        if statistics.num_tokens:  # an expert that nobody calls costs nothing
            columns_UW = axis.positions(block.full_parameter(linear), input_dim(linear)).to(weight_OI.device)
            curve_R = _curve(Units(reader_OI=weight_OI.float(), columns_UW=columns_UW, statistics=statistics))
            share = statistics.num_tokens / self.num_tokens
            self.losses[axis.name] = self.losses.get(axis.name, torch.zeros_like(curve_R)) + share * curve_R
        return weights_OI


def _curve(units: Units) -> Tensor:
    """(R): the loss of the cheapest unit, of the two cheapest, ..., as they are removed one after the other."""
    choice = choose_units(WIDTH_SCORES["second-order"], units, max(1, math.floor(LEAST * units.num_units)))
    return choice.score_U[~choice.keep_U].sort().values.cumsum(0).cpu()


@torch.no_grad()
def choose_mix(model: StreamedModel, settings: ShrinkSettings, batch: TokenBatch) -> list[dict[str, Any]]:
    """The mixes with their loss, the best one first; of equal ones the one with more KV groups."""
    edit = CurveEdit(_axes(model), batch.tokens_NT.numel())
    totals: dict[str, Tensor] = {}
    for number, hidden in enumerate(walk(model, batch, "Budget", edit=edit)):
        if number:  # behind a block
            energy = _energy(hidden)
            for name, curve_R in edit.losses.items():
                totals[name] = totals.get(name, torch.zeros_like(curve_R)) + curve_R / energy
            edit.losses.clear()
    rows = [{"mix": mix, "loss": _loss(mix, edit.axes, totals)} for mix in mixes(model, settings)]
    return sorted(rows, key=lambda row: row["loss"])


def _energy(hidden: HiddenStates) -> float:
    """Mean squared norm of the residual stream."""
    energies = [float(states_TH.float().square().sum(1).mean()) for states_TH in hidden.states_NTH]
    return sum(energies) / len(energies)


def _loss(mix: Mix, axes: Mapping[str, Axis], totals: Mapping[str, Tensor]) -> float:
    removed = {name: axes[name].units - left for name, left in mix.items()}
    return sum(float(totals[name][count - 1]) for name, count in removed.items() if count)
