"""Layers of different widths, in every tested family: opened by prunus in a fresh process, refused by transformers."""

import json
import shutil

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from families import TINY, class_name, save_tiny
from fresh_process import run_fresh, streamed_logits
from prunus.checkpoint import open_checkpoint
from prunus.checkpoint.per_layer import KEY, stored_config
from prunus.errors import UserError
from prunus.models import open_model
from prunus.models.axes import find_axes
from prunus.models.configs import edited_config
from prunus.models.families import Family
from prunus.models.limits import kv_cache_values
from prunus.models.whole import load
from prunus.steps import shrink_per_layer
from prunus.steps.shrink import shrink

TOKENS = torch.randint(3, 128, (2, 16), generator=torch.Generator().manual_seed(0))
SHARES = (1.0, 0.5, 0.75)  # of the units that layers 0, 1 and 2 keep
MORE = {"llama": {"num_key_value_heads": 4}}  # 3 heads of a width of 64, which no whole Llama may have
SHRUNK = ("llama", "qwen3", "gemma2", "phi3", "gpt2", "olmo2", "qwen3_moe")
TEXT = "The quick brown fox jumps over the lazy dog and goes home. " * 40
FRESH = """
import json, sys, torch, prunus
tokens = torch.tensor(json.loads(sys.argv[1]))
for directory in sys.argv[2:]:
    model = prunus.load(directory)
    with torch.no_grad():
        logits = model(tokens).logits
        with_cache = model.generate(tokens, max_new_tokens=8, do_sample=False)
        without = model.generate(tokens, max_new_tokens=8, do_sample=False, use_cache=False)
    assert torch.equal(with_cache, without), directory
    torch.save((logits, with_cache), directory + ".logits")
"""
PLAIN = """
import sys, transformers
for directory, name in zip(sys.argv[1::2], sys.argv[2::2]):
    for opener in (transformers.AutoModelForCausalLM, getattr(transformers, name)):
        try:
            opener.from_pretrained(directory)
        except Exception as error:
            said = "open it with prunus.load" in str(error) or "does not recognize" in str(error)
            print(type(error).__name__ if said else error)
        else:
            raise SystemExit(f"{opener.__name__} opened {directory}")
assert "prunus" not in sys.modules
"""


def axes_of(directory):
    axes = find_axes(open_model(directory).config)[0]
    return {name: axes[name] for name in ("ffn", "kv_groups") if name in axes}


def units_left(axis, layer):
    """Which units the layer keeps: every other one goes first."""
    order = [*range(1, axis.units, 2), *range(0, axis.units, 2)]
    return torch.tensor(sorted(order[: max(1, int(SHARES[layer] * axis.units))]))


def tiny(name, directory, tokenizer):
    family = TINY[name]
    sizes = {**family.sizes, "vocab_size": len(tokenizer), **MORE.get(name, {})}
    save_tiny(Family(name, name, "", sizes, family.own_names), directory)
    tokenizer.save_pretrained(directory)
    return directory


def cut_by_shrink(zeroed, out, text, monkeypatch):
    """The whole step, told the widths, on a model whose other units are zeros already."""
    axes = axes_of(zeroed)
    widths = {name: {layer: len(units_left(axis, layer)) for layer in range(3)} for name, axis in axes.items()}
    monkeypatch.setattr(shrink_per_layer, "own_widths", lambda _model, _settings, cut, _batch: with_the(cut, widths))
    monkeypatch.setattr(shrink_per_layer, "held_out_kl", lambda _m, where, *_: float(where.name == "uniform"))
    asked = {name: axis.units // 2 for name, axis in axes.items()}
    calibration = {"calibration": (str(text),), "samples": 2, "length": 32, "dtype": "float32", "multiple_of": 1}
    more = {"score": "magnitude", "refit": False, "protect_first": 0, "protect_last": 0}
    return shrink(zeroed, out, per_layer="global", **asked, **calibration, **more).path


def with_the(cut, widths):
    """Of the layers that have an axis: not all do in a mixture of experts."""
    numbers = {name: {int(p.split(".")[2]) for p, _ in cut.axes[name].segments} for name in widths}
    return {name: {layer: own[layer] for layer in sorted(numbers[name])} for name, own in widths.items()}


def cut_by_hand(dense, out):
    """The directory that the tier says, and its dense twin with zeros for what went."""
    model, axes = open_model(dense), axes_of(dense)
    whole = AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float32)
    zeroed, kept = whole.state_dict(), {}
    for layer, block in enumerate(model.spec.blocks):
        state = model.names.load(model.block_parameters(layer), model.checkpoint.read)
        for axis in axes.values():
            units = units_left(axis, layer)
            state = {name: axis.cut(name, tensor, units) for name, tensor in state.items()}
            gone = [unit for unit in range(axis.units) if unit not in units]
            for name, dim in axis.segments:
                if name.startswith(f"{block.name}."):
                    zeroed[name].index_fill_(dim, axis.positions(name, dim)[gone].flatten(), 0.0)
        kept |= model.names.store(state)
    whole.save_pretrained(out.with_name(f"{out.name}-zeroed"))
    rest = {key: model.checkpoint.read(key) for key in model.checkpoint.tensors if key not in kept}
    shutil.copytree(dense, out, ignore=shutil.ignore_patterns("model*"))
    save_file({k: t.contiguous() for k, t in {**rest, **kept}.items()}, out / "model.safetensors")
    fields = [
        {k: v for axis in axes.values() for k, v in axis.config_fields(len(units_left(axis, layer))).items()}
        for layer in range(len(model.spec.blocks))
    ]
    raw = edited_config(json.loads((dense / "config.json").read_text()), model.config, {KEY: fields})
    (out / "config.json").write_text(json.dumps(stored_config(raw)))


@pytest.fixture(scope="module")
def made(tmp_path_factory, tiny_tokenizer):
    root = tmp_path_factory.mktemp("per_layer")
    (root / "text.txt").write_text(TEXT)
    for name in TINY:
        cut_by_hand(tiny(name, root / name, tiny_tokenizer), root / f"{name}-out")
    with pytest.MonkeyPatch.context() as monkeypatch:
        for name in SHRUNK:
            zeroed = root / f"{name}-out-zeroed"
            tiny_tokenizer.save_pretrained(zeroed)
            cut_by_shrink(zeroed, root / f"{name}-shrunk", root / "text.txt", monkeypatch)
    outs = [str(root / f"{name}-out") for name in TINY] + [str(root / f"{name}-shrunk") for name in SHRUNK]
    run_fresh(FRESH, json.dumps(TOKENS.tolist()), *outs)
    return root


@pytest.fixture(params=TINY)
def family(request):
    return request.param


def test_a_fresh_process_loads_and_generates_what_the_zeros_gave(family, made):
    zeroed = AutoModelForCausalLM.from_pretrained(made / f"{family}-out-zeroed", dtype=torch.float32).eval()
    logits, written = torch.load(made / f"{family}-out.logits", weights_only=True)
    with torch.no_grad():
        torch.testing.assert_close(logits, zeroed(TOKENS).logits, rtol=1e-3, atol=1e-4)
        assert torch.equal(written, zeroed.generate(TOKENS, max_new_tokens=8, do_sample=False))


@pytest.mark.parametrize("shrunk", SHRUNK)
def test_the_step_writes_what_a_cut_by_hand_writes(shrunk, made):
    """Zeros cut with other widths in every layer: the same tensors, and so the same logits."""
    by_hand, by_step = (open_checkpoint(made / f"{shrunk}-{how}") for how in ("out", "shrunk"))
    assert by_step.tensors.keys() == by_hand.tensors.keys()
    scaled = ("norm", "embed")  # those over a cut width make up for it
    for name in by_step.tensors:
        if not any(word in name for word in scaled):
            assert torch.equal(by_step.read(name), by_hand.read(name)), name
    expected = torch.load(made / f"{shrunk}-out.logits", weights_only=True)[0]
    found = torch.load(made / f"{shrunk}-shrunk.logits", weights_only=True)[0]
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


def test_streamed_it_is_the_same_model(family, made):
    streamed = streamed_logits(made / f"{family}-out", TOKENS)
    expected = torch.load(made / f"{family}-out.logits", weights_only=True)[0]
    torch.testing.assert_close(streamed, expected, rtol=1e-3, atol=1e-4)


def test_plain_transformers_refuses_it(made):
    """Also a class that is told to read it: it must not get as far as weights, nor fill any up."""
    arguments = [part for name in TINY for part in (str(made / f"{name}-out"), class_name(name))]
    said = run_fresh(PLAIN, *arguments).splitlines()
    assert said == ["ValueError", "StrictDataclassFieldValidationError"] * len(TINY)


def test_the_cache_holds_what_each_layer_gives(made):
    model = load(made / "llama-out")
    cache = model(TOKENS, use_cache=True).past_key_values
    held = [layer.keys.numel() + layer.values.numel() for layer in cache.layers]
    assert len(set(held)) > 1
    assert sum(held) == TOKENS.numel() * kv_cache_values(model.config)


def test_a_tensor_of_another_shape_stays_an_error(made, tmp_path):
    spoilt = shutil.copytree(made / "llama-out", tmp_path / "spoilt")
    stored = json.loads((spoilt / "config.json").read_text())
    stored["config"][KEY][1]["intermediate_size"] += 1
    (spoilt / "config.json").write_text(json.dumps(stored))
    for opened in (load, open_model):
        with pytest.raises(UserError, match=r"layers\.1\.mlp\.\w+\.weight has shape .*; config.json asks for"):
            opened(spoilt)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"family": None}, "lacks its family or its config"),
        ({"config": {}}, "does not describe its"),
        ({"family": "nothing"}, "unsupported architecture 'nothing'"),
    ],
)
def test_a_damaged_config_ends_in_one_sentence(made, tmp_path, change, sentence):
    spoilt = shutil.copytree(made / "llama-out", tmp_path / "spoilt")
    stored = json.loads((spoilt / "config.json").read_text())
    (spoilt / "config.json").write_text(json.dumps({**stored, **change}))
    with pytest.raises(UserError, match=sentence):
        load(spoilt)


def test_bfloat16_and_its_own_dtype(made):
    assert load(made / "gemma2-out").dtype == torch.float32
    assert load(made / "gemma2-out", dtype="bfloat16").dtype == torch.bfloat16
    with pytest.raises(UserError, match="dtype='int8' is not known; allowed are auto, float32, bfloat16"):
        load(made / "gemma2-out", dtype="int8")


def test_transformers_is_not_let_write_what_it_would_read_back_wrong(made, tmp_path):
    with pytest.raises(UserError, match="cannot write a model whose layers differ"):
        load(made / "llama-out").save_pretrained(tmp_path / "saved")


def test_an_ordinary_directory_opens_too(made):
    model = load(made / "llama")
    plain = AutoModelForCausalLM.from_pretrained(made / "llama").eval()
    with torch.no_grad():
        assert torch.equal(model(TOKENS).logits, plain(TOKENS).logits)
