"""Run by shrink_peers.py inside the peer's own environment: Torch-Pruning on given tokens, saved as a plain directory.

usage: peer_torch_pruning.py MODEL TOKENS.safetensors IMPORTANCE CUT OUT

IMPORTANCE: magnitude (GroupMagnitudeImportance) or taylor (GroupTaylorImportance, gradients of the cross-entropy summed
over all windows). CUT says what every layer loses, such as ffn=408 or kv_groups=1,ffn=240 or heads=3,ffn=280:

    ffn        channels of the feed-forward network, by the peer's own pruner
    heads      query heads, by the peer's own pruner: its way with grouped queries takes as many of every KV group and
               keeps all keys and values
    kv_groups  whole KV groups with their query heads: the pruner has no such choice, so a group's score is the mean of
               the peer's importance over its query heads; the peer's dependency graph removes q, k, v and o together

The peer traces the eager attention: it cannot follow grouped queries through scaled_dot_product_attention, where no
keys and values are repeated. Gradients are taken with that attention all the same, which is faster and smaller. Every
layer is ranked for itself and loses the same, since the saved config has one size for all.
"""

import sys
from typing import Any

import torch
import torch_pruning as tp
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

IMPORTANCES = {"magnitude": tp.importance.GroupMagnitudeImportance, "taylor": tp.importance.GroupTaylorImportance}


def accumulate_gradients(model: Any, tokens_NT: Tensor) -> None:
    """Leave in every weight the gradient of the cross-entropy, summed over the windows."""
    for tokens_T in tokens_NT:
        model(input_ids=tokens_T[None], labels=tokens_T[None]).loss.backward()


def make_pruner(model: Any, importance: Any, *, ffn: int, heads: int) -> Any:
    """The peer's pruner, which takes channels and heads of every layer and nothing of the residual stream."""
    config, layers = model.config, model.model.layers
    ratios: dict[nn.Module, float] = {}
    if ffn:  # the peer keeps int(size * (1 - ratio)): half a channel less makes the count exact
        ratios |= {layer.mlp.gate_proj: (ffn - 0.5) / config.intermediate_size for layer in layers}
    if heads:  # a layer whose ratio is zero is passed over, heads and all; the value itself does not matter
        ratios |= {layer.self_attn.q_proj: 0.5 for layer in layers}
    return tp.pruner.BasePruner(
        model,
        example_inputs=torch.arange(8)[None],
        importance=importance,
        global_pruning=False,
        pruning_ratio=0.0,
        pruning_ratio_dict=ratios,
        ignored_layers=[model.lm_head, model.model.embed_tokens],
        num_heads=_num_heads(model),
        prune_num_heads=True,
        prune_head_dims=False,  # the rotary embedding stays as it is
        head_pruning_ratio=heads / config.num_attention_heads,
        in_channel_groups={},
        out_channel_groups={},  # the default is one dict for all pruners of a process
    )


def _num_heads(model: Any) -> dict[nn.Module, int]:
    config = model.config
    heads: dict[nn.Module, int] = {}
    for layer in model.model.layers:
        attention = layer.self_attn
        heads[attention.q_proj] = config.num_attention_heads
        heads |= dict.fromkeys((attention.k_proj, attention.v_proj), config.num_key_value_heads)
    return heads


def remove_kv_groups(model: Any, pruner: Any, count: int) -> None:
    """Take the `count` KV groups of every layer whose query heads score lowest."""
    groups = model.config.num_key_value_heads
    for layer in model.model.layers:
        output = layer.self_attn.o_proj
        width = output.in_features // groups  # channels of one group's query heads
        everything = pruner.DG.get_pruning_group(output, tp.prune_linear_in_channels, list(range(output.in_features)))
        score_G = pruner.estimate_importance(everything).view(groups, width).mean(dim=1)
        lowest = score_G.argsort(stable=True)[:count].tolist()
        channels = [channel for group in lowest for channel in range(group * width, (group + 1) * width)]
        chosen = pruner.DG.get_pruning_group(output, tp.prune_linear_in_channels, channels)
        for index, (dependency, indices) in enumerate(chosen):  # k and v are named once for each of their query heads,
            chosen[index] = (dependency, sorted(set(indices)))  # and the peer would count them as often
        chosen.prune()


def cut(model: Any, importance: Any, *, ffn: int = 0, heads: int = 0, kv_groups: int = 0) -> None:
    """Make the model smaller in place, its config with it."""
    model.set_attn_implementation("eager")
    pruner = make_pruner(model, importance, ffn=ffn, heads=heads)
    for group in pruner.step(interactive=True):
        group.prune()
    if kv_groups:
        remove_kv_groups(model, pruner, kv_groups)
    _describe(model)


def _describe(model: Any) -> None:
    """Write the new sizes into the config, which has one of each for all layers."""
    config, layers = model.config, model.model.layers
    sizes = {
        (layer.mlp.gate_proj.out_features, layer.self_attn.q_proj.out_features, layer.self_attn.k_proj.out_features)
        for layer in layers
    }
    assert len(sizes) == 1, f"layers differ: {sizes}"
    inner, queries, keys = sizes.pop()
    config.intermediate_size = inner
    config.num_attention_heads, config.num_key_value_heads = queries // config.head_dim, keys // config.head_dim


def main(model_path: str, tokens_path: str, importance: str, what: str, out: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32)
    model.config.use_cache = False
    if importance == "taylor":
        accumulate_gradients(model, load_file(tokens_path)["tokens_NT"])
    counts = {name: int(count) for name, _, count in (part.partition("=") for part in what.split(","))}
    cut(model, IMPORTANCES[importance](), **counts)
    model.config.use_cache = True
    model.save_pretrained(out)
    AutoTokenizer.from_pretrained(model_path).save_pretrained(out)


if __name__ == "__main__":
    main(*sys.argv[1:])
