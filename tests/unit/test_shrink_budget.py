"""A budget becomes a mix: every mix meets it, and the one is taken that costs least where it was measured."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from prunus.errors import UserError
from prunus.models import open_model
from prunus.models.cut import axes_named, plan_cut
from prunus.models.footprint import footprint
from prunus.settings_shrink import ShrinkSettings
from prunus.steps.shrink import shrink
from prunus.steps.shrink_budget import mixes


@pytest.fixture
def settings(text):
    return {"calibration": (str(text),), "samples": 4, "length": 32, "dtype": "float32"}


@pytest.mark.parametrize("limit", ["parameters", "decode_bytes"])
@pytest.mark.parametrize("ratio", [0.9, 0.75, 0.6])
def test_every_mix_meets_the_budget_and_one_channel_more_would_not(tiny_llama_dir, limit, ratio):
    model = open_model(tiny_llama_dir)
    asked = ShrinkSettings.check(**{limit: ratio}, multiple_of=1)

    def weight(sizes):
        cut = plan_cut(model.config, axes_named(model.config, sizes), sizes)
        return getattr(footprint(model, cut.after, cut.config), limit)

    allowed = ratio * weight({"ffn": 128})
    found = mixes(model, asked)
    assert found
    for mix in found:
        assert weight(mix) <= allowed
        assert mix["ffn"] == 128 or weight({**mix, "ffn": mix["ffn"] + 1}) > allowed


def test_widths_are_rounded_down_to_the_multiple(tiny_llama_dir):
    found = mixes(open_model(tiny_llama_dir), ShrinkSettings(parameters=0.75, multiple_of=32))
    assert found
    assert all(mix["ffn"] % 32 == 0 for mix in found)


def test_a_budget_out_of_reach_is_refused(refused, model, tmp_path):
    sentence = refused("shrink", model, tmp_path / "out", "--parameters", "0.1")
    assert "parameters=0.1 is out of reach by KV groups and FFN channels alone" in sentence


def test_a_budget_stands_alone(refused, model, tmp_path):
    sentence = refused("shrink", model, tmp_path / "out", "--parameters", "0.8", "--ffn", "0.5")
    assert "ffn and parameters were given" in sentence


@pytest.mark.parametrize("useless", ["kv_groups", "ffn"])
def test_what_does_nothing_goes_first(tiny_llama_dir, tiny_tokenizer, tmp_path, settings, useless):
    """Half of the groups, or of the channels, have no effect: the mix takes those."""
    whole = AutoModelForCausalLM.from_pretrained(tiny_llama_dir, dtype=torch.float32)
    with torch.no_grad():
        for layer in whole.model.layers:
            reader = layer.self_attn.o_proj if useless == "kv_groups" else layer.mlp.down_proj
            reader.weight[:, : reader.weight.shape[1] // 2] = 0
    whole.save_pretrained(tmp_path / "model")
    tiny_tokenizer.save_pretrained(tmp_path / "model")
    half = {"kv_groups": 1} if useless == "kv_groups" else {"ffn": 64}
    model = open_model(tmp_path / "model")
    cut = plan_cut(model.config, axes_named(model.config, half), half)
    ratio = footprint(model, cut.after, cut.config).parameters / footprint(model, cut.before, model.config).parameters
    run = shrink(tmp_path / "model", tmp_path / "out", parameters=ratio + 1e-6, multiple_of=1, **settings)
    step = run.last_step
    assert {name: sizes["after"] for name, sizes in step["axes"].items() if sizes["after"] < sizes["before"]} == half
    assert step["mixes"][0]["loss"] < 1e-3 < step["mixes"][1]["loss"]
    again = shrink(tmp_path / "model", tmp_path / "out", parameters=ratio + 1e-6, multiple_of=1, **settings)
    assert again.reused


def test_dry_run_names_the_mixes(prunus, model, text, tmp_path):
    command = ("shrink", model, tmp_path / "out", "--parameters", "0.8", "--calibration", text, "--samples", 4)
    _, _, errors = prunus(*command, "--length", 32, "--dry-run")
    assert "the mix will be the one of these that costs least" in " ".join(errors.split())


def test_no_mix_at_all_is_said(tiny_llama_dir):
    with pytest.raises(UserError, match="out of reach"):
        mixes(open_model(tiny_llama_dir), ShrinkSettings(decode_bytes=0.05))
