"""A smaller model of the same architecture: planned and checked before any weight is read, then cut tensor by tensor.

Letters: U = units that stay, E = experts.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

import torch
from torch import Tensor
from transformers import PretrainedConfig

from prunus.checkpoint.per_layer import KEY
from prunus.errors import UserError
from prunus.models.axes import Axis, find_axes, shapes_of
from prunus.models.configs import changed_config

ByLayer: TypeAlias = dict[str, dict[int, int]]  # axis -> layer -> units left

_REACH = 128  # how far from a size that the architecture refuses an allowed one is looked for
_REFUSES = (UserError, ValueError, RuntimeError, ZeroDivisionError)  # what configs and models raise for bad sizes


@dataclass(frozen=True, slots=True)
class Cut:
    """How many units are left on each axis, and what the smaller model looks like."""

    axes: dict[str, Axis]
    left: dict[str, int]
    before: dict[str, tuple[int, ...]]  # parameter -> its shape
    after: dict[str, tuple[int, ...]]  # and that in the smaller model
    config: PretrainedConfig  # of the smaller model
    by_layer: ByLayer = field(default_factory=dict)  # where layers keep different numbers

    @property
    def fields(self) -> dict[str, Any]:
        """The config's fields of the smaller model, by the names that transformers gives them."""
        return _own_fields(self, self.by_layer) if self.by_layer else _fields(self.axes, self.left)

    def left_in(self, axis: str, layer: int) -> int:
        """How many units are left in one layer."""
        return self.by_layer.get(axis, {}).get(layer, self.left[axis])

    def mean_left(self, axis: str) -> int | float:
        """How many units are left on average over the layers that have some; a whole number where it is one."""
        counts = list(self.by_layer.get(axis, {0: self.left[axis]}).values())
        mean = sum(counts) / len(counts)
        return int(mean) if mean.is_integer() else mean

    def tensor(self, parameter: str, tensor: Tensor, chosen: dict[str, Tensor]) -> Tensor:
        """One parameter with only the chosen units left: axis -> indices, ascending, (U) or, of each expert, (E, U)."""
        for name, units in chosen.items():
            axis = self.axes[name]
            if units.ndim == 1:
                tensor = axis.cut(parameter, tensor, units)
            elif parameter in axis.elements:
                pieces = (axis.cut(parameter, tensor[e : e + 1], units[e]) for e in range(len(units)))
                tensor = torch.cat(list(pieces))
        return tensor


def axes_named(config: PretrainedConfig, names: Iterable[str], *, trust_remote_code: bool = False) -> dict[str, Axis]:
    """The axes of these names. Raises UserError, with the reason, for one that the architecture has not."""
    axes, refused = find_axes(config, trust_remote_code=trust_remote_code)
    for name in names:
        if name not in axes:
            reason = refused.get(name, f"{config.model_type} has none")
            raise UserError(f"this model cannot be cut along {name}: {reason}; it can along {', '.join(axes)}.")
    return {name: axes[name] for name in names}


def plan_cut(
    config: PretrainedConfig, axes: dict[str, Axis], left: dict[str, int], *, trust_remote_code: bool = False
) -> Cut:
    """Plan a cut to so many units on each axis. Raises UserError when the architecture has no model of that size."""
    for name, axis in axes.items():
        if left[name] % axis.runs:
            raise UserError(
                f"{name}={left[name]} does not divide among {axis.runs} KV groups, which keep as many each; take a "
                f"multiple of {axis.runs}."
            )
    try:
        smaller = changed_config(config, _fields(axes, left))
        after = shapes_of(smaller, trust_remote_code=trust_remote_code)
    except _REFUSES as error:
        raise _refusal(config, axes, left, trust_remote_code, error) from error
    before = shapes_of(config, trust_remote_code=trust_remote_code)
    cut = Cut(axes, dict(left), before, after, smaller)
    _check_shapes(cut)
    return cut


def with_own_widths(config: PretrainedConfig, cut: Cut, by_layer: ByLayer, *, trust_remote_code: bool = False) -> Cut:
    """The same cut with a number of units for each layer on its axes, in place of one for all."""
    smaller = changed_config(config, _own_fields(cut, by_layer))
    after = shapes_of(smaller, trust_remote_code=trust_remote_code)
    found = replace(cut, after=after, config=smaller, by_layer=by_layer)
    _check_shapes(found)
    return found


def _own_fields(cut: Cut, by_layer: ByLayer) -> dict[str, Any]:
    """For each layer the config's fields of its widths; a layer without units of an axis has what the model has."""
    depth = cut.config.get_text_config(decoder=True).num_hidden_layers
    layers = [
        {name: own[layer] if layer in own else cut.axes[name].units for name, own in by_layer.items()}
        for layer in range(depth)
    ]
    return {KEY: [_fields(cut.axes, left) for left in layers]}


def _fields(axes: dict[str, Axis], left: dict[str, int]) -> dict[str, int]:
    return {key: value for name, axis in axes.items() for key, value in axis.config_fields(left[name]).items()}


def _check_shapes(cut: Cut) -> None:
    """The axes were found by taking one step; make sure that they hold for this one."""
    for name, shape in cut.before.items():
        layer = _layer_of(name)
        chosen = {axis: _first_of_each_run(cut.axes[axis], cut.left_in(axis, layer)) for axis in cut.axes}
        found = tuple(cut.tensor(name, torch.empty(shape, dtype=torch.uint8, device="meta"), chosen).shape)
        assert found == cut.after[name], f"{name}: {found}, the smaller model has {cut.after[name]}"


def _layer_of(parameter: str) -> int:
    """The first number in a parameter's name is that of its layer; -1 for one without."""
    return next((int(part) for part in parameter.split(".") if part.isdigit()), -1)


def _first_of_each_run(axis: Axis, count: int) -> Tensor:
    return torch.arange(axis.units).view(axis.runs, -1)[:, : count // axis.runs].flatten()


def _refusal(
    config: PretrainedConfig, axes: dict[str, Axis], left: dict[str, int], trust_remote_code: bool, error: Exception
) -> UserError:
    """The sentence that names the sizes around the wanted one that the architecture takes."""
    reason = " ".join(str(error).split())
    for name, axis in axes.items():
        if not _takes(config, axis, left[name], trust_remote_code):
            below = range(left[name] - 1, max(0, left[name] - _REACH), -1)
            above = range(left[name] + 1, min(axis.units, left[name] + _REACH) + 1)
            near = [_first(config, axis, counts, trust_remote_code) for counts in (below, above)]
            allowed = " and ".join(str(count) for count in near if count) or "none"
            return UserError(
                f"{config.model_type} takes no {name} of {left[name]} ({reason}); the nearest it takes: {allowed}."
            )
    return UserError(f"{config.model_type} takes no model with {left} ({reason}); ask for other sizes.")


def _first(config: PretrainedConfig, axis: Axis, counts: range, trust_remote_code: bool) -> int | None:
    return next((count for count in counts if _takes(config, axis, count, trust_remote_code)), None)


def _takes(config: PretrainedConfig, axis: Axis, count: int, trust_remote_code: bool) -> bool:
    try:
        shapes_of(changed_config(config, axis.config_fields(count)), trust_remote_code=trust_remote_code)
    except _REFUSES:
        return False
    return True


def granularity(config: PretrainedConfig, axis: Axis, *, trust_remote_code: bool = False) -> int:
    """The smallest number of units that the architecture can be without: Llama's width divides by its heads."""
    divisors = (n for n in range(1, axis.units) if axis.units % n == 0)
    return next((n for n in divisors if _takes(config, axis, axis.units - n, trust_remote_code)), axis.units)
