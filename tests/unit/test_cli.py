"""The command line: every verb teaches by an example, ends its stdout with one JSON object, and tells how it went."""

import importlib
import inspect
import json

import pytest
import typer

from prunus import __version__, cli
from prunus.benchmark import measurement
from prunus.checkpoint import OutputDirectory, read_record
from prunus.errors import UserError
from prunus.settings import BenchSettings, EvaluateSettings, SparsifySettings

VERBS = sorted(typer.main.get_command(cli.app).commands)
TEXT = "".join(f"The {n} brown foxes jump over {n * 7} lazy dogs and go home. " for n in range(300))
SMALL = ("--samples", 4, "--length", 32, "--dtype", "float32", "--device", "cpu")


@pytest.fixture
def result_of(prunus):
    """Run one command that must succeed; returns the JSON object on the last line of stdout."""

    def run(*arguments: object) -> dict:
        code, out, err = prunus(*arguments)
        assert code == 0, err
        result = json.loads(out.splitlines()[-1])
        assert isinstance(result, dict)
        return result

    return run


@pytest.fixture
def text(tmp_path):
    file = tmp_path / "text.txt"
    file.write_text(TEXT)
    return file


@pytest.fixture
def sparse(tiny_llama_dir, tmp_path, result_of):
    """A directory that `prunus sparsify` made."""
    result_of("sparsify", tiny_llama_dir, tmp_path / "sparse", "--method", "magnitude", "--pattern", "2:4")
    return tmp_path / "sparse"


@pytest.fixture
def quick_bench(monkeypatch):
    """Without the processes that measure peak memory: they cost seconds, and test_benchmark.py covers them."""
    peaks = {"peak_memory_bytes": 1, "peak_gpu_memory_bytes": None}
    monkeypatch.setattr(measurement, "peak_memory", lambda _directory, _work: peaks)


# --- help and exit codes ---


@pytest.mark.parametrize("verb", VERBS)
def test_help_teaches_by_an_example(prunus, verb):
    code, out, _ = prunus(verb, "--help")
    assert code == 0
    assert f"Example: prunus {verb}" in " ".join(out.split())


def test_without_a_verb_there_is_help(prunus):
    _, out, err = prunus()
    assert all(verb in out + err for verb in VERBS)


def test_exit_code_2_for_a_mistake(prunus, tmp_path):
    assert prunus("sparsify")[0] == 2
    assert prunus("grow")[0] == 2
    code, out, err = prunus("evaluate", tmp_path / "nothing", "--text", "builtin")
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert err.count("\n") == 1


@pytest.mark.parametrize("verb", VERBS)
def test_every_option_has_its_help(verb):
    command = typer.main.get_command(cli.app).commands[verb]
    assert [option.name for option in command.params if not option.help] == []


def test_a_bug_shows_where_it_is(prunus, monkeypatch):
    replace_step(monkeypatch, "bench", ZeroDivisionError("bug"))
    code, _, err = prunus("bench", "model")
    assert code == 1
    assert "Traceback" in err


def replace_step(monkeypatch, verb, error):
    """The verb does its own work up to the call of its step, which raises; returns what the step was called with."""
    called = {}

    def fail(*_: object, **settings: object) -> None:
        called.update(settings)
        raise error

    monkeypatch.setattr(importlib.import_module(f"prunus.steps.{verb}"), verb, fail)
    return called


def test_interrupted_the_same_command_goes_on(prunus, result_of, tiny_llama_dir, tmp_path, monkeypatch):
    save = OutputDirectory.save_progress

    def save_then_interrupt(self, state):
        save(self, state)
        raise KeyboardInterrupt

    command = ("sparsify", tiny_llama_dir, tmp_path / "out", "--method", "magnitude")
    monkeypatch.setattr(OutputDirectory, "save_progress", save_then_interrupt)
    code, out, err = prunus(*command)
    assert (code, out) == (130, "")
    assert err.splitlines()[-1] == "interrupted; the same command goes on from here."
    monkeypatch.setattr(OutputDirectory, "save_progress", save)
    assert result_of(*command)["sparsity"]["pruned_matrices"] == 0.5


def test_interrupted_where_nothing_goes_on(prunus, monkeypatch):
    replace_step(monkeypatch, "bench", KeyboardInterrupt())
    code, _, err = prunus("bench", "model")
    assert (code, err) == (130, "interrupted.\n")


@pytest.mark.parametrize(
    ("verb", "settings"),
    [("sparsify", SparsifySettings), ("evaluate", EvaluateSettings), ("bench", BenchSettings)],
)
def test_defaults_are_those_of_the_settings(prunus, monkeypatch, verb, settings):
    called = replace_step(monkeypatch, verb, UserError("far enough"))
    prunus(verb, "model", *["out"] * (verb == "sparsify"))
    assert "length" not in called  # whose default is the model's to say
    typed = {name: called[name] for name in settings.model_fields if name != "length"}  # every setting can be typed
    assert settings.check(**typed) == settings()
    assert not called["trust_remote_code"]
    assert called.get("max_memory") is None


def test_defaults_of_profile_are_those_of_the_function(prunus, monkeypatch):
    step = importlib.import_module("prunus.steps.profile").profile
    called = replace_step(monkeypatch, "profile", UserError("far enough"))
    prunus("profile", "model")
    parameters = inspect.signature(step).parameters.values()
    assert called == {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}


# --- sparsify ---


def test_sparsify_and_again(result_of, tiny_llama_dir, tmp_path, text):
    command = ("sparsify", tiny_llama_dir, tmp_path / "out", "--calibration", text, "--pattern", "0.5", *SMALL)
    first, second = result_of(*command), result_of(*command)
    assert first["step"] == "sparsify"
    assert first["out"] == str(tmp_path / "out")
    assert first["sparsity"]["pruned_matrices"] == pytest.approx(0.5, abs=1e-3)
    assert (first["reused"], second["reused"]) == (False, True)
    step = read_record(tmp_path / "out")["history"][-1]
    assert step["settings"]["method"] == "admm"
    assert sum(part["windows"] for part in step["calibration"]) == 4


def test_overrides_and_protect(result_of, tiny_llama_dir, tmp_path):
    wishes = ("--override", "*.down_proj=0.25", "--override", "*.0.mlp.up_proj=dense", "--protect", "*.o_proj")
    result_of("sparsify", tiny_llama_dir, tmp_path / "out", "--method", "magnitude", "--pattern", "2:4", *wishes)
    rows = {row["name"]: row for row in read_record(tmp_path / "out")["history"][-1]["matrices"]}
    assert {row["pattern"] for name, row in rows.items() if "down_proj" in name} == {"0.25@matrix"}
    assert {row["pattern"] for name, row in rows.items() if "down_proj" not in name} == {"2:4"}
    assert not any("o_proj" in name for name in rows)
    assert "model.layers.0.mlp.up_proj" not in rows
    assert "model.layers.1.mlp.up_proj" in rows


def test_method_options_are_numbers(prunus, result_of, tiny_llama_dir, tmp_path, text):
    command = ("sparsify", tiny_llama_dir, tmp_path / "out", "--calibration", text, *SMALL)
    for wrong in ("stages=many", "stages=1.5", "stages=0", "damping=nan", "damping=true", "speed=1"):
        code, _, err = prunus(*command, "--option", wrong)
        assert (code, "Traceback" in err) == (2, False), wrong
    result_of(*command, "--option", "stages=1", "--option", "damping=0.01", "--no-polish")
    settings = read_record(tmp_path / "out")["history"][-1]["settings"]
    assert settings["options"] == {"stages": 1, "damping": 0.01, "polish": 0}


def test_a_rejected_allocation_is_said(prunus, tiny_llama_dir, tmp_path, text, monkeypatch):
    held_out = importlib.import_module("prunus.steps.held_out")
    monkeypatch.setattr(held_out, "mean_kl", lambda *_: 1.0)  # no better than uniform
    command = ("sparsify", tiny_llama_dir, tmp_path / "out", "--method", "magnitude", "--allocation", "model")
    code, out, err = prunus(*command, "--calibration", text, *SMALL)
    assert code == 0, err
    assert "Allocation model was rejected, so sparsity is uniform" in " ".join(err.split())
    result = json.loads(out.splitlines()[-1])
    assert (result["allocation"]["asked"], result["allocation"]["used"]) == ("model", "uniform")


# --- the other verbs ---


def test_evaluate(result_of, sparse, tiny_llama_dir, tmp_path, text):
    choices = tmp_path / "choices.jsonl"
    choices.write_text('{"ctx": "The fox", "endings": ["jumps over", "is a dog"], "label": 0}\n' * 3)
    asked = ("--text", text, "--length", 32, "--windows", 2, "--choices", choices, "--prompt", "The fox")
    result = result_of("evaluate", sparse, "--against", tiny_llama_dir, *asked)
    kinds = {entry["kind"]: entry for entry in result["results"]}
    assert set(kinds) == {"perplexity", "choices", "continuations"}
    assert kinds["perplexity"]["against"]["kl"] > 0
    assert kinds["choices"]["tasks"] == 3
    assert [item["prompt"] for item in kinds["continuations"]["items"]] == ["The fox"]
    recorded = read_record(sparse)["evaluations"]
    assert [{k: v for k, v in entry.items() if k != "settings_key"} for entry in recorded] == result["results"]


def test_prompts_need_the_dense_model_and_that_is_known_first(prunus, tiny_llama_dir):
    code, _, err = prunus("evaluate", tiny_llama_dir, "--text", "/no/such/text", "--prompt", "The fox")
    assert code == 2
    assert "--against" in err


def test_bench(result_of, quick_bench, sparse, tiny_llama_dir):
    asked = ("--prompt-tokens", 8, "--new-tokens", 3, "--repetitions", 2, "--threads", 1)
    result = result_of("bench", sparse, "--against", tiny_llama_dir, *asked)
    assert result["step"] == "bench"
    assert result["engine"].startswith("transformers")
    assert result["verdict"]
    assert len(read_record(sparse)["benchmarks"]) == 1


def test_bench_without_the_dense_model_shows_figures(prunus, quick_bench, tiny_llama_dir):
    _, _, err = prunus("bench", tiny_llama_dir, "--prompt-tokens", 8, "--new-tokens", 3, "--repetitions", 1)
    assert "decode, tokens/s" in err
    assert "--against" in err
    assert "None" not in err


def test_bench_help_tells_the_truth_about_dtype(prunus):
    _, out, _ = prunus("bench", "--help")
    assert "the checkpoint's own" in " ".join(out.split())
    assert "measured)" not in out


def test_report(result_of, sparse, tmp_path):
    assert result_of("report", sparse)["output"] == str(sparse / "report.html")
    assert result_of("report", sparse, "-o", tmp_path / "page.html")["output"] == str(tmp_path / "page.html")
    assert (tmp_path / "page.html").read_text().startswith("<!doctype html>")


@pytest.fixture
def recipe(tiny_llama_dir, tmp_path, text):
    file = tmp_path / "recipe.yaml"
    file.write_text(
        f"version: 1\nmodel: {tiny_llama_dir}\nsteps:\n"
        f'  - sparsify: {{method: wanda, pattern: "2:4", calibration: [{text}], samples: 4, length: 32}}\n'
        f"  - evaluate: {{text: [{text}], length: 32, windows: 2, against: dense}}\n"
        "  - bench: {against: dense, prompt_tokens: 8, new_tokens: 3, repetitions: 2}\n  - report\n"
    )
    return file


def test_run_and_again(result_of, quick_bench, recipe, tmp_path):
    first, second = (result_of("run", recipe, tmp_path / "out") for _ in range(2))
    assert first["step"] == "run"
    assert (first["reused"], second["reused"]) == (False, True)
    assert len(read_record(tmp_path / "out")["evaluations"]) == 1
    assert [step["step"] for step in first["steps"]] == ["sparsify", "evaluate", "bench", "report"]
    _, evaluated, benched, reported = first["steps"]
    assert evaluated["results"][0]["against"]["kl"] > 0
    assert benched["verdict"]
    assert reported["output"] == str(tmp_path / "out" / "report.html")
    assert second["steps"][1:] == first["steps"][1:]


def test_run_shows_its_evidence(prunus, quick_bench, recipe, tmp_path):
    _, _, err = prunus("run", recipe, tmp_path / "out")
    for shown in ("2:4", "perplexity", "decode, tokens/s", "No verdict: 2 repetitions", "report.html"):
        assert shown in err, shown


def test_methods_models_and_version(result_of):
    assert {"magnitude", "wanda", "ria", "sparsegpt", "admm"} <= {m["method"] for m in result_of("methods")["methods"]}
    models = result_of("models")
    assert {"llama", "gpt2", "mixtral"} <= {m["family"] for m in models["models"]}
    assert any("logits" in sentence for sentence in models["tested"])
    assert result_of("version") == {"prunus": __version__}
