"""How many layers go, which of them may, and which runs of removed layers a choice leaves."""

from dataclasses import dataclass
from itertools import pairwise

from prunus.errors import UserError


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


def layer_budget(wish: int | float, depth: int, *, first: int, last: int, axis: str = "layers") -> LayerBudget:
    """How many of `depth` go when `wish` is to stay, the first and last ones being protected.

    Raises UserError for a wish that leaves no layer, more than there are, or reaches into protected ones.
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
            "protect fewer."
        )
    if kept < least:
        raise UserError(
            f"{axis}={wish} would leave {kept} of {depth}, but the first {first} and the last {last} are protected; "
            f"take {least} to {depth - 1}, or protect fewer."
        )
    return LayerBudget(depth, depth - kept, tuple(range(first, depth - last)))


def removed_runs(kept: list[int], depth: int) -> list[RemovedRun]:
    """The runs of layers that are not among `kept` (ascending), in order."""
    edges = [-1, *kept, depth]
    gaps = ((before, tuple(range(before + 1, after))) for before, after in pairwise(edges))
    return [RemovedRun(before, layers) for before, layers in gaps if layers]
