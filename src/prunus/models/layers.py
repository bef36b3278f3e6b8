"""A model without some of its decoder layers: what its config says, and what its tensors are called.

transformers builds every block from the config, so the config of the smaller model is right exactly if it builds, for
each layer that is left, the very block that the layer was. That is how the fields that follow the layers are found and
proved: the model is the judge, and no family is written down.
"""

import itertools
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PretrainedConfig

from prunus.errors import UserError
from prunus.models.configs import changed_config
from prunus.models.skeleton import build_skeleton, restore_buffers
from prunus.models.trace import find_blocks, trace_model

DEPTH = "num_hidden_layers"
# Whole numbers that count the first layers of some kind: no other name says of a number that it is a layer's.
THRESHOLDS = ("max_window_layers", "first_k_dense_replace", "num_dense_layers")
OWN_NUMBER = {"layer_idx", "layer_id", "layer_index", "block_idx", "idx"}  # where a module keeps its layer's number
REFUSALS = (UserError, ValueError, RuntimeError, LookupError)  # what configs and models raise for lists that do not fit
PLAIN = (bool, int, float, str, tuple, type(None))

Fields = dict[str, Any]


def fields_without(config: PretrainedConfig, kept: Sequence[int], *, trust_remote_code: bool = False) -> Fields:
    """The config's fields, by transformers' names, of the model that has only the layers `kept` (ascending).

    Raises UserError when the architecture has no such model: its layers alternate by a rule of their numbers.
    """
    before, reasons = _blocks(config, trust_remote_code), []
    for fields in _readings(config.get_text_config(decoder=True), kept):
        try:
            reason = _difference(before, _blocks(changed_config(config, fields), trust_remote_code), kept)
        except REFUSALS as error:
            reason = " ".join(str(error).split())
        if reason is None:
            return fields
        reasons.append(reason)
    raise UserError(
        f"architecture {config.model_type!r} cannot lose layers: {reasons[0]}; shrink another axis instead."
    )


def _readings(text: PretrainedConfig, kept: Sequence[int]) -> Iterator[Fields]:
    """Every way to read the config's lists: an entry for each layer, numbers of layers, or neither."""
    choices: dict[str, list[Any]] = {DEPTH: [len(kept)]}
    for name, value in _stored(text).items():
        if name in THRESHOLDS and isinstance(value, int):
            choices[name] = [sum(layer < value for layer in kept)]
        elif isinstance(value, list | tuple) and "token" not in name:
            choices |= _readings_of_list(name, list(value), int(getattr(text, DEPTH)), kept)
    for values in itertools.product(*choices.values()):
        yield dict(zip(choices, values, strict=True))


def _stored(text: PretrainedConfig) -> Fields:
    ours = text.to_dict()
    return {name: getattr(text, name, value) for name, value in ours.items()}


def _readings_of_list(name: str, value: list[Any], depth: int, kept: Sequence[int]) -> dict[str, list[Any]]:
    found = []
    if len(value) == depth:
        found.append([value[layer] for layer in kept])
    are_layers = all(type(entry) is int and 0 <= entry < depth for entry in value) and len(set(value)) == len(value)
    if are_layers and ("layer" in name or "idx" in name):
        found.append([new for new, layer in enumerate(kept) if layer in value])
    return {name: found} if found else {}


def _blocks(config: PretrainedConfig, trust_remote_code: bool) -> list[nn.Module]:
    """The blocks of a model of this config, which was run once on the meta device."""
    model = build_skeleton(config, trust_remote_code=trust_remote_code)
    restore_buffers(model)
    trace_model(model)
    return list(find_blocks(model)[1])


def _difference(before: list[nn.Module], after: list[nn.Module], kept: Sequence[int]) -> str | None:
    """What first distinguishes a block of the smaller model from the one that it has to be; None: nothing."""
    for new, layer in enumerate(kept):
        old_facts, new_facts = _facts(before[layer]), _facts(after[new])
        for name in old_facts.keys() | new_facts.keys():
            if old_facts.get(name) != new_facts.get(name):
                return f"its config cannot say that layer {new} is to be what layer {layer} was ({name} differs)"
    return None


def _facts(block: nn.Module) -> dict[str, Any]:
    """All that two blocks can differ in but their weights: modules, shapes, and what each module was told."""
    facts: dict[str, Any] = {}
    for name, module in block.named_modules():
        facts[name] = type(module).__name__
        told = {key: value for key, value in vars(module).items() if isinstance(value, PLAIN)}
        facts |= {f"{name}.{key}": value for key, value in told.items() if key not in OWN_NUMBER}
    return facts | {name: tuple(tensor.shape) for name, tensor in block.state_dict().items()}


@dataclass(frozen=True, slots=True)
class LayerNumbers:
    """Where a checkpoint's tensor names hold the number of their layer."""

    family: str
    prefix: tuple[str, ...]

    @classmethod
    def found_in(cls, block_keys: list[list[str]], family: str) -> "LayerNumbers":
        """Raises UserError when the names follow no such rule."""
        first = [key.split(".") for key in block_keys[0]]
        for place in range(min(map(len, first))):
            numbers = cls(family, tuple(first[0][:place]))
            if all(numbers.layer_of(key) == layer for layer, keys in enumerate(block_keys) for key in keys):
                return numbers
        raise UserError(
            f"architecture {family!r} cannot lose layers: the names of its tensors, such as {block_keys[0][0]}, do not "
            "hold the number of their layer in one place."
        )

    def layer_of(self, key: str) -> int | None:
        """The layer that a tensor belongs to; None for one outside the layers."""
        parts, place = key.split("."), len(self.prefix)
        inside = tuple(parts[:place]) == self.prefix and len(parts) > place and parts[place].isdigit()
        return int(parts[place]) if inside else None

    def renamed(self, key: str, new: int) -> str:
        """The name that the tensor has in layer `new`."""
        parts = key.split(".")
        parts[len(self.prefix)] = str(new)
        return ".".join(parts)


def trial_choices(depth: int, removable: Collection[int], count: int) -> list[list[int]]:
    """Layers to keep, tried before weights are read: one layer removed shifts all later ones, which breaks any rule."""
    order = sorted(removable)
    return [[layer for layer in range(depth) if layer not in order[:gone]] for gone in sorted({1, count})]
