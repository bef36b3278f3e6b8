"""Module trees whose decoder blocks differ.

Each block is taken from a model that the family builds with the block's own sizes everywhere, so all that a block knows
of its sizes (shapes, numbers of heads, where fused matrices are split) is the family's own doing. Around the blocks
everything is as ever; a KV cache takes from each layer the keys that it gives.
"""

import copy
import json
from collections.abc import Callable
from typing import Any

from torch import nn
from transformers import PretrainedConfig

from prunus.checkpoint.per_layer import KEY, WITHOUT, Fields, layer_fields
from prunus.models.sublayers import take_away
from prunus.models.trace import find_blocks


def give_own_blocks(model: Any, config: PretrainedConfig, build: Callable[[PretrainedConfig], Any]) -> None:
    """Replace the blocks of a model by those that the config asks for layer by layer, if it does."""
    fields = layer_fields(config)
    if fields is None:
        return
    blocks = find_blocks(model)[1]
    alike: dict[str, nn.ModuleList] = {}  # widths -> the blocks of a model that has them everywhere
    for layer, own in enumerate(fields):
        key = json.dumps(own, sort_keys=True)
        if key not in alike:
            alike[key] = find_blocks(build(layer_config(config, own)))[1]
        blocks[layer] = alike[key][layer]
        take_away(blocks[layer], layer, own.get(WITHOUT, {}))


def layer_config(config: PretrainedConfig, own: Fields) -> PretrainedConfig:
    """The config of a model all of whose layers are like this one.

    The fields are set after the config was made: what a class checks of a whole model (Llama's width divides by the
    number of heads) need not hold for one layer, whose head width is stated.
    """
    changed = copy.deepcopy(config)
    text = changed.get_text_config(decoder=True)
    for name, value in {**own, KEY: None}.items():
        if name != WITHOUT:
            setattr(text, name, value)
    return changed
