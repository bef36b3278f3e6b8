"""Blocks without attention or without their MLP, in every family that has them as modules."""

import json
import shutil

import pytest
import torch
from test_per_layer_families import FRESH, PLAIN, TEXT
from transformers import AutoModelForCausalLM

from families import TINY, class_name, save_tiny
from fresh_process import run_fresh, streamed_logits
from prunus.checkpoint import open_checkpoint
from prunus.errors import UserError
from prunus.models import open_model
from prunus.models.families import Family
from prunus.models.limits import kv_cache_values
from prunus.models.whole import load
from prunus.settings_shrink import ShrinkSettings
from prunus.shrinking.block_influence import block_influence
from prunus.steps.calibration_text import calibration_batch
from prunus.steps.remove_sublayers import influences
from prunus.steps.shrink import shrink

TOKENS = torch.randint(3, 128, (2, 16), generator=torch.Generator().manual_seed(0))
HELD = [name for name in TINY if name != "opt"]  # OPT keeps its FFN in the block itself
ASKED = {"attention": {"attention": 1}, "mlp": {"mlp": 2}, "both": {"attention": 2, "mlp": 2}}


@pytest.fixture(scope="module")
def made(tmp_path_factory, tiny_tokenizer):
    root = tmp_path_factory.mktemp("sublayers")
    (root / "text.txt").write_text(TEXT)
    for name in TINY:
        family = TINY[name]
        sizes = {**family.sizes, "vocab_size": len(tiny_tokenizer)}
        save_tiny(Family(name, name, "", sizes, family.own_names), root / name)
        tiny_tokenizer.save_pretrained(root / name)
    for name in HELD:
        for how, asked in ASKED.items():
            shrink(root / name, root / f"{name}-{how}", **asked, **settings(root))
    outs = [str(root / f"{name}-{how}") for name in HELD for how in ASKED]
    run_fresh(FRESH, json.dumps(TOKENS.tolist()), *outs)
    return root


def settings(root):
    calibration = {"calibration": (str(root / "text.txt"),), "samples": 2, "length": 32, "dtype": "float32"}
    return {**calibration, "protect_first": 0, "protect_last": 0}


def with_zeros(directory, gone, sublayers):
    """The original, the outputs of what goes set to zero."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    prefix = [block.name for block in open_model(directory).spec.blocks]

    def zeros(_module, _args, out):
        return (out[0] * 0, *out[1:]) if isinstance(out, tuple) else out * 0

    for kind, layers in gone.items():
        for layer in layers:
            name = f"{prefix[layer]}.{sublayers[layer][kind].module}"
            model.get_submodule(name).register_forward_hook(zeros)
    return model


def gone_of(directory):
    step = json.loads((directory / "prunus.json").read_text())["history"][-1]
    return {kind: facts["removed"] for kind, facts in step["axes"].items()}


@pytest.mark.parametrize("how", ASKED)
@pytest.mark.parametrize("family", HELD)
def test_a_fresh_process_gets_the_original_with_zeros(family, how, made):
    out = made / f"{family}-{how}"
    gone = gone_of(out)
    assert {kind: 3 - len(layers) for kind, layers in gone.items()} == ASKED[how]
    expected = with_zeros(made / family, gone, open_model(made / family).sublayers())
    logits, written = torch.load(f"{out}.logits", weights_only=True)
    with torch.no_grad():
        torch.testing.assert_close(logits, expected(TOKENS).logits, rtol=1e-4, atol=1e-5)
        assert torch.equal(written, expected.generate(TOKENS, max_new_tokens=8, do_sample=False))


@pytest.mark.parametrize("family", HELD)
def test_tensors_of_what_went_are_not_there(family, made):
    dense, out = open_checkpoint(made / family), open_checkpoint(made / f"{family}-both")
    gone = set(dense.tensors) - set(out.tensors)
    layers = {int(next(part for part in key.split(".") if part.isdigit())) for key in gone}
    assert layers == {layer for layers in gone_of(made / f"{family}-both").values() for layer in layers}
    assert all(torch.equal(out.read(name), dense.read(name)) for name in out.tensors)
    step = json.loads((out.path / "prunus.json").read_text())["history"][-1]
    assert step["after"]["parameters"] == out.num_parameters
    assert step["before"]["parameters"] == dense.num_parameters


def test_plain_transformers_refuses_it(made):
    arguments = [part for name in HELD for part in (str(made / f"{name}-attention"), class_name(name))]
    said = run_fresh(PLAIN, *arguments).splitlines()
    assert said == ["ValueError", "StrictDataclassFieldValidationError"] * len(HELD)


@pytest.mark.parametrize("family", ["llama", "gemma2", "qwen3_moe", "gpt_neox"])
def test_streamed_it_is_the_same_model(family, made):
    streamed = streamed_logits(made / f"{family}-both", TOKENS)
    expected = torch.load(made / f"{family}-both.logits", weights_only=True)[0]
    torch.testing.assert_close(streamed, expected, rtol=1e-3, atol=1e-4)


def test_the_cache_holds_a_mark_where_attention_was(made):
    model = load(made / "llama-attention")
    cache = model(TOKENS, use_cache=True).past_key_values
    held = [layer.keys.numel() + layer.values.numel() for layer in cache.layers]
    assert sorted(held)[0] == 2 * TOKENS.numel()
    assert sum(held) == TOKENS.numel() * kv_cache_values(model.config)


def test_a_damaged_config_ends_in_one_sentence(made, tmp_path):
    spoilt = shutil.copytree(made / "llama-attention", tmp_path / "spoilt")
    stored = json.loads((spoilt / "config.json").read_text())
    lacks = next(entry["without"] for entry in stored["config"]["prunus_layers"] if entry)
    for damage, sentence in (({"attention": "self_attn"}, "does not describe its"), ({}, "has no tensor for")):
        lacks.clear()
        lacks.update(damage)
        (spoilt / "config.json").write_text(json.dumps(stored))
        with pytest.raises(UserError, match=sentence):
            load(spoilt)


def test_opt_is_refused(made, tmp_path):
    with pytest.raises(UserError, match="attention or MLP of opt cannot go alone"):
        shrink(made / "opt", tmp_path / "out", attention=2, **settings(made))


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
def test_influence_is_the_papers_formula(family, made):
    """1 - cosine before and after each residual step, written out for blocks that have a step after the other."""
    model = open_model(made / family)
    batch = calibration_batch(model, ShrinkSettings.check(attention=2, **settings(made)))
    found = influences(model, model.sublayers(), batch)
    whole = AutoModelForCausalLM.from_pretrained(made / family, dtype=torch.float32).eval()
    seen = {}
    for number, block in enumerate(model.spec.blocks):
        module = whole.get_submodule(block.name)
        between = {"llama": "post_attention_layernorm", "gemma2": "pre_feedforward_layernorm", "gpt2": "ln_2"}[family]
        keep = seen.setdefault(number, {})
        module.register_forward_pre_hook(lambda _m, args, keep=keep: keep.update(before=args[0]))
        module.get_submodule(between).register_forward_pre_hook(lambda _m, args, keep=keep: keep.update(mid=args[0]))
        module.register_forward_hook(lambda _m, _a, out, keep=keep: keep.update(after=out))
    with torch.no_grad():
        whole(batch.tokens_NT)
    for number, keep in seen.items():
        after = keep["after"][0] if isinstance(keep["after"], tuple) else keep["after"]
        for kind, (x, y) in {"attention": (keep["before"], keep["mid"]), "mlp": (keep["mid"], after)}.items():
            expected = float(block_influence(x.flatten(0, 1), y.flatten(0, 1)).mean())
            assert found[kind][number] == pytest.approx(expected, rel=1e-3, abs=1e-5)


def test_the_least_influential_go(made):
    step = json.loads((made / "llama-both" / "prunus.json").read_text())["history"][-1]
    attention, mlp = step["scores"]["attention"], step["scores"]["mlp"]
    assert step["axes"]["attention"]["removed"] == [attention.index(min(attention))]
    others = [layer for layer in range(3) if layer not in step["axes"]["attention"]["removed"]]
    assert step["axes"]["mlp"]["removed"] == [min(others, key=lambda layer: mlp[layer])]
