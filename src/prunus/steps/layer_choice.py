"""How many layers go, which of them may, and which runs of removed layers a choice leaves."""

from dataclasses import dataclass
from itertools import pairwise

from prunus.errors import UserError
from prunus.settings_shrink import LayersSettings
from prunus.shrinking import LAYER_SCORES


@dataclass(frozen=True, slots=True)
class LayerBudget:
    """A model of `depth` layers is to lose `count` of those that are `removable` (ascending)."""

    depth: int
    count: int
    removable: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class RemovedRun:
    """Neighbouring layers that go. `before` is the layer that stays in front of them; -1: they are the first."""

    before: int
    layers: tuple[int, ...]

    @property
    def boundary(self) -> int:
        """The number of the first layer behind the run."""
        return self.layers[-1] + 1


def layer_budget(settings: LayersSettings, depth: int) -> LayerBudget:
    """How many layers go; a score may protect more of them than the settings do. Raises UserError as `budget` does."""
    own = LAYER_SCORES[settings.score].protects
    first, last = max(settings.protect_first, own[0]), max(settings.protect_last, own[1])
    if (first, last) == (settings.protect_first, settings.protect_last):
        return budget("layers", settings.layers, depth, first, last)
    fewer = f"take another score: {settings.score} never removes the first {own[0]} and last {own[1]}"
    return budget("layers", settings.layers, depth, first, last, fewer)


def budget(
    axis: str, wish: int | float, depth: int, first: int, last: int, fewer: str = "protect fewer"
) -> LayerBudget:
    """How many of `depth` layers lose what `axis` names when `wish` is to stay; so many first and last ones do not.

    Raises UserError for a wish that leaves no layer, more than there are, or reaches into protected ones; `fewer` says
    how fewer would be.
    """
    kept = wish if isinstance(wish, int) else round(wish * depth)
    least = max(first + last, 1)
    if kept > depth:
        raise UserError(f"{axis}={wish} was asked for, but the model has {depth}; take {least} to {depth - 1}.")
    if kept == depth:
        raise UserError(f"{axis}={wish} keeps all {depth} layers; take {least} to {depth - 1}, or a ratio below 1.")
    if least > depth - 1:
        raise UserError(
            f"{axis}={wish} was asked for, but the first {first} and the last {last} of {depth} layers are protected; "
            f"{fewer}."
        )
    if kept < least:
        raise UserError(
            f"{axis}={wish} would leave {kept} of {depth}, but the first {first} and the last {last} are protected; "
            f"take {least} to {depth - 1}, or {fewer}."
        )
    return LayerBudget(depth, depth - kept, tuple(range(first, depth - last)))


def removed_runs(kept: list[int], depth: int) -> list[RemovedRun]:
    """The runs of layers that are not among `kept` (ascending), in order."""
    edges = [-1, *kept, depth]
    gaps = ((before, tuple(range(before + 1, after))) for before, after in pairwise(edges))
    return [RemovedRun(before, layers) for before, layers in gaps if layers]
