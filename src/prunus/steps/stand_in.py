"""A few blocks of a model, with random weights, that take a token as the whole model would: what the advisor times.

Blocks are those of the model's own code, packed or not, and as many as outweigh every cache. All that a token of them
takes is in it: products, attention, Python. The whole model has more blocks, and a head.
"""

import copy
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from prunus.errors import UserError
from prunus.exporting.sparse_directory import Source
from prunus.machine_choice import half_of_free_memory
from prunus.models import StreamedModel
from prunus.models.skeleton import build_on_meta, restore_buffers
from prunus.models.trace import find_blocks
from prunus.runtime.linear import PackedLinear, gather, optimize_decoding
from prunus.runtime.multiply import Multiplier
from prunus.runtime.timing import Pass, packed_as

LEAST_BYTES = 160_000_000  # of a stand-in's matrices: several last-level caches
PROMPT = 128  # tokens before the one that is timed


@dataclass(frozen=True, slots=True)
class StandIn:
    """`token` takes one token through some of the blocks; all of them have `times` as many weights, `num_bytes`."""

    token: Pass
    times: float
    num_bytes: int


def packed_stand_in(model: StreamedModel, sources: Sequence[Source], pattern: str, dtype: torch.dtype) -> StandIn:
    """Every matrix of the blocks in a pattern and a type, in our kernels."""
    shapes = {source.linear.shape for source in sources}
    made = {shape: packed_as(pattern, dtype, *shape) for shape in shapes}
    size = sum(made[source.linear.shape].num_bytes for source in sources)
    module, kept = _blocks_of(model, sources, size)
    for source in kept:
        module.set_submodule(source.module, PackedLinear.holding(made[source.linear.shape]))
    gather(module)
    _fill(module)
    optimize_decoding(module)
    return StandIn(_token(module), _weights(sources) / _weights(kept), size)


def dense_stand_in(model: StreamedModel, sources: Sequence[Source]) -> StandIn:
    """The same in bfloat16 by torch, mapped to a file, which is how transformers opens a model."""
    size = _weights(sources) * torch.bfloat16.itemsize
    module, kept = _blocks_of(model, sources, size)
    for source in kept:
        owner: Any = module.get_submodule(source.module)
        owner.weight = _parameter(_mapped(owner.weight.shape))
    _fill(module)
    return StandIn(_token(module), _weights(sources) / _weights(kept), size)


def without_blocks(model: StreamedModel) -> Pass:
    """What a token takes outside of blocks and head."""
    module, _ = _blocks_of(model, [], 0)
    _fill(module)
    return _token(module)


def packed_head(head: Source, dtype: torch.dtype) -> Pass:
    """Logits and the likeliest token of one hidden state, by our kernels."""
    packed = packed_as("0", dtype, *head.linear.shape)
    multiplier, x_MI = Multiplier(packed), _inputs(head)
    return Pass(lambda: multiplier(x_MI).argmax(-1), packed.num_bytes)


def head_by_torch(head: Source) -> Pass:
    weight_OI, x_MI = _mapped(head.linear.shape), _inputs(head)
    return Pass(lambda: linear(x_MI, weight_OI).argmax(-1), weight_OI.numel() * weight_OI.itemsize)


def _inputs(head: Source) -> Tensor:
    return torch.zeros(1, head.linear.shape[1], dtype=torch.bfloat16)


def _mapped(shape: Sequence[int]) -> Tensor:
    """A bfloat16 tensor in a temporary file's memory."""
    with tempfile.TemporaryFile() as file:
        file.write(bytes(int(np.prod(shape)) * torch.bfloat16.itemsize))
        file.flush()
        return torch.from_numpy(np.memmap(file, dtype=np.int16, mode="r+")).view(torch.bfloat16).view(*shape)


def _weights(sources: Sequence[Source]) -> int:
    return sum(source.linear.shape[0] * source.linear.shape[1] for source in sources)


def _blocks_of(model: StreamedModel, sources: Sequence[Source], size: int) -> tuple[Any, list[Source]]:
    """The module, without memory, and no blocks but the first: as many as have LEAST_BYTES in their matrices, which
    are told. `size`: the bytes of all `sources`."""
    module = build_on_meta(model.config, dtype=torch.bfloat16, trust_remote_code=model.checkpoint.trust_remote_code)
    restore_buffers(module)
    name, blocks = find_blocks(module)
    count = min(len(blocks), -(-LEAST_BYTES * len(blocks) // size)) if size else 0
    needed, free = size * count // len(blocks), half_of_free_memory()
    if needed > free:
        raise UserError(
            f"{count} of {len(blocks)} blocks of {model.checkpoint.path} take {needed / 1e9:.1f} GB and may take "
            f"{free / 1e9:.1f}, half of the free memory; free some, or ask about a smaller model."
        )
    del blocks[count:]
    first = tuple(f"{name}.{index}." for index in range(count))
    return module, [source for source in sources if source.module.startswith(first)]


def _token(module: Any) -> Pass:
    """One token through everything but the head, always the same one after PROMPT others."""
    token_11, decoder = torch.zeros(1, 1, dtype=torch.int64), module.base_model
    cache = decoder(input_ids=token_11, use_cache=True).past_key_values
    positions = getattr(module.config, "max_position_embeddings", None) or 2 * PROMPT
    more = min(PROMPT, positions // 2) - 1
    for index, layer in enumerate(cache.layers):
        if getattr(layer, "keys", None) is not None:
            cache.update(*(one.repeat(1, 1, more, 1) for one in (layer.keys, layer.values)), index)

    def run() -> None:
        grows = copy.copy(cache)
        grows.layers = [copy.copy(layer) for layer in cache.layers]
        decoder(input_ids=token_11, past_key_values=grows, use_cache=True)

    return Pass(run, 0, again=True)


def _fill(module: Any) -> None:
    """All but the head gets memory, the same for all of one shape: next to no time goes there."""
    embedding = module.get_input_embeddings()
    embedding.weight = _parameter(torch.zeros((), dtype=torch.bfloat16).expand(embedding.weight.shape))
    shared: dict[tuple[int, ...], nn.Parameter] = {}
    for owner in module.base_model.modules():
        for name, parameter in owner.named_parameters(recurse=False):
            if parameter.is_meta:
                if parameter.shape not in shared:
                    shared[parameter.shape] = _parameter(torch.zeros(parameter.shape, dtype=torch.bfloat16))
                setattr(owner, name, shared[parameter.shape])


def _parameter(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)
