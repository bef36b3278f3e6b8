"""The verb `shrink`: what it says, what it refuses, and that it goes on where it was killed."""

import json
from contextlib import suppress

import pytest
import torch

from prunus.checkpoint import OutputDirectory, read_record
from prunus.errors import UserError
from prunus.models import open_model
from prunus.shrinking import WIDTH_SCORES
from prunus.steps.shrink import shrink

SMALL = ("--samples", 4, "--length", 32, "--dtype", "float32")


@pytest.fixture
def settings(text):
    return {"calibration": (str(text),), "samples": 4, "length": 32, "dtype": "float32"}


def weights(directory):
    checkpoint = open_model(directory).checkpoint
    return {name: checkpoint.read(name) for name in checkpoint.tensors}


def assert_same(first, second):
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


# --- the command line ---


def test_the_command_ends_with_one_json_object(prunus, model, text, tmp_path):
    out = tmp_path / "out"
    code, printed, _ = prunus("shrink", model, out, "--ffn", "0.5", "--kv-groups", 1, "--calibration", text, *SMALL)
    assert code == 0
    result = json.loads(printed.splitlines()[-1])
    assert result["axes"]["ffn"] == {"asked": 0.5, "before": 128, "after": 64}
    assert result["axes"]["kv_groups"]["after"] == 1
    assert result["after"]["kv_cache_values_per_token"] * 2 == result["before"]["kv_cache_values_per_token"]
    again = prunus("shrink", model, out, "--ffn", "0.5", "--kv-groups", 1, "--calibration", text, *SMALL)
    assert json.loads(again[1].splitlines()[-1])["reused"] is True


def test_dry_run_tells_all_and_writes_nothing(prunus, model, text, tmp_path):
    command = ("shrink", model, tmp_path / "out", "--ffn", "0.5", "--hidden", 32, "--calibration", text, *SMALL)
    before = sorted(tmp_path.rglob("*"))
    code, printed, errors = prunus(*command, "--dry-run")
    assert code == 0
    assert sorted(tmp_path.rglob("*")) == before
    expected = json.loads(printed.splitlines()[-1])
    ffn = next(group for group in expected["groups"] if group["axis"] == "ffn")
    assert ffn["members"]["model.layers.*.mlp.down_proj.weight"] == [1]
    assert "nothing was touched" in errors
    done = json.loads(prunus(*command)[1].splitlines()[-1])
    assert done["after"] == expected["after"]


def test_rounding_that_changes_the_request_is_said(prunus, model, text, tmp_path):
    command = ("shrink", model, tmp_path / "out", "--ffn", "0.52", "--calibration", text, *SMALL)
    assert "ffn: 0.52 of 128 would be 66.56; rounded to 64" in " ".join(prunus(*command)[2].split())
    assert "rounded to 64" in read_record(tmp_path / "out")["history"][-1]["notices"][0]


def test_layers_and_channels_in_one_call(prunus, tiny_llama_dir, text, tmp_path):
    flags = ("--layers", 1, "--protect-last", 0, "--ffn", 64, "--calibration", text, *SMALL)
    expected = json.loads(prunus("shrink", tiny_llama_dir, tmp_path / "out", *flags, "--dry-run")[1].splitlines()[-1])
    code, printed, errors = prunus("shrink", tiny_llama_dir, tmp_path / "out", *flags)
    assert code == 0, errors
    result = json.loads(printed.splitlines()[-1])
    assert result["axes"]["layers"] == {"asked": 1, "before": 2, "after": 1, "kept": [0], "removed": [1]}
    assert result["axes"]["ffn"]["after"] == 64
    assert result["before"] == expected["before"]
    assert result["after"] == expected["after"]
    model = open_model(tmp_path / "out")
    assert (len(model.spec.blocks), model.config.intermediate_size) == (1, 64)
    assert result["after"]["parameters"] == model.checkpoint.num_parameters
    again = prunus("shrink", tiny_llama_dir, tmp_path / "out", *flags)
    assert json.loads(again[1].splitlines()[-1])["reused"] is True


# --- bad input ---


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ((), "nothing to shrink"),
        (("--ffn", "many"), "--ffn 'many' is no number"),
        (("--ffn", "0"), "ffn=0 leaves nothing"),
        (("--ffn", "999"), "ffn=999 was asked for, but the model has 128"),
        (("--kv-groups", "3"), "kv_groups=3 was asked for, but the model has 2"),
        (("--experts", "0.5"), "cannot be cut along experts: llama has none"),
        (("--layers", "3"), "layers=3 was asked for, but the model has 2"),
        (("--layers", "1"), "the first 1 and the last 1 of 2 layers are protected"),
        (("--layers", "0.5", "--layer-score", "magic"), "unknown score 'magic' of layers"),
        (("--hidden", "63"), "llama takes no hidden of 63"),
        (("--ffn", "0.5", "--score", "magic"), "unknown score 'magic'"),
        (("--ffn", "0.5", "--length", "32", "--calibration", "nowhere.txt"), "nowhere.txt"),
        (("--ffn", "0.5", "--length", "9999"), "over the model's maximum"),
        (("--ffn", "0.5", "--max-memory", "1MiB"), "max memory of 0.00 GiB is too small"),
        (("--ffn", "0.5", "--score", "taylor", "--max-memory", "1MiB"), "this score loads the whole model"),
    ],
)
@pytest.mark.parametrize("dry_run", [(), ("--dry-run",)])
def test_mistakes_end_in_one_sentence(refused, model, tmp_path, flags, sentence, dry_run):
    assert sentence in refused("shrink", model, tmp_path / "out", *flags, *dry_run)
    assert not list(tmp_path.glob("out*"))


def test_out_that_is_something_else_is_left_alone(refused, model, text, tmp_path):
    (tmp_path / "out").mkdir()
    command = ("shrink", model, tmp_path / "out", "--ffn", "0.5", "--calibration", text, *SMALL)
    assert "is not the result of these settings" in refused(*command, out=None)
    assert not list((tmp_path / "out").iterdir())


def test_scores_that_need_gradients_are_refused_for_fused_experts(tmp_path, tiny_tokenizer, settings):
    from families import TINY, save_tiny
    from prunus.models.families import Family

    sizes = {**TINY["mixtral"].sizes, "vocab_size": len(tiny_tokenizer)}
    moe = save_tiny(Family("mixtral", "mixtral", "", sizes), tmp_path / "moe")
    tiny_tokenizer.save_pretrained(moe)
    with pytest.raises(UserError, match="keeps its experts in fused tensors"):
        shrink(moe, tmp_path / "out", ffn=0.5, score="taylor", **settings)


# --- the step ---


@pytest.mark.parametrize("score", WIDTH_SCORES)
def test_every_score_makes_a_model_of_the_asked_shape(score, tiny_llama_dir, tmp_path, settings):
    run = shrink(tiny_llama_dir, tmp_path / "out", ffn=96, kv_groups=1, score=score, **settings)
    model = open_model(run.path)
    assert {linear.shape for _, linear in model.spec.matrices} == {(32, 64), (16, 64), (64, 32), (96, 64), (64, 96)}
    assert all(tensor.isfinite().all() for tensor in weights(run.path).values())


def test_the_refit_lowers_the_error_of_the_same_cut(tiny_llama_dir, tmp_path, settings):
    runs = [shrink(tiny_llama_dir, tmp_path / str(refit), ffn=64, refit=refit, **settings) for refit in (True, False)]
    refitted, plain = (run.last_step["groups"] for run in runs)
    assert refitted[0]["kept"] == plain[0]["kept"]
    assert all(row["error"] < row["error_plain"] for row in refitted)
    assert all(row["error"] == row["error_plain"] for row in plain)


def test_a_bias_takes_the_mean_of_what_goes(tmp_path, tiny_tokenizer, settings):
    """FLAP on a family with a bias on `down`: the output keeps its mean though the weights stay as they were."""
    from families import TINY, save_tiny
    from prunus.models.families import Family

    dense = save_tiny(
        Family("opt", "opt", "", {**TINY["opt"].sizes, "vocab_size": len(tiny_tokenizer)}), tmp_path / "m"
    )
    tiny_tokenizer.save_pretrained(dense)
    runs = {s: shrink(dense, tmp_path / s, ffn=48, score=s, refit=False, **settings) for s in ("flap", "magnitude")}
    bias = "model.decoder.layers.0.fc2.bias"
    before = weights(dense)[bias]
    assert torch.equal(weights(runs["magnitude"].path)[bias], before)
    assert not torch.allclose(weights(runs["flap"].path)[bias], before, atol=1e-4)
    row = runs["flap"].last_step["groups"][0]
    assert row["error"] < row["error_plain"]


class Killed(BaseException):
    pass


@pytest.mark.parametrize("wishes", [{"ffn": 64}, {"hidden": 32, "kv_groups": 1}])
@pytest.mark.parametrize("score", ["second-order", "taylor"])
def test_killed_it_goes_on_to_the_same_bytes(tiny_llama_dir, tmp_path, settings, monkeypatch, wishes, score):
    whole = shrink(tiny_llama_dir, tmp_path / "whole", score=score, **wishes, **settings)
    write_shard, written = OutputDirectory.write_shard, []

    def dies_at(number):
        def write(self, name, tensors):
            written.append(name)
            if len(written) == number:
                raise Killed
            write_shard(self, name, tensors)

        return write

    monkeypatch.setattr(OutputDirectory, "write_shard", dies_at(3))
    run, attempts = None, 0
    while run is None and attempts < 20:
        attempts += 1
        written.clear()
        with suppress(Killed):
            run = shrink(tiny_llama_dir, tmp_path / "killed", score=score, **wishes, **settings)
    assert run is not None
    assert attempts >= 2
    assert_same(weights(run.path), weights(whole.path))
    kept = [[row["kept"] for row in r.last_step["groups"]] for r in (run, whole)]
    assert kept[0] == kept[1]
    assert not list(tmp_path.glob("killed.*"))


def test_all_parts_of_a_call_run_in_one_dtype(tiny_llama_dir, tmp_path, settings, monkeypatch):
    """Measurements may differ; a call that goes on takes the dtype of the parts that are done."""
    measured = iter([torch.bfloat16, torch.float32, torch.float32])
    monkeypatch.setattr("prunus.steps.shrink.choose_dtype", lambda *_: next(measured))
    monkeypatch.setattr("prunus.steps.layer_step.choose_dtype", lambda *_: pytest.fail("measured again"))
    settings |= {"dtype": "auto", "layers": 1, "protect_last": 0, "ffn": 0.5, "query_heads": 2}
    original = OutputDirectory.finish

    def finish_and_stop(self, record, config=None):
        original(self, record, config)
        raise KeyboardInterrupt

    monkeypatch.setattr(OutputDirectory, "finish", finish_and_stop)
    with pytest.raises(KeyboardInterrupt):
        shrink(tiny_llama_dir, tmp_path / "out", **settings)
    monkeypatch.setattr(OutputDirectory, "finish", original)
    run = shrink(tiny_llama_dir, tmp_path / "out", **settings)
    assert [step["dtype"] for step in run.record["history"]] == ["bfloat16"] * 3
    assert next(measured) is torch.float32  # once in each of the two calls


def test_a_score_of_experts_is_recorded_where_experts_are_cut(tiny_llama_dir, tmp_path, settings, tiny_tokenizer):
    from families import TINY, save_tiny
    from prunus.models.families import Family

    run = shrink(tiny_llama_dir, tmp_path / "dense", layers=1, protect_last=0, ffn=0.5, **settings)
    assert not [step for step in run.record["history"] if step["settings"].get("expert_score")]
    sizes = {**TINY["qwen3_moe"].sizes, "vocab_size": len(tiny_tokenizer)}
    directory = save_tiny(Family("qwen3_moe", "moe", "", sizes), tmp_path / "moe")
    tiny_tokenizer.save_pretrained(directory)
    run = shrink(directory, tmp_path / "out", experts=0.5, expert_ffn=0.5, multiple_of=1, **settings)
    assert [step["settings"]["expert_score"] for step in run.record["history"]] == ["reap", None]


def test_a_recipe_shrinks_what_a_step_before_made(tiny_llama_dir, tmp_path, settings):
    from prunus.pipeline import run as run_recipe
    from prunus.recipe import parse_recipe

    step = {**settings, "calibration": list(settings["calibration"])}
    content = {"version": 1, "model": str(tiny_llama_dir), "steps": [{"shrink": {"ffn": 64, **step}}]}
    content["steps"].append({"sparsify": {"pattern": "0.5", "method": "magnitude"}})
    run = run_recipe(parse_recipe(content), tmp_path / "out")
    assert [entry["step"] for entry in run.record["history"]] == ["shrink", "sparsify"]
    assert open_model(run.path).config.intermediate_size == 64
