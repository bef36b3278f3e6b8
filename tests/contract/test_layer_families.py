"""Every tested family loses layers: saved, reloaded in a fresh process, the logits of the model that skips them."""

import json
import shutil

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from families import TINY, save_tiny
from fresh_process import fresh_logits, save_logits
from prunus.errors import UserError
from prunus.models import open_model
from prunus.models.families import Family
from prunus.models.trace import find_blocks
from removing import remove_layers

TOKENS = torch.randint(3, 128, (2, 24), generator=torch.Generator().manual_seed(0))
TEXT = "The quick brown fox jumps over the lazy dog and goes home. " * 40
DEPTH = 6
OWN_SIZES = {
    "gpt2": {"n_layer": DEPTH},
    "gemma3_text": {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"] * 2},
    "qwen3_moe": {"mlp_only_layers": [0, 3, 5]},
}
NORM_AFTERWARDS = {"gemma2", "gemma3_text", "olmo2"}
EXPERTS = {"mixtral", "qwen3_moe", "olmoe"}


def load(directory):
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()


def logits_without(directory, removed):
    """Of the dense model in memory, in which these layers pass on what they are given."""
    model, returns_tuple = load(directory), open_model(directory).spec.blocks[0].returns_tuple
    for layer in removed:
        skip = (lambda hidden_states, *_, **__: (hidden_states,)) if returns_tuple else lambda hidden, *_, **__: hidden
        find_blocks(model)[1][layer].forward = skip
    with torch.no_grad():
        return model(TOKENS, use_cache=False).logits


def save_deep(name, tokenizer, directory):
    family = TINY[name]
    depth = {} if family.own_names else {"num_hidden_layers": DEPTH}
    sizes = {**family.sizes, **depth, **OWN_SIZES.get(name, {}), "vocab_size": len(tokenizer)}
    tokenizer.save_pretrained(save_tiny(Family(name, name, "", sizes, family.own_names), directory))
    return directory


def zero_layer(directory, layer):
    """All parameters of a layer zero: it adds nothing to the hidden states."""
    model = load(directory)
    with torch.no_grad():
        for parameter in find_blocks(model)[1][layer].parameters():
            parameter.zero_()
    model.save_pretrained(directory, max_shard_size="60KB")


@pytest.fixture(scope="module")
def runs(tmp_path_factory, tiny_tokenizer):
    """Of every family: the dense model, what came out of it, and the logits that a fresh process gets."""
    root = tmp_path_factory.mktemp("depth")
    (root / "text.txt").write_text(TEXT)
    common = {"calibration": (str(root / "text.txt"),), "samples": 4, "length": 32, "dtype": "float32"}
    outs = []
    for name in TINY:
        dense = save_deep(name, tiny_tokenizer, root / name)
        outs.append(remove_layers(dense, root / f"{name}-out", layers=0.67, fold=False, **common).path)
        zeroed = shutil.copytree(dense, root / f"{name}-zeroed")
        zero_layer(zeroed, 2)
        settings = {"layers": DEPTH - 1, "score": "block-influence", "fold": False, **common}
        outs.append(remove_layers(zeroed, root / f"{name}-exact", **settings).path)
        if name not in NORM_AFTERWARDS | EXPERTS:
            settings = {"layers": DEPTH - 2, "score": "block-influence", **common}
            outs.append(remove_layers(dense, root / f"{name}-folded", **settings).path)
    save_logits(outs, TOKENS)
    return root


@pytest.fixture(params=TINY)
def family(request):
    return request.param


def step_of(directory):
    return json.loads((directory / "prunus.json").read_text())["history"][-1]


def test_the_result_is_the_model_that_skips_these_layers(family, runs):
    out = runs / f"{family}-out"
    removed = step_of(out)["axes"]["layers"]["removed"]
    assert len(removed) == 2
    torch.testing.assert_close(fresh_logits(out), logits_without(runs / family, removed), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(fresh_logits(out), logits_without(runs / family, []), atol=1e-3)


def test_a_layer_without_effect_is_found_and_goes_without_a_trace(family, runs):
    out = runs / f"{family}-exact"
    assert step_of(out)["axes"]["layers"]["removed"] == [2]
    torch.testing.assert_close(fresh_logits(out), logits_without(runs / f"{family}-zeroed", []), rtol=1e-4, atol=1e-4)


def test_the_config_follows_and_all_else_stays(family, runs):
    before, after = (json.loads((runs / name / "config.json").read_text()) for name in (family, f"{family}-out"))
    kept = step_of(runs / f"{family}-out")["axes"]["layers"]["kept"]
    config = AutoConfig.from_pretrained(runs / f"{family}-out")
    depth_name = config.attribute_map.get("num_hidden_layers", "num_hidden_layers")
    changed = {key for key in before.keys() | after.keys() if before.get(key) != after.get(key)}
    assert depth_name in changed
    assert changed <= {depth_name, "layer_types", "mlp_only_layers", "max_window_layers"}
    if "layer_types" in before:
        assert after["layer_types"] == [before["layer_types"][layer] for layer in kept]
    if "mlp_only_layers" in before:
        assert [kept[new] for new in after["mlp_only_layers"]] == [n for n in before["mlp_only_layers"] if n in kept]


def test_what_stays_is_the_same_bytes(family, runs):
    dense, out = open_model(runs / family), open_model(runs / f"{family}-out")
    kept = step_of(runs / f"{family}-out")["axes"]["layers"]["kept"]
    for new, layer in enumerate(kept):
        for old_key, new_key in zip(dense.block_keys()[layer], out.block_keys()[new], strict=True):
            assert torch.equal(dense.checkpoint.read(old_key), out.checkpoint.read(new_key)), new_key
    assert out.names.unused == dense.names.unused
    assert step_of(runs / f"{family}-out")["after"]["parameters"] == out.checkpoint.num_parameters
    assert (runs / f"{family}-out" / "tokenizer.json").read_bytes() == (runs / family / "tokenizer.json").read_bytes()


@pytest.mark.parametrize("family", [name for name in TINY if name not in NORM_AFTERWARDS | EXPERTS])
def test_a_folded_model_changes_one_matrix_with_its_bias_for_each_run(family, runs):
    step, dense, out = (
        step_of(runs / f"{family}-folded"),
        open_model(runs / family),
        open_model(runs / f"{family}-folded"),
    )
    kept, changed = step["axes"]["layers"]["kept"], []
    for new, layer in enumerate(kept):
        for old_key, new_key in zip(dense.block_keys()[layer], out.block_keys()[new], strict=True):
            if not torch.equal(dense.checkpoint.read(old_key), out.checkpoint.read(new_key)):
                changed.append(dense.names.parameters_of([old_key])[0].rpartition(".")[0])
    assert list(dict.fromkeys(changed)) == [fold["into"] for fold in step["folds"]]
    assert changed
    assert all(fold["error"] < fold["error_before"] for fold in step["folds"])
    assert fresh_logits(runs / f"{family}-folded").isfinite().all()


@pytest.mark.parametrize("family", sorted(NORM_AFTERWARDS | EXPERTS))
def test_where_nothing_can_be_folded_it_is_said_and_what_to_do(family, runs, tmp_path):
    text = {"calibration": (str(runs / "text.txt"),), "samples": 4, "length": 32, "dtype": "float32"}
    reason = f"architecture '{family}' does not add" if family in NORM_AFTERWARDS else "ends in 4 matrices"
    with pytest.raises(UserError, match=rf"{reason}.*--no-fold"):
        remove_layers(runs / family, tmp_path / "out", layers=5, **text)
    assert not list(tmp_path.iterdir())
