"""Which tensors of a checkpoint make up which parameters of the model, in both directions.

Most are one to one under another name; experts are stored one by one and held fused. transformers knows the
renamings and conversions of every family, so this file only asks it, a block at a time.
"""

from collections.abc import Callable, Iterable
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    apply_converters,
    apply_renamings,
    dot_natural_key,
    rename_source_key,
)

from prunus.checkpoint.directory import TensorInfo
from prunus.errors import UserError


@dataclass
class _Source:
    keys: list[str] = field(default_factory=list)  # names in the checkpoint, in natural order
    converter: WeightConverter | None = None


class TensorNames:
    """The mapping between a model's parameters and the tensors of one checkpoint.

    Raises UserError when a parameter has no tensor, or one of another shape.
    """

    def __init__(self, model: Any, tensors: dict[str, TensorInfo]) -> None:
        self._model = model
        transforms = get_model_conversion_mapping(model)
        self._renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
        self._converters = [t for t in transforms if isinstance(t, WeightConverter)]
        self._state: dict[str, Tensor] = model.state_dict()
        self._sources: dict[str, _Source] = {}
        self.unused: list[str] = []  # carried along unchanged: old rotary buffers, a stored copy of a tied head
        for key in sorted(tensors, key=dot_natural_key):
            self._place(key)
        self._check(tensors)

    def keys_of(self, parameters: Iterable[str]) -> list[str]:
        """The checkpoint's names of the tensors behind these parameters; a tied parameter has none of its own."""
        return [key for name in parameters if name in self._sources for key in self._sources[name].keys]

    def parameters_of(self, keys: Iterable[str]) -> list[str]:
        """The inverse of `keys_of`: the parameters behind these tensors; an unused tensor has none."""
        wanted = set(keys)
        return [name for name, source in self._sources.items() if wanted & set(source.keys)]

    def load(self, parameters: Iterable[str], read: Callable[[str], Tensor]) -> dict[str, Tensor]:
        """Read the tensors behind these parameters and convert them to the model's own layout."""
        loaded: dict[str, Tensor] = {}
        for name in parameters:
            if name in self._sources and name not in loaded:
                loaded |= self._convert(name, read)
        return loaded

    def store(self, parameters: dict[str, Tensor]) -> dict[str, Tensor]:
        """The inverse of `load`: the tensors to write, under the checkpoint's own names."""
        stored: dict[str, Tensor] = {}
        for name, tensor in parameters.items():
            source = self._sources[name]
            stored |= {source.keys[0]: tensor} if source.converter is None else self._revert(name, tensor)
        return stored

    def _place(self, key: str) -> None:
        prefix = self._model.base_model_prefix
        name, pattern = rename_source_key(key, self._renamings, self._converters, prefix, self._state)
        if name not in self._state:
            self.unused.append(key)
            return
        source = self._sources.setdefault(name, _Source())
        source.keys.append(key)
        if pattern is not None:
            source.converter = next(c for c in self._converters if pattern in c.source_patterns)

    def _check(self, tensors: dict[str, TensorInfo]) -> None:
        tied = set(self._model.all_tied_weights_keys)
        for name, parameter in self._state.items():
            source = self._sources.get(name)
            if source is None and name not in tied:
                raise UserError(f"the checkpoint has no tensor for {name} {tuple(parameter.shape)}; it is incomplete.")
            if source is None:
                continue
            if source.converter is not None:
                self._check_converted(name, source.keys, tensors)
            elif (found := tensors[source.keys[0]].shape) != tuple(parameter.shape):
                raise UserError(
                    f"tensor {source.keys[0]} has shape {found}; config.json asks for {tuple(parameter.shape)}."
                )

    def _check_converted(self, name: str, keys: list[str], tensors: dict[str, TensorInfo]) -> None:
        """Carry out the conversion on shapes alone, such as stacking experts."""
        shape = tuple(self._state[name].shape)
        try:
            converted = self._convert(name, lambda key: torch.empty(tensors[key].shape, device="meta"))
            found = tuple(converted[name].shape)
        except (RuntimeError, ValueError, KeyError, IndexError):  # torch cannot stack or join them
            found = None
        if found != shape:
            made = "do not fit together" if found is None else f"make {found}"
            raise UserError(
                f"the {len(keys)} tensors behind {name}, from {keys[0]} to {keys[-1]}, {made}; config.json asks for "
                f"{shape}: one is missing or has another shape."
            )

    def _convert(self, name: str, read: Callable[[str], Tensor]) -> dict[str, Tensor]:
        source = self._sources[name]
        if source.converter is None:
            return {name: read(source.keys[0])}
        converter = deepcopy(source.converter)
        for key in source.keys:
            _, pattern = apply_converters(apply_renamings(key, self._renamings), self._converters)
            converter.add_tensor(name, key, pattern, read(key))
        converted = converter.convert(name, model=self._model, config=self._model.config)
        return {k: v[0] if isinstance(v, list) else v for k, v in converted.items()}

    def _revert(self, name: str, tensor: Tensor) -> dict[str, Tensor]:
        source = self._sources[name]
        assert source.converter is not None
        reverse = source.converter.reverse_transform()
        target, pattern = reverse.rename_source_key(name)
        reverse.add_tensor(target, name, pattern, tensor)
        pieces = reverse.convert(target, model=self._model, config=self._model.config)
        # The pieces carry names from between renaming and conversion: the same step from the checkpoint's own names.
        original = {apply_renamings(key, self._renamings): key for key in source.keys}
        prefix = self._model.base_model_prefix + "."
        original |= {k if k.startswith(prefix) else prefix + k: v for k, v in original.items()}
        assert set(pieces) <= set(original), f"cannot store {name}: {set(pieces) - set(original)}"
        return {original[k]: (v[0] if isinstance(v, list) else v).contiguous() for k, v in pieces.items()}
