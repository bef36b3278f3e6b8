"""What a model of given shapes weighs: parameters, bytes that a decoding step reads, values in its cache."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from transformers import PretrainedConfig

from prunus.models.limits import kv_cache_values
from prunus.models.streamed import StreamedModel

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class Footprint:
    """`decode_bytes` are those of the weights that one token at batch 1 meets: experts that sleep are not read."""

    parameters: int
    decode_bytes: int
    kv_cache_values_per_token: int


def footprint(model: StreamedModel, shapes: Shapes, config: PretrainedConfig) -> Footprint:
    """Of `model` as it would be with these shapes of its parameters and this config."""
    own = {name: shape for name, shape in shapes.items() if model.names.keys_of([name])}  # a tied one has none
    banks = {block.full_parameter(linear) for block, linear in model.spec.matrices if linear.expert is not None}
    active = getattr(config.get_text_config(decoder=True), "num_experts_per_tok", None)
    looked_up = set() if not model.names.keys_of(model.output_head) else set(model.input_embeddings)
    decode_bytes = 0.0
    for name, shape in own.items():
        stored = model.checkpoint.tensors[model.names.keys_of([name])[0]]
        itemsize = stored.num_bytes / max(stored.num_elements, 1)  # of a quantized one no whole number
        share = min(active / shape[0], 1.0) if name in banks and active else 1.0
        decode_bytes += 0 if name in looked_up else math.prod(shape) * itemsize * share
    return Footprint(sum(map(math.prod, own.values())), int(decode_bytes), kv_cache_values(config))
