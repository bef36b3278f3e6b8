"""What a config says of the sequences a model takes: how long they may be, and what a token leaves in its cache."""

from transformers import PretrainedConfig


def max_length(config: PretrainedConfig) -> int | None:
    """The longest sequence that the model was made for, in tokens; None when its config does not say."""
    value = getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)
    return int(value) if value else None


def kv_cache_values(config: PretrainedConfig) -> int:
    """Keys and values that one token leaves in all layers of a model with attention in each."""
    text = config.get_text_config(decoder=True)
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return int(2 * text.num_hidden_layers * heads * width)
