"""`prunus shrink --per-layer`: what it says and refuses, what opens its results, and that it goes on when killed."""

import json
from contextlib import suppress

import pytest
import torch
from transformers import AutoModelForCausalLM

import prunus as api
from families import TINY, save_tiny
from prunus.checkpoint import OutputDirectory, open_checkpoint, read_record
from prunus.checkpoint.per_layer import layer_fields
from prunus.errors import UserError
from prunus.models.families import Family
from prunus.shrinking import WIDTH_SCORES
from prunus.steps import shrink_per_layer
from prunus.steps.shrink import shrink
from prunus.steps.shrink_per_layer import ORDINARY, TIER

SMALL = ("--samples", 4, "--length", 32, "--dtype", "float32")
OPENED = "transformers and engines do not open it; open it with prunus.load"


def tiny(name, folder, tokenizer, **sizes):
    family = TINY[name]
    wide = Family(name, name, "", {**family.sizes, "vocab_size": len(tokenizer), **sizes}, family.own_names)
    directory = save_tiny(wide, folder)
    tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def llama(tmp_path_factory, tiny_tokenizer):
    """Four layers of four KV groups and 96 channels."""
    sizes = {"num_hidden_layers": 4, "num_key_value_heads": 4, "hidden_size": 48}
    return tiny("llama", tmp_path_factory.mktemp("models") / "llama", tiny_tokenizer, **sizes)


@pytest.fixture
def settings(text):
    return {"calibration": (str(text),), "samples": 4, "length": 32, "dtype": "float32"}


@pytest.fixture
def own_widths_win(monkeypatch):
    """As if own widths were always the better ones."""
    real = shrink_per_layer.held_out_kl
    monkeypatch.setattr(
        shrink_per_layer, "held_out_kl", lambda m, where, *a: real(m, where, *a) + 100 * (where.name == "uniform")
    )


@pytest.fixture
def uniform_wins(monkeypatch):
    monkeypatch.setattr(shrink_per_layer, "held_out_kl", lambda _m, where, *_: float(where.name != "uniform"))


def weights(directory):
    checkpoint = open_checkpoint(directory)
    return {name: checkpoint.read(name) for name in checkpoint.tensors}


# --- what it makes ---


@pytest.mark.parametrize("per_layer", ["global", "sensitivity"])
@pytest.mark.parametrize("score", ["second-order", "flap", "taylor", "magnitude"])
def test_layers_differ_and_the_total_is_as_asked(per_layer, score, llama, tmp_path, settings, own_widths_win):
    run = shrink(llama, tmp_path / "out", ffn=0.75, kv_groups=3, per_layer=per_layer, score=score, **settings)
    axes = run.last_step["axes"]
    for axis, units in (("ffn", 96), ("kv_groups", 4)):
        widths = list(axes[axis]["per_layer"].values())
        assert widths[0] == widths[-1] == units  # protected
        assert sum(widths) == 0.75 * units * 4
        assert axes[axis]["after"] == 0.75 * units
    fields = layer_fields(open_checkpoint(run.path).config)
    assert [entry["intermediate_size"] for entry in fields] == list(axes["ffn"]["per_layer"].values())
    uniform = shrink(llama, tmp_path / "uniform", ffn=0.75, kv_groups=3, score=score, **settings)
    assert run.last_step["after"] == uniform.last_step["after"]
    assert run.last_step["after"]["parameters"] == open_checkpoint(run.path).num_parameters
    assert not list(tmp_path.glob("out.*"))


def test_the_measured_kl_decides_and_the_record_says_so(llama, tmp_path, settings):
    run = shrink(llama, tmp_path / "out", ffn=0.75, per_layer="sensitivity", score="flap", **settings)
    facts = run.last_step["allocation"]
    assert facts["asked"] == "sensitivity"
    assert facts["used"] == min(facts["held_out_kl"], key=facts["held_out_kl"].get)
    assert (layer_fields(open_checkpoint(run.path).config) is None) == (facts["used"] == "uniform")
    assert shrink(llama, tmp_path / "out", ffn=0.75, per_layer="sensitivity", score="flap", **settings).reused


def test_where_uniform_is_better_the_result_is_ordinary(prunus, llama, text, tmp_path, uniform_wins):
    flags = ("--ffn", "0.75", "--per-layer", "global", "--calibration", text, *SMALL)
    code, printed, said = prunus("shrink", llama, tmp_path / "out", *flags)
    assert code == 0, said
    assert ORDINARY in " ".join(said.split())
    assert "Allocation global was rejected, so width is uniform" in " ".join(said.split())
    assert json.loads(printed.splitlines()[-1])["allocation"]["used"] == "uniform"
    assert read_record(tmp_path / "out")["history"][-1]["settings"]["per_layer"] == "global"
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").config.intermediate_size == 72


@pytest.mark.parametrize("score", WIDTH_SCORES)
def test_every_score_can_decide_widths(llama, tmp_path, settings, own_widths_win, score):
    run = shrink(llama, tmp_path / "own", ffn=0.75, per_layer="global", score=score, **settings)
    assert run.last_step["allocation"]["used"] == "global"


def test_the_summary_says_what_opens_it(prunus, llama, text, tmp_path, own_widths_win):
    flags = ("--ffn", "0.75", "--per-layer", "global", "--calibration", text, *SMALL)
    code, printed, said = prunus("shrink", llama, tmp_path / "out", *flags)
    assert code == 0, said
    assert OPENED in " ".join(said.split())
    assert TIER in read_record(tmp_path / "out")["history"][-1]["notices"]
    result = json.loads(printed.splitlines()[-1])
    assert result["allocation"]["used"] == "global"
    assert len(result["axes"]["ffn"]["per_layer"]) == 4


def test_dry_run_states_the_tier_and_writes_nothing(prunus, llama, text, tmp_path):
    before = sorted(tmp_path.rglob("*"))
    flags = ("--ffn", "0.75", "--per-layer", "sensitivity", "--calibration", text, *SMALL, "--dry-run")
    code, printed, said = prunus("shrink", llama, tmp_path / "out", *flags)
    assert code == 0, said
    assert sorted(tmp_path.rglob("*")) == before
    assert OPENED in " ".join(said.split())
    assert any(OPENED in remark for remark in json.loads(printed.splitlines()[-1])["remarks"])


def test_help_says_what_does_not_open_it(prunus):
    help_text = " ".join(prunus("shrink", "--help")[1].replace("│", " ").split())
    assert "--per-layer" in help_text
    assert "not in transformers or engines" in help_text


# --- what is done with it ---


@pytest.fixture
def made(llama, tmp_path, settings, own_widths_win):
    return shrink(llama, tmp_path / "own", ffn=0.75, kv_groups=3, per_layer="global", score="flap", **settings).path


def test_all_of_prunus_opens_it(made, llama, text, tmp_path):
    short = {"dtype": "float32", "length": 32}
    result = api.evaluate(made, against=str(llama), text=(str(text),), windows=2, prompts=("The",), **short)
    assert result[0]["against"]["kl"] > 0
    assert result[1]["kind"] == "continuations"
    assert api.bench(made, against=str(llama), prompt_tokens=8, new_tokens=4, repetitions=1)["speedup"]
    described = api.profile(made)
    assert {row["refused"] for row in described["axes"]} == {"its layers differ already"}
    assert described["kv_cache_values_per_token"] == 12 * 2 * 16
    assert api.report([made]).exists()


def test_steps_on_top_of_it_keep_its_widths(made, llama, text, tmp_path):
    few = {"calibration": (str(text),), "samples": 2, "length": 32, "dtype": "float32"}
    sparse = api.sparsify(made, tmp_path / "sparse", method="wanda", pattern="0.5", **few)
    training = {"data": (str(text),), "tokens": 256, "batch_tokens": 64, "length": 32, "held_out": 2}
    recovered = api.recover(sparse.path, tmp_path / "recovered", teacher=str(llama), dtype="float32", **training)
    for run in (sparse, recovered):
        assert layer_fields(open_checkpoint(run.path).config) == layer_fields(open_checkpoint(made).config)
        assert {k: t.shape for k, t in weights(run.path).items()} == {k: t.shape for k, t in weights(made).items()}
    assert api.load(recovered.path)(torch.tensor([[5, 6, 7]])).logits.isfinite().all()


def test_it_is_not_shrunk_again_and_lm_eval_is_refused(made, tmp_path, settings):
    with pytest.raises(UserError, match="differ already; shrink the model that it was made from"):
        shrink(made, tmp_path / "again", ffn=0.5, **settings)
    with pytest.raises(UserError, match="lm-eval opens only what plain transformers opens"):
        api.evaluate(made, tasks=("hellaswag",))


# --- bad input ---


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (("--ffn", "0.5", "--per-layer", "magic"), "per_layer='magic' is not allowed"),
        (("--hidden", "32", "--ffn", "0.5", "--per-layer", "global"), "alone, and hidden was given"),
        (("--layers", "3", "--per-layer", "sensitivity"), "alone, and layers was given"),
        (("--parameters", "0.8", "--per-layer", "global"), "alone, and parameters was given"),
        (("--per-layer", "global"), "nothing to shrink"),
        (("--ffn", "0.25", "--per-layer", "global"), "2 of 4 layers are protected and keep all"),
        (("--ffn", "0.75", "--protect-first", "4", "--per-layer", "global"), "lower --protect-first"),
        (("--ffn", "0.75", "--per-layer", "global", "--calibration", "nowhere.txt"), "nowhere.txt"),
    ],
)
@pytest.mark.parametrize("dry_run", [(), ("--dry-run",)])
def test_mistakes_end_in_one_sentence(refused, llama, tmp_path, flags, sentence, dry_run):
    calibration = () if "nowhere.txt" in flags else ("--calibration", "builtin")
    assert sentence in refused("shrink", llama, tmp_path / "out", *flags, *calibration, *SMALL, *dry_run)
    assert not list(tmp_path.glob("out*"))


def test_experts_are_refused(tmp_path, tiny_tokenizer, settings):
    moe = tiny("mixtral", tmp_path / "moe", tiny_tokenizer)
    with pytest.raises(UserError, match="experts, which keep one width in all layers"):
        shrink(moe, tmp_path / "out", ffn=0.75, per_layer="global", **settings)


def test_text_without_a_window_to_judge_on_is_refused_before_the_work(llama, tmp_path, settings):
    (tmp_path / "short.txt").write_text("a" * 32 * 4)
    with pytest.raises(UserError):
        shrink(
            llama,
            tmp_path / "out",
            ffn=0.75,
            per_layer="global",
            **{**settings, "calibration": (str(tmp_path / "short.txt"),)},
        )
    assert not list(tmp_path.glob("out*"))


# --- the same again, killed or not ---


class Killed(BaseException):
    pass


@pytest.mark.parametrize("per_layer", ["global", "sensitivity"])
def test_killed_it_goes_on_to_the_same_bytes(llama, tmp_path, settings, monkeypatch, own_widths_win, per_layer):
    asked = {"ffn": 0.75, "kv_groups": 3, "per_layer": per_layer, "score": "flap", **settings}
    whole = shrink(llama, tmp_path / "whole", **asked)
    write_shard, written = OutputDirectory.write_shard, []

    def write(self, name, tensors):
        written.append(name)
        if len(written) == 4:
            raise Killed
        write_shard(self, name, tensors)

    monkeypatch.setattr(OutputDirectory, "write_shard", write)
    run, attempts = None, 0
    while run is None and attempts < 20:
        attempts += 1
        written.clear()
        with suppress(Killed):
            run = shrink(llama, tmp_path / "killed", **asked)
    assert run is not None
    assert attempts >= 3
    first, second = weights(run.path), weights(whole.path)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert (run.path / "config.json").read_bytes() == (whole.path / "config.json").read_bytes()
    assert not list(tmp_path.glob("killed.*"))
