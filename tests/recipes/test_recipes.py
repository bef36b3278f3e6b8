"""Every shipped recipe is read, and run on a tiny model with everything that costs time made small."""

from collections.abc import Iterable
from itertools import groupby
from pathlib import Path

import pytest
import torch
import yaml
from transformers import LlamaConfig, LlamaForCausalLM

import prunus
from prunus.benchmark import measurement
from prunus.errors import UserError
from prunus.recipe import MAKES_A_MODEL, load_recipe, parse_recipe

RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*.yaml"))
TEXT = "".join(f"{n} brown foxes jump over {n * 7} lazy dogs. " for n in range(400))
SMALL = {
    "samples": 4,
    "length": 32,
    "windows": 2,
    "prompt_tokens": 8,
    "new_tokens": 3,
    "repetitions": 2,
    "tokens": 256,
    "batch_tokens": 64,
    "multiple_of": 1,
}
WIDE = {"kl": 100.0}  # random weights are anywhere; what an envelope does has tests of its own
PEAKS = ("peak_memory_bytes", "peak_gpu_memory_bytes")


def made_small(recipe: Path, folder: Path, model: Path) -> Path:
    """The same recipe with another model, another text and small numbers, in `folder`."""
    text = folder / "text.txt"
    text.write_text(TEXT)
    small = {**SMALL, "text": [str(text)], "calibration": [str(text)], "data": [str(text)]}
    content = yaml.safe_load(recipe.read_text(encoding="utf-8"))
    steps = [
        {verb: {key: small.get(key, value) for key, value in settings.items() if key != "engine"}}
        for step in content["steps"]
        for verb, settings in step.items()
        if verb != "export"  # an engine may be absent; test_real_model.py exports where it is there
    ]
    copy = folder / recipe.name
    envelope = {"envelope": WIDE} if "envelope" in content else {}
    copy.write_text(yaml.safe_dump({**content, **envelope, "model": str(model), "steps": steps}))
    return copy


@pytest.fixture(scope="module")
def ten_layers(tiny_llama_dir, tiny_tokenizer, tmp_path_factory):
    """The tiny Llama, deep enough for rounds of layers."""
    config = LlamaConfig.from_pretrained(tiny_llama_dir, num_hidden_layers=10)
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("ten_layers")
    LlamaForCausalLM(config).save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


def in_turn(verbs: Iterable[str]) -> list[str]:
    """The verbs, without those that repeat the one before."""
    return [verb for verb, _ in groupby(verbs)]


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_shipped_recipe(path, ten_layers, tmp_path, monkeypatch):
    # the only part that starts processes, which cost seconds each; test_benchmark.py covers it
    monkeypatch.setattr(measurement, "peak_memory", lambda _directory, _work: dict.fromkeys(PEAKS, 1))
    verbs = [step.verb for step in load_recipe(path).steps if step.verb != "export"]
    recipe = made_small(path, tmp_path, ten_layers)
    run = prunus.run(recipe, tmp_path / "out")
    assert not run.reused
    assert [step["step"] for step in run.steps] == verbs
    made = [step["step"] for step in run.record["history"]]  # a shrink of layers and widths stands there as two
    assert in_turn(made) == in_turn(verb for verb in verbs if verb in MAKES_A_MODEL)
    last_model = max(n for n, verb in enumerate(verbs) if verb in MAKES_A_MODEL)
    assert len(run.record["benchmarks"]) == verbs.count("bench")
    assert bool(run.record["evaluations"]) == ("evaluate" in verbs[last_model:])
    assert (run.path / "report.html").exists() == ("report" in verbs)
    again = prunus.run(recipe, tmp_path / "out")
    assert again.reused
    assert again.record == run.record


def test_iterative_recipe_ends_at_its_last_sparsity(tiny_llama_dir, tmp_path):
    recipe = next(path for path in RECIPES if path.stem == "iterative")
    run = prunus.run(made_small(recipe, tmp_path, tiny_llama_dir), tmp_path / "out")
    assert [step["sparsity"]["pruned_matrices"] for step in run.record["history"]] == pytest.approx(
        [0.3, 0.5], abs=1e-3
    )
    assert (tmp_path / "out.steps" / "1-sparsify" / "prunus.json").exists()


def test_two_equal_steps_write_two_directories(tiny_llama_dir, tmp_path):
    step = '{sparsify: {method: magnitude, pattern: "0.5"}}'
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"version: 1\nmodel: {tiny_llama_dir}\nsteps: [{', '.join([step] * 3)}]\n")
    assert len(prunus.run(recipe, tmp_path / "out").record["history"]) == 3


# --- the envelope ---


def gradual(tiny_llama_dir, tmp_path, envelope):
    """Three rounds, each worse than the one before."""
    (tmp_path / "text.txt").write_text(TEXT)
    evaluate = {"evaluate": {"text": [str(tmp_path / "text.txt")], "length": 32, "windows": 4, "against": "dense"}}
    rounds = [({"sparsify": {"method": "magnitude", "pattern": p}}, evaluate) for p in ("0.05", "0.5", "0.9")]
    steps = [step for both in rounds for step in both]
    content = {"version": 1, "model": str(tiny_llama_dir), "envelope": envelope, "steps": [*steps, {"report": {}}]}
    return parse_recipe(content)


def kls(run):
    return [step["results"][0]["against"]["kl"] for step in run.steps if step["step"] == "evaluate"]


def test_a_recipe_stops_outside_its_envelope_and_keeps_the_last_model_within(tiny_llama_dir, tmp_path):
    whole = prunus.run(gradual(tiny_llama_dir, tmp_path, {"kl": 1e9}), tmp_path / "whole")
    assert whole.stopped is None
    assert len(whole.record["history"]) == 3
    first, second, _ = kls(whole)
    recipe = gradual(tiny_llama_dir, tmp_path, {"kl": (first + second) / 2})
    run = prunus.run(recipe, tmp_path / "out")
    assert f"KL {second:.4g}" in run.stopped
    assert len(kls(run)) == 2
    assert [step["settings"]["pattern"] for step in run.record["history"]] == ["0.05"]
    assert run.record["history"][-1]["sparsity"]["pruned_matrices"] == pytest.approx(0.05, abs=1e-3)
    assert (tmp_path / "out" / "report.html").exists()
    again = prunus.run(recipe, tmp_path / "out")
    assert again.reused
    assert again.stopped == run.stopped


def test_perplexity_may_be_limited_by_a_multiple_of_the_dense_model_s(tiny_llama_dir, tmp_path):
    run = prunus.run(gradual(tiny_llama_dir, tmp_path, {"perplexity": "1000x"}), tmp_path / "out")
    assert run.stopped is None
    with pytest.raises(UserError, match="the first round left the envelope: perplexity"):
        prunus.run(gradual(tiny_llama_dir, tmp_path, {"perplexity": 1.0}), tmp_path / "other")
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("envelope", [{}, {"loss": 1}, {"kl": 0}, {"kl": "much"}, {"perplexity": "x"}, 3, {"kl": True}])
def test_an_envelope_that_says_nothing_is_refused(tiny_llama_dir, tmp_path, envelope):
    with pytest.raises(UserError, match="envelope"):
        gradual(tiny_llama_dir, tmp_path, envelope)


def test_an_envelope_wants_an_evaluation(tiny_llama_dir):
    steps = [{"sparsify": {"pattern": "0.5"}}]
    with pytest.raises(UserError, match="no step that could leave it"):
        parse_recipe({"version": 1, "model": str(tiny_llama_dir), "envelope": {"kl": 1}, "steps": steps})
