"""The derivative by a factor on each unit against factors that are really there, by autograd and by differences."""

import weakref

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from families import TINY, save_tiny
from prunus.errors import UserError
from prunus.models import open_model
from prunus.models.cut import axes_named
from prunus.steps.shrink_gradients import _bytes, _watch, check_gradients, gate_gradients, weight_taylor
from prunus.text.batches import TokenBatch

TOKENS = torch.randint(2, 250, (2, 12), generator=torch.Generator().manual_seed(0))


def loss_with_factors(directory, reader, factors_I):
    """The loss of each sequence with the inputs of one matrix multiplied."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).requires_grad_(False)
    model.get_submodule(reader).register_forward_pre_hook(lambda _module, args: (args[0] * factors_I,))
    return [model(input_ids=tokens[None], labels=tokens[None]).loss for tokens in TOKENS]


def test_it_is_the_derivative_by_a_factor(tiny_llama_dir):
    model = open_model(tiny_llama_dir)
    axes = axes_named(model.config, ["ffn", "kv_groups"])
    batch = TokenBatch(TOKENS, torch.ones_like(TOKENS, dtype=torch.bool), [])
    found = gate_gradients(model, axes, batch)
    assert set(found) == {
        f"model.layers.{i}.{name}" for i in range(2) for name in ("self_attn.o_proj", "mlp.down_proj")
    }
    for reader, gradients_NU in found.items():
        units = axes["ffn" if "mlp" in reader else "kv_groups"].units
        factors_U = torch.ones(units, requires_grad=True)
        size = 128 if "mlp" in reader else 64
        losses = loss_with_factors(tiny_llama_dir, reader, factors_U.repeat_interleave(size // units))
        for n, loss in enumerate(losses):
            (expected_U,) = torch.autograd.grad(loss, factors_U)
            torch.testing.assert_close(gradients_NU[n], expected_U, rtol=1e-3, atol=1e-6)


def literal_sums(directory, groups, units, tokens_NT=TOKENS):
    """Weight by weight of every unit: |w dL/dw| with L the sum of the losses of all sequences.

    `groups`: of one block, name of the parameter -> the dimension along which its units follow each other.
    """
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    sum(model(input_ids=tokens[None], labels=tokens[None]).loss for tokens in tokens_NT).backward()
    found = []
    for unit in range(units):
        total = 0.0
        for name, dim in groups.items():
            weight = model.get_parameter(name)
            size = weight.shape[dim] // units
            own = [t.detach().narrow(dim, unit * size, size) for t in (weight, weight.grad)]
            total += float((own[0] * own[1]).abs().sum())
        found.append(total)
    return torch.tensor(found)


def test_by_element_it_is_the_sum_over_readers_and_producers(tiny_llama_dir):
    model = open_model(tiny_llama_dir)
    batch = TokenBatch(TOKENS, torch.ones_like(TOKENS, dtype=torch.bool), [])
    found = weight_taylor(model, axes_named(model.config, ["ffn", "kv_groups"]), batch)
    assert len(found) == 4
    for block in (f"model.layers.{i}" for i in range(2)):
        ffn = {f"{block}.mlp.{name}.weight": dim for name, dim in (("gate_proj", 0), ("up_proj", 0), ("down_proj", 1))}
        heads = {f"{block}.self_attn.{name}_proj.weight": int(name == "o") for name in "qkvo"}
        for reader, groups, units in (("mlp.down_proj", ffn, 128), ("self_attn.o_proj", heads, 2)):
            expected_U = literal_sums(tiny_llama_dir, groups, units)
            torch.testing.assert_close(found[f"{block}.{reader}"], expected_U, rtol=1e-3, atol=1e-6)


def test_biases_and_transposed_matrices_count_too(tmp_path):
    directory = save_tiny(TINY["gpt2"], tmp_path / "model")
    model = open_model(directory)
    batch = TokenBatch(TOKENS % 128, torch.ones_like(TOKENS, dtype=torch.bool), [])
    axes = axes_named(model.config, ["ffn"])
    found_U = weight_taylor(model, axes, batch)["transformer.h.1.mlp.c_proj"]
    groups = {"c_fc.weight": 1, "c_fc.bias": 0, "c_proj.weight": 0}
    groups = {f"transformer.h.1.mlp.{name}": dim for name, dim in groups.items()}
    expected_U = literal_sums(directory, groups, axes["ffn"].units, TOKENS % 128)
    torch.testing.assert_close(found_U, expected_U, rtol=1e-3, atol=1e-6)


def test_memory_counts_the_gradients_of_what_could_go(tiny_llama_dir):
    model = open_model(tiny_llama_dir)
    axes = axes_named(model.config, ["ffn"])
    by_weights = 4 * 2 * 3 * 64 * 128  # fp32, 2 blocks of gate, up and down
    needed = _bytes(model, 12)
    check_gradients(model, axes, 12, needed)
    with pytest.raises(UserError, match="loads the whole model"):
        check_gradients(model, axes, 12, needed + by_weights - 1, by_weights=True)
    check_gradients(model, axes, 12, needed + by_weights, by_weights=True)


def test_a_watched_input_is_freed_after_the_way_back():
    layer, gradients = nn.Linear(4, 4), []
    layer.register_forward_pre_hook(_watch(lambda _x, gradient: gradients.append(gradient)))
    x = torch.ones(2, 4, requires_grad=True) * 1.0
    freed = weakref.ref(x)
    layer(x).sum().backward()
    del x
    assert len(gradients) == 1
    assert freed() is None
