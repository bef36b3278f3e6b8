"""What a config says of the sequences a model takes: how long they may be, and what a token leaves in its cache."""

from typing import Any

from transformers import PretrainedConfig

from prunus.checkpoint.per_layer import WITHOUT, layer_fields
from prunus.models.per_layer import layer_config


def max_length(config: PretrainedConfig) -> int | None:
    """The longest sequence that the model was made for, in tokens; None when its config does not say."""
    value = getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)
    return int(value) if value else None


def head_size(config: PretrainedConfig) -> int:
    """Values of one attention head."""
    text = config.get_text_config(decoder=True)
    return int(getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads)


def kv_cache_values(config: PretrainedConfig) -> int:
    """Keys and values that one token leaves in all layers of a model; without attention, a mark for each."""
    layers = layer_fields(config)
    text = config.get_text_config(decoder=True)
    if layers is None:
        return int(text.num_hidden_layers) * _of_layer(text)
    return sum(
        2 if "attention" in own.get(WITHOUT, {}) else _of_layer(layer_config(config, own).get_text_config(decoder=True))
        for own in layers
    )


def _of_layer(text: Any) -> int:
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    return int(2 * heads * head_size(text))
