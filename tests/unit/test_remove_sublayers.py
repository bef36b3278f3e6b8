"""`prunus shrink --attention`, `--mlp`: what it says and refuses, what opens its results, and that it goes on."""

import json
from contextlib import suppress

import pytest
import torch

import prunus as api
from prunus.checkpoint import OutputDirectory, open_checkpoint, read_record
from prunus.checkpoint.per_layer import KEY, WITHOUT, layer_fields
from prunus.errors import UserError
from prunus.shrinking.sublayer_influence import least_influential_sublayers
from prunus.steps.remove_sublayers import TIER
from prunus.steps.shrink import shrink

SMALL = ("--samples", 4, "--length", 32, "--dtype", "float32")
OPENED = "transformers and engines do not open it; open it with prunus.load"
ALL = ("--protect-first", 0, "--protect-last", 0)


@pytest.fixture
def settings(text):
    few = {"calibration": (str(text),), "samples": 4, "length": 32, "dtype": "float32"}
    return {**few, "protect_first": 0, "protect_last": 0}


def weights(directory):
    checkpoint = open_checkpoint(directory)
    return {name: checkpoint.read(name) for name in checkpoint.tensors}


def test_the_command_says_what_went_and_what_opens_it(prunus, model, text, tmp_path):
    command = ("shrink", model, tmp_path / "out", "--attention", "0.5", *ALL, "--calibration", text, *SMALL)
    code, printed, said = prunus(*command)
    assert code == 0, said
    assert OPENED in " ".join(said.split())
    result = json.loads(printed.splitlines()[-1])
    facts = result["axes"]["attention"]
    assert (facts["asked"], facts["before"], facts["after"], len(facts["removed"])) == (0.5, 2, 1, 1)
    assert TIER in read_record(tmp_path / "out")["history"][-1]["notices"]
    assert result["after"]["parameters"] == open_checkpoint(tmp_path / "out").num_parameters
    assert json.loads(prunus(*command)[1].splitlines()[-1])["reused"] is True


def test_dry_run_states_the_tier_and_writes_nothing(prunus, model, text, tmp_path):
    before = sorted(tmp_path.rglob("*"))
    command = ("shrink", model, tmp_path / "out", "--mlp", 1, *ALL, "--calibration", text, *SMALL)
    code, printed, said = prunus(*command, "--dry-run")
    assert code == 0, said
    assert sorted(tmp_path.rglob("*")) == before
    assert OPENED in " ".join(said.split())
    expected = json.loads(printed.splitlines()[-1])
    assert expected["groups"][0]["parameters_per_unit"] == 3 * 64 * 128
    assert "model.layers.*.mlp.down_proj.weight" in expected["groups"][0]["members"]
    done = json.loads(prunus(*command)[1].splitlines()[-1])
    assert done["after"] == expected["after"]


def test_help_says_what_does_not_open_it(prunus):
    help_text = " ".join(prunus("shrink", "--help")[1].replace("\u2502", " ").split())
    assert "--attention" in help_text
    assert "--mlp" in help_text


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (("--attention", "0"), "attention=0 leaves nothing"),
        (("--attention", "2"), "attention=2 keeps all 2 layers"),
        (("--mlp", "1"), "mlp=1 was asked for, but the first 1 and the last 1 of 2 layers are protected"),
        (("--attention", "1", "--ffn", "0.5"), "attention was given with ffn"),
        (("--mlp", "1", "--per-layer", "global"), "mlp was given with per_layer"),
        (("--mlp", "1", "--parameters", "0.5"), "a budget chooses the mix itself"),
        (("--mlp", "1", *ALL, *SMALL, "--calibration", "nowhere.txt"), "nowhere.txt"),
    ],
)
@pytest.mark.parametrize("dry_run", [(), ("--dry-run",)])
def test_mistakes_end_in_one_sentence(refused, model, tmp_path, flags, sentence, dry_run):
    assert sentence in refused("shrink", model, tmp_path / "out", *flags, *dry_run)
    assert not list(tmp_path.glob("out*"))


def test_both_from_too_few_layers(tiny_llama_dir, tmp_path, settings):
    with pytest.raises(UserError, match="would take 2 sublayers from 1 layers that are not protected"):
        shrink(tiny_llama_dir, tmp_path / "out", attention=1, mlp=1, **{**settings, "protect_first": 1})


def test_steps_and_measurements_on_top_of_it(tiny_llama_dir, text, tmp_path, settings):
    made = shrink(tiny_llama_dir, tmp_path / "made", attention=1, mlp=1, **settings)
    fields = layer_fields(open_checkpoint(made.path).config)
    assert sorted(kind for entry in fields for kind in entry[WITHOUT]) == ["attention", "mlp"]
    few = {"calibration": (str(text),), "samples": 2, "length": 32, "dtype": "float32"}
    sparse = api.sparsify(made.path, tmp_path / "sparse", pattern="0.5", **few)
    training = {"data": (str(text),), "tokens": 256, "batch_tokens": 64, "length": 32, "held_out": 2}
    recovered = api.recover(sparse.path, tmp_path / "out", teacher=str(tiny_llama_dir), dtype="float32", **training)
    assert layer_fields(open_checkpoint(recovered.path).config) == fields
    result = api.evaluate(recovered.path, text=(str(text),), length=32, windows=2, dtype="float32")
    assert result[0]["perplexity"] > 0
    assert api.bench(made.path, prompt_tokens=8, new_tokens=4, repetitions=1)["model"]
    assert api.profile(made.path)["parameters"] == made.last_step["after"]["parameters"]
    assert api.report([recovered.path]).exists()


class Killed(BaseException):
    pass


def test_killed_it_goes_on_to_the_same_bytes(tiny_llama_dir, tmp_path, settings, monkeypatch):
    whole = shrink(tiny_llama_dir, tmp_path / "whole", attention=1, **settings)
    write_shard, written = OutputDirectory.write_shard, []

    def write(self, name, tensors):
        written.append(name)
        if len(written) == 3:
            raise Killed
        write_shard(self, name, tensors)

    monkeypatch.setattr(OutputDirectory, "write_shard", write)
    with suppress(Killed):
        shrink(tiny_llama_dir, tmp_path / "killed", attention=1, **settings)
    assert not (tmp_path / "killed").exists()
    run = shrink(tiny_llama_dir, tmp_path / "killed", attention=1, **settings)
    first, second = weights(run.path), weights(whole.path)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    configs = [json.loads((one.path / "config.json").read_text())["config"][KEY] for one in (run, whole)]
    assert configs[0] == configs[1]


def test_an_mlp_stays_where_attention_goes():
    influence = {"attention": [0.1, 0.2, 0.3], "mlp": [0.1, 0.3, 0.2]}
    chosen = least_influential_sublayers(influence, [0, 1, 2], {"attention": 1, "mlp": 1})
    assert chosen == {"attention": [0], "mlp": [2]}
