"""The command line: every verb teaches by an example, ends its stdout with one JSON object, and tells how it went."""

import json

import pytest
import typer

from prunus import __version__, cli
from prunus.benchmark import measurement
from prunus.checkpoint import read_record

VERBS = sorted(typer.main.get_command(cli.app).commands)
TEXT = "".join(f"The {n} brown foxes jump over {n * 7} lazy dogs and go home. " for n in range(300))
SMALL = ("--samples", 4, "--length", 32, "--dtype", "float32", "--device", "cpu")


@pytest.fixture
def prunus(capsys, monkeypatch):
    """Run one command; returns (exit code, stdout, stderr)."""

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["prunus", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        captured = capsys.readouterr()
        return int(stop.value.code or 0), captured.out, captured.err

    return run


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


@pytest.mark.parametrize(
    ("error", "code", "said"), [(KeyboardInterrupt(), 130, "interrupted"), (ZeroDivisionError("bug"), 1, "Traceback")]
)
def test_other_exit_codes(prunus, monkeypatch, error, code, said):
    def fail(**_: object) -> None:
        raise error

    monkeypatch.setattr(cli, "app", fail)
    found = prunus("version")
    assert found[0] == code
    assert said in found[2]


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


def test_dry_run_touches_nothing(result_of, tiny_llama_dir, tmp_path, text):
    before = sorted(tmp_path.rglob("*"))
    result = result_of("sparsify", tiny_llama_dir, tmp_path / "out", "--calibration", text, "--dry-run", *SMALL)
    assert result["dry_run"] is True
    assert result["zeros"] == result["weights"] // 2
    assert sorted(tmp_path.rglob("*")) == before


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


def test_profile(result_of, tiny_llama_dir):
    result = result_of("profile", tiny_llama_dir)
    assert result["step"] == "profile"
    assert result["bytes"] == 4 * result["parameters"]
    assert len(result["layers"]) == 2
    assert "sensitivity" not in result


def test_profile_with_sensitivity(result_of, tiny_llama_dir, text):
    asked = ("--sensitivity", "--pattern", "2:4", "--text", text, "--length", 32, "--windows", 2)
    rows = result_of("profile", tiny_llama_dir, *asked)["sensitivity"]
    assert [row["block"] for row in rows] == [0, 1]
    assert all(row["kl"] > 0 for row in rows)


def test_report(result_of, sparse, tmp_path):
    assert result_of("report", sparse)["output"] == str(sparse / "report.html")
    assert result_of("report", sparse, "-o", tmp_path / "page.html")["output"] == str(tmp_path / "page.html")
    assert (tmp_path / "page.html").read_text().startswith("<!doctype html>")


def test_run_and_again(result_of, tiny_llama_dir, tmp_path, text):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"version: 1\nmodel: {tiny_llama_dir}\nsteps:\n"
        f'  - sparsify: {{method: wanda, pattern: "2:4", calibration: [{text}], samples: 4, length: 32}}\n'
        f"  - evaluate: {{text: [{text}], length: 32, windows: 2, against: dense}}\n"
    )
    first, second = (result_of("run", recipe, tmp_path / "out") for _ in range(2))
    assert first["step"] == "run"
    assert (first["reused"], second["reused"]) == (False, True)
    assert len(read_record(tmp_path / "out")["evaluations"]) == 1


def test_methods_models_and_version(result_of):
    assert {"magnitude", "wanda", "ria", "sparsegpt", "admm"} <= {m["method"] for m in result_of("methods")["methods"]}
    assert {"llama", "gpt2", "mixtral"} <= {m["family"] for m in result_of("models")["models"]}
    assert result_of("version") == {"prunus": __version__}
