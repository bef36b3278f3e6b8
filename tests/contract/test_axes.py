"""Every axis of every tested family: units that do nothing can be cut, and the smaller model gives the same logits."""

import copy

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, LlamaConfig

from families import TINY, class_name, tiny_config
from prunus.models import axes as module
from prunus.models.axes import changed_config, find_axes

TOKENS = torch.randint(3, 128, (2, 16), generator=torch.Generator().manual_seed(0))
WIDTHS = {"ffn", "expert_ffn", "kv_groups", "query_heads", "hidden"}
AS_WIDE_AS_HIDDEN = {"gpt2", "gpt_neox", "opt", "olmoe"}


@pytest.fixture(scope="module", params=TINY)
def family(request):
    return request.param


@pytest.fixture(scope="module")
def config(family):
    config = tiny_config(TINY[family])
    config.architectures = [class_name(family)]
    if hasattr(config, "rms_norm_eps"):
        config.rms_norm_eps = 1e-12  # beside the small numbers of a tiny random model, the usual one would show
    return config


@pytest.fixture(scope="module")
def axes(config):
    return find_axes(config)[0]


def random_model(config):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def cut(model, config, axis, units_U):
    """A new model of fewer units, from the state of `model`."""
    smaller = AutoModelForCausalLM.from_config(
        changed_config(config, axis.config_fields(len(units_U))), dtype=torch.float32
    ).eval()
    smaller.load_state_dict({name: axis.cut(name, tensor, units_U) for name, tensor in model.state_dict().items()})
    return smaller


def logits(model):
    with torch.no_grad():
        return model(TOKENS).logits


def test_cutting_units_that_are_zero_changes_nothing(family, config, axes):
    for name in WIDTHS & set(axes):
        check_zero_units_can_go(config, axes[name])


def test_gate_and_up_that_take_turns():
    """A family outside the table whose experts keep gate and up interleaved."""
    sizes = {**TINY["olmoe"].tiny_sizes, "num_local_experts": 4, "architectures": ["GptOssForCausalLM"]}
    sizes |= {"layer_types": ["full_attention"] * 3}
    config = CONFIG_MAPPING["gpt_oss"](**sizes)
    check_zero_units_can_go(config, find_axes(config)[0]["ffn"])


def check_zero_units_can_go(config, axis):
    units_U = torch.arange(axis.units)[axis.units % 2 :: 2]
    model = random_model(config)
    gone = torch.tensor([u for u in range(axis.units) if u not in units_U.tolist()])
    with torch.no_grad():
        for (parameter, dim), segments in axis.segments.items():
            tensor = model.state_dict()[parameter]
            for segment in segments:
                positions = (segment.start + gone[:, None] * segment.width + torch.arange(segment.width)).flatten()
                tensor.index_fill_(dim, positions, 0.0)
    expected = logits(model)
    torch.testing.assert_close(logits(cut(model, config, axis, units_U)), expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(expected, logits(random_model(config)), atol=1e-3)


def test_every_axis_gives_a_model_that_runs(config, axes):
    for axis in axes.values():
        smaller = cut(random_model(config), config, axis, torch.arange(axis.units // 2, axis.units))
        assert logits(smaller).isfinite().all(), axis.name


def test_keeping_all_units_keeps_every_bit(config, axes):
    model = random_model(config)
    for axis in axes.values():
        same = cut(model, config, axis, torch.arange(axis.units))
        assert torch.equal(logits(same), logits(model)), axis.name


def test_the_config_that_was_asked_about_stays_as_it_was(family):
    config = tiny_config(TINY[family])
    config.architectures = [class_name(family)]
    before = copy.deepcopy(config)
    find_axes(config)
    assert vars(config) == vars(before)


def test_what_an_architecture_cannot_be_cut_along_is_said(family, config):
    axes, refused = find_axes(copy.deepcopy(config))
    assert ("kv_groups" in refused) == ("hidden" in refused) == (family in AS_WIDE_AS_HIDDEN)
    assert ("query_heads" in refused) == (family in AS_WIDE_AS_HIDDEN)
    assert not set(axes) & set(refused)
    assert "ffn" in axes
    assert ("experts" in axes) == (family in {"mixtral", "qwen3_moe", "olmoe"})


def test_a_fused_matrix_of_unknown_order_is_refused(monkeypatch):
    monkeypatch.setattr(module, "FUSED", {})
    config = tiny_config(TINY["phi3"])
    config.architectures = [class_name("phi3")]
    axes, refused = find_axes(config)
    assert not {"ffn", "kv_groups"} & set(axes)
    assert "the order of units in" in refused["ffn"]
    assert "qkv_proj" in refused["kv_groups"]


def test_multi_query_attention_has_no_group_to_spare():
    sizes = {**TINY["llama"].tiny_sizes, "num_key_value_heads": 1}
    axes, refused = find_axes(LlamaConfig(**sizes, architectures=["LlamaForCausalLM"]))
    assert "kv_groups" not in axes
    assert "one KV group" in refused["kv_groups"]
