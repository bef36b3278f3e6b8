"""The axes along which a model can be made smaller, read off the architecture itself.

transformers builds every shape from the config. So two models on the meta device, one from the config as it is and one
from a config with one field changed, show which dimensions of which parameters belong to that field: the coupled group
that must be cut together. No family is written down here. Only the order inside fused matrices is stated nowhere and
has to be known by name.

A unit is what goes or stays as a whole: a channel of the FFN, a KV group with its query heads, a dimension of the
residual stream, an expert.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig

from prunus.checkpoint.per_layer import layer_fields
from prunus.errors import UserError
from prunus.models.configs import changed_config
from prunus.models.scales import added_by_norms, embedding_scale
from prunus.models.skeleton import build_skeleton, restore_buffers
from prunus.models.trace import find_blocks, trace_model

FFN_FIELDS = {  # config field -> axis
    "intermediate_size": "ffn",
    "ffn_dim": "ffn",
    "n_inner": "ffn",
    "moe_intermediate_size": "expert_ffn",
    "shared_expert_intermediate_size": "shared_ffn",
}
EXPERT_FIELDS = ("num_experts", "num_local_experts", "n_routed_experts")
FUSED = {"qkv_proj": ("q", "k", "v"), "gate_up_proj": ("gate", "up")}  # parts that follow each other


@dataclass(frozen=True, slots=True)
class Segment:
    """A stretch of one dimension: unit u is at `start + u * width` to `start + (u + 1) * width`."""

    start: int
    width: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Axis:
    """One way to cut a model: `units` of them now, and where each is in every parameter it reaches."""

    name: str
    units: int
    per_unit: dict[str, int]  # config fields that count units, and how many each unit is worth
    fixed: dict[str, int] = field(default_factory=dict)  # config fields that must be written down before the cut
    runs: int = 1  # units fall into so many runs of equal length, each of which keeps as many
    segments: dict[tuple[str, int], tuple[Segment, ...]] = field(default_factory=dict)  # (parameter, dimension) -> ...
    elements: dict[str, int] = field(default_factory=dict)  # of each parameter, how many go with one unit
    rescaled: dict[str, float] = field(default_factory=dict)  # weight whose use depends on the width -> what is added

    def config_fields(self, units: int) -> dict[str, int]:
        """The config's fields when `units` are left."""
        return self.fixed | {name: units * worth for name, worth in self.per_unit.items()}

    def positions(self, parameter: str, dim: int) -> Tensor:
        """(U, n): where each unit is along a dimension of a parameter."""
        units_U1 = torch.arange(self.units)[:, None]
        parts = (s.start + units_U1 * s.width + torch.arange(s.width) for s in self.segments[parameter, dim])
        return torch.cat(list(parts), dim=1)

    def cut(self, parameter: str, tensor: Tensor, units_U: Tensor) -> Tensor:
        """Return `tensor` with only the units of `units_U` (indices, ascending) left; itself when not on this axis.

        A norm over the axis divides by a root mean square, which rises when units without energy leave the mean, and
        some families scale embeddings by the root of the width: those weights make up for it, so that a cut of units
        that are zero changes nothing.
        """
        for name, dim in self.segments:
            if name == parameter:
                tensor = tensor.index_select(dim, self._stays(name, dim, tensor.shape[dim], units_U).to(tensor.device))
        if parameter in self.rescaled and len(units_U) < self.units:
            added = self.rescaled[parameter]
            tensor = ((tensor + added) * math.sqrt(self.units / len(units_U)) - added).to(tensor.dtype)
        return tensor

    def _stays(self, parameter: str, dim: int, size: int, units_U: Tensor) -> Tensor:
        """Indices along a dimension that stay: those of the chosen units, and what belongs to no unit."""
        positions_Un = self.positions(parameter, dim)
        stays = torch.ones(size, dtype=torch.bool)
        stays[positions_Un.flatten()] = False
        stays[positions_Un[units_U].flatten()] = True
        return stays.nonzero()[:, 0]


def find_axes(config: PretrainedConfig, *, trust_remote_code: bool = False) -> tuple[dict[str, Axis], dict[str, str]]:
    """Return (the axes that this architecture can be cut along, why the others cannot be), both by name.

    Raises UserError when the model itself is not understood.
    """
    text = config.get_text_config(decoder=True)
    if layer_fields(config) is not None:
        return {}, {probe.axis.name: "its layers differ already" for probe in _probes(text)}
    before = _build(config, trust_remote_code)
    axes: dict[str, Axis] = {}
    refused: dict[str, str] = {}
    for probe in _probes(text):
        try:
            if not probe.step:
                raise _NotAnAxis(probe.excuse)
            fewer = changed_config(config, probe.axis.config_fields(probe.axis.units - probe.step))
            after = _build(fewer, trust_remote_code)
            axes[probe.axis.name] = _with_segments(probe, before, after)
        except _NotAnAxis as reason:
            refused[probe.axis.name] = str(reason)
        except (UserError, ValueError, RuntimeError):  # the architecture's own checks, or shapes that do not fit
            refused[probe.axis.name] = f"{config.model_type} has no such model with fewer"
    return axes, {name: reason for name, reason in refused.items() if name not in axes}


def shapes_of(config: PretrainedConfig, *, trust_remote_code: bool = False) -> dict[str, tuple[int, ...]]:
    """The shapes of all parameters of a model of this config, which was run once on the meta device.

    Raises what the config's own checks raise, and RuntimeError or UserError when the shapes do not fit together.
    """
    return _build(config, trust_remote_code).shapes


class _NotAnAxis(Exception):  # noqa: N818 a reason, not an error
    pass


@dataclass(frozen=True, slots=True)
class _Probe:
    axis: Axis
    step: int  # units taken away to see what changes
    widths: frozenset[int] = frozenset({1})  # what a unit can be worth along one dimension
    parts: dict[str, tuple[int, int]] = field(default_factory=dict)  # of fused matrices: size, and width of a unit
    excuse: str = ""  # why there is no step to take


def _probes(config: Any) -> Iterator[_Probe]:
    heads, hidden = int(config.num_attention_heads), int(config.hidden_size)
    groups = int(getattr(config, "num_key_value_heads", None) or heads)
    width = int(getattr(config, "head_dim", None) or hidden // heads)
    pinned = {"head_dim": width}
    for name, ffn in FFN_FIELDS.items():
        units = getattr(config, name, 0) or (4 * hidden if name == "n_inner" and hasattr(config, name) else 0)
        if units:
            parts = {"gate": (units, 1), "up": (units, 1)}
            yield _Probe(Axis(name=ffn, units=units, per_unit={name: 1}), 1, parts=parts)
    left = max((n for n in range(1, groups) if groups % n == 0), default=groups)  # some configs want heads that divide
    worth = {"num_key_value_heads": 1, "num_attention_heads": heads // groups}
    parts = {"q": (heads * width, heads // groups * width), "k": (groups * width, width), "v": (groups * width, width)}
    widths = frozenset({1, heads // groups, width, heads // groups * width})
    alone = "there is one KV group, which cannot go"
    axis = Axis(name="kv_groups", units=groups, per_unit=worth, fixed=pinned)
    yield _Probe(axis, groups - left, widths, parts, alone)
    yield _query_heads(heads, groups, width)
    yield _Probe(Axis(name="hidden", units=hidden, per_unit={"hidden_size": 1}, fixed=pinned), heads)
    for name in EXPERT_FIELDS:
        if units := getattr(config, name, 0):
            yield _Probe(Axis(name="experts", units=units, per_unit={name: 1}), 1)


def _query_heads(heads: int, groups: int, width: int) -> _Probe:
    """Query heads within groups: every KV group keeps as many, so that the model stays regular."""
    of_group = heads // groups
    left = max((n for n in range(1, of_group) if of_group % n == 0), default=of_group)
    axis = Axis(
        name="query_heads",
        units=heads,
        per_unit={"num_attention_heads": 1},
        fixed={"head_dim": width, "num_key_value_heads": groups},
        runs=groups,
    )
    parts = {"q": (heads * width, width), "k": (groups * width, 0), "v": (groups * width, 0)}
    alone = "every KV group has one query head; cut kv_groups instead"
    return _Probe(axis, groups * (of_group - left), frozenset({1, width}), parts, alone)


@dataclass(frozen=True, slots=True)
class _Built:
    shapes: dict[str, tuple[int, ...]]
    interleaved: frozenset[str]  # modules whose fused gate and up take turns row by row
    norms: dict[str, float]  # weight -> what its norm adds to it
    embedding: tuple[str, ...]  # names of the embedding, that of a tied head included
    embedding_scale: float
    blocks: str  # the name of the list of blocks


_built: dict[tuple[str, bool], _Built] = {}  # of this process's configs: planning asks for the same few again and again


def _build(config: PretrainedConfig, trust_remote_code: bool) -> _Built:
    """The model has been run on the meta device, so its shapes fit together."""
    key = (config.to_json_string(use_diff=False), trust_remote_code)
    if key not in _built:
        _built[key] = _built_anew(config, trust_remote_code)
    return _built[key]


def _built_anew(config: PretrainedConfig, trust_remote_code: bool) -> _Built:
    model = build_skeleton(config, trust_remote_code=trust_remote_code)
    restore_buffers(model)
    trace_model(model)
    table = model.get_input_embeddings().weight
    return _Built(
        shapes={name: tuple(tensor.shape) for name, tensor in model.state_dict().items()},
        interleaved=frozenset(n for n, module in model.named_modules() if not getattr(module, "is_concatenated", True)),
        norms=added_by_norms(model),
        embedding=tuple(name for name, p in model.named_parameters(remove_duplicate=False) if p is table),
        embedding_scale=embedding_scale(model),
        blocks=find_blocks(model)[0],
    )


def _with_segments(probe: _Probe, before: _Built, after: _Built) -> Axis:
    segments: dict[tuple[str, int], tuple[Segment, ...]] = {}
    elements: dict[str, int] = {}
    if before.shapes.keys() != after.shapes.keys():
        raise _NotAnAxis("with fewer, the model has other parameters")
    for name, shape in before.shapes.items():
        changed = [dim for dim, (old, new) in enumerate(zip(shape, after.shapes[name], strict=True)) if old != new]
        if len(changed) > 1:
            raise _NotAnAxis(f"both dimensions of {name} follow it: attention is as wide as the hidden size")
        for dim in changed:
            parts = _parts(probe, name, (shape[dim] - after.shapes[name][dim]) / probe.step, shape[dim], before)
            segments[name, dim] = _in_a_row(parts)
            elements[name] = sum(of_unit for _, of_unit in parts) * math.prod(shape) // shape[dim]
    if not segments:
        raise _NotAnAxis("no parameter follows it")
    rescaled = {name: added for name, added in before.norms.items() if (name, 0) in segments}
    ratio = before.embedding_scale / after.embedding_scale
    if ratio != 1:
        if not math.isclose(ratio, math.sqrt(probe.axis.units / (probe.axis.units - probe.step)), rel_tol=1e-4):
            raise _NotAnAxis("the scale of its embedding follows the width in a way that is not known")
        rescaled = _with_embedding(rescaled, before)
    return replace(probe.axis, segments=segments, elements=elements, rescaled=rescaled)


def _with_embedding(rescaled: dict[str, float], built: _Built) -> dict[str, float]:
    """Where the model scales its embedding by the root of the width, the stored one makes up for it.

    A head that is tied to it then gives larger logits, by as much as the final norm would have been raised.
    """
    tied = len(built.embedding) > 1
    inside = {n: added for n, added in rescaled.items() if n.startswith(f"{built.blocks}.") or not tied}
    return inside | dict.fromkeys(built.embedding, 0.0)


def _parts(probe: _Probe, name: str, width: float, size: int, built: _Built) -> list[tuple[int, int]]:
    """(size, width of a unit) of what follows each other along a dimension: one part, unless the matrix is fused."""
    modules = (part.removesuffix("_bias") for part in name.split("."))
    fused = next((FUSED[module] for module in modules if module in FUSED), ())
    parts = [probe.parts[part] for part in fused if part in probe.parts]
    if not parts or name.rpartition(".")[0] in built.interleaved:
        known = width in probe.widths or bool(parts)  # anything wider is a fused matrix of an order nobody stated
        parts = [(size, int(width))] if known else []
    whole = sum(part_size for part_size, _ in parts) == size and sum(of_unit for _, of_unit in parts) == width
    if not whole or any(of_unit and part_size != of_unit * probe.axis.units for part_size, of_unit in parts):
        raise _NotAnAxis(f"the order of units in {name} is not known")
    return parts


def _in_a_row(parts: list[tuple[int, int]]) -> tuple[Segment, ...]:
    starts = accumulate((size for size, _ in parts), initial=0)
    return tuple(Segment(start, width) for start, (_, width) in zip(starts, parts, strict=False) if width)
