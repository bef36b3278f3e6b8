"""The config of a changed model: other values in it, and everything else as its author wrote it."""

import copy
from collections.abc import Mapping
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import PretrainedConfig


def changed_config(config: PretrainedConfig, fields: Mapping[str, Any]) -> PretrainedConfig:
    """A copy of `config` with other values. Raises ValueError when its class refuses them."""
    try:
        return type(config).from_dict(edited_config(config.to_dict(), config, fields))
    except StrictDataclassError as error:
        raise ValueError(str(error.__cause__ or error)) from error


def edited_config(raw: dict[str, Any], config: PretrainedConfig, fields: Mapping[str, Any]) -> dict[str, Any]:
    """The content of config.json with other values.

    `fields` go by transformers' names; a family that stores them under names of its own (GPT-2's n_layer) keeps those,
    and they are set in the text model's part where the config has one.
    """
    edited = copy.deepcopy(raw)
    text = config.get_text_config(decoder=True)
    nested = [key for key in getattr(config, "sub_configs", {}) if getattr(config, key, None) is text and key in edited]
    part = edited[nested[0]] if nested else edited
    for name, value in fields.items():
        part.pop(name, None)
        part[text.attribute_map.get(name, name)] = value
    return edited


def with_dtype(config: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """A config that states the precision, in its parts too where they state one."""
    inside = {
        key: with_dtype(part, dtype) for key, part in config.items() if isinstance(part, dict) and "dtype" in part
    }
    rest = {key: value for key, value in config.items() if key != "torch_dtype"}
    return {**rest, **inside, "dtype": str(dtype).removeprefix("torch.")}
