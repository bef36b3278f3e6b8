"""Every axis of every tested family, through the whole step: cut, saved, reloaded in a fresh process, same logits."""

import json
import shutil

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from families import TINY, class_name, save_tiny
from fresh_process import fresh_logits, save_logits
from prunus.models import open_model
from prunus.models.axes import changed_config, find_axes
from prunus.models.families import Family
from prunus.steps.shrink import shrink
from prunus.steps.shrink_step import from_hex

TOKENS = torch.randint(3, 128, (2, 16), generator=torch.Generator().manual_seed(0))
TEXT = "The quick brown fox jumps over the lazy dog and goes home. " * 40
CALIBRATION = {"samples": 4, "length": 32, "dtype": "float32", "multiple_of": 1}


def logits(directory):
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    with torch.no_grad():
        return model(TOKENS).logits


def half(axes):
    """Half of the units stay along all axes; of query heads, half of those in the KV groups that stay."""
    sizes = {name: axis.units // 2 for name, axis in axes.items()}
    if "query_heads" in sizes:
        sizes["query_heads"] //= 2
    return sizes


def without_every_other_unit(directory, axes):
    """Set every other unit along all axes to zero: what a cut in half can take away without a trace."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    state = model.state_dict()
    with torch.no_grad():
        for axis in axes.values():
            for name, dim in axis.segments:
                state[name].index_fill_(dim, axis.positions(name, dim)[::2].flatten(), 0.0)
    model.save_pretrained(directory, max_shard_size="60KB")


@pytest.fixture(scope="module")
def runs(tmp_path_factory, tiny_tokenizer):
    """Of every family: the models it was made from, what came out, and the logits that a fresh process gets."""
    root = tmp_path_factory.mktemp("shrunk")
    (root / "text.txt").write_text(TEXT)
    calibration = {**CALIBRATION, "calibration": (str(root / "text.txt"),)}
    outs = []
    for name, family in TINY.items():
        eps = {} if family.own_names else {"rms_norm_eps": 1e-12}
        wide = Family(name, name, "", {**family.sizes, "vocab_size": len(tiny_tokenizer), **eps}, family.own_names)
        dense = save_tiny(wide, root / name)
        tiny_tokenizer.save_pretrained(dense)
        axes = find_axes(open_model(dense).config)[0]
        outs.append(shrink(dense, root / f"{name}-half", **half(axes), **calibration).path)
        zeroed = shutil.copytree(dense, root / f"{name}-zeroed")
        exact = {axis: axes[axis] for axis in axes if axis != "experts"}
        without_every_other_unit(zeroed, exact)
        settings = {**calibration, **half(exact), "score": "magnitude", "refit": False}
        outs.append(shrink(zeroed, root / f"{name}-exact", **settings).path)
    save_logits(outs, TOKENS)
    return root


@pytest.fixture(params=TINY)
def family(request):
    return request.param


def test_a_cut_of_exact_zeros_changes_nothing(family, runs):
    """Not a unit with an effect may go, on any axis, and every coupled tensor must have lost the same ones."""
    expected = logits(runs / f"{family}-zeroed")
    torch.testing.assert_close(fresh_logits(runs / f"{family}-exact"), expected, rtol=1e-3, atol=1e-4)
    assert not torch.allclose(expected, logits(runs / family), atol=1e-2)


def test_saved_and_reloaded_it_gives_the_same_logits(family, runs):
    out = runs / f"{family}-half"
    model = open_model(out)
    hidden = torch.cat([model.embed(TOKENS[n : n + 1]) for n in range(2)])
    for index in range(len(model.spec.blocks)):
        model.load_block(index)
        hidden = torch.cat([model.run_block(index, hidden[n : n + 1]) for n in range(2)])
    streamed = torch.cat([model.logits(TOKENS[n : n + 1], hidden[n : n + 1]) for n in range(2)])
    torch.testing.assert_close(fresh_logits(out), streamed, rtol=1e-3, atol=1e-4)


def test_the_config_says_what_the_weights_are(family, runs):
    dense, out = runs / family, runs / f"{family}-half"
    axes = find_axes(AutoConfig.from_pretrained(dense))[0]
    sizes = half(axes)
    fields = {k: v for name, axis in axes.items() for k, v in axis.config_fields(sizes[name]).items()}
    if "query_heads" in sizes:
        fields |= {"num_key_value_heads": sizes["kv_groups"], "num_attention_heads": sizes["query_heads"]}
    config = AutoConfig.from_pretrained(out)
    assert {key: getattr(config, key) for key in fields} == fields
    before, after = (json.loads((d / "config.json").read_text()) for d in (dense, out))
    assert {k for k in before if before[k] != after.get(k)} <= {config.attribute_map.get(k, k) for k in fields}
    assert after["architectures"] == [class_name(family)]


def test_tokenizer_and_record_go_along(family, runs):
    dense, out = runs / family, runs / f"{family}-half"
    assert (out / "tokenizer.json").read_bytes() == (dense / "tokenizer.json").read_bytes()
    step = json.loads((out / "prunus.json").read_text())["history"][-1]
    assert step["before"]["parameters"] > step["after"]["parameters"]
    tensors = open_model(out).checkpoint.tensors
    assert step["after"]["parameters"] == sum(info.num_elements for info in tensors.values())
    axes = find_axes(AutoConfig.from_pretrained(dense))[0]
    assert {name: row["after"] for name, row in step["axes"].items()} == half(axes)
    assert not out.with_name(f"{out.name}.steps").exists()


@pytest.mark.parametrize("moe", ["mixtral", "qwen3_moe", "olmoe"])
def test_experts_that_stay_are_those_of_the_model(moe, runs, tmp_path):
    """The literal cut: rows of routers and slices of fused tensors, per block, by name."""
    dense = runs / moe
    settings = {**CALIBRATION, "calibration": (str(runs / "text.txt"),)}
    run = shrink(dense, tmp_path / "out", experts=2, **settings)
    kept = {row["block"]: from_hex(row["kept"]) for row in run.last_step["groups"]}
    assert all(len(units) == 2 for units in kept.values())
    whole = AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float32)
    axis = find_axes(whole.config)[0]["experts"]
    small = AutoModelForCausalLM.from_config(changed_config(whole.config, axis.config_fields(2))).eval()
    state = {}
    for name, tensor in whole.state_dict().items():
        cut = ".mlp.gate.weight" in name or ".experts." in name
        state[name] = tensor[kept[int(name.split(".")[2])]] if cut else tensor
    small.load_state_dict(state)
    with torch.no_grad():
        torch.testing.assert_close(logits(run.path), small(TOKENS).logits, rtol=1e-4, atol=1e-5)
