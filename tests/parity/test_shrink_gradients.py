"""The derivative by a factor on each unit against factors that are really there, by autograd and by differences."""

import weakref

import torch
from torch import nn
from transformers import AutoModelForCausalLM

from prunus.models import open_model
from prunus.models.cut import axes_named
from prunus.steps.shrink_gradients import _watch, gate_gradients
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


def test_a_watched_input_is_freed_after_the_way_back():
    layer, gradients = nn.Linear(4, 4), []
    layer.register_forward_pre_hook(_watch(lambda _x, gradient: gradients.append(gradient)))
    x = torch.ones(2, 4, requires_grad=True) * 1.0
    freed = weakref.ref(x)
    layer(x).sum().backward()
    del x
    assert len(gradients) == 1
    assert freed() is None
