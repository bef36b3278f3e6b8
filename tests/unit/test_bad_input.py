"""Each mistake ends in one sentence on stderr, exit code 2, no traceback, and nothing that looks finished."""

import json

import pytest
import torch

from prunus import cli


def sparsify(model, tmp_path, *extra):
    return ("sparsify", model, tmp_path / "out", "--method", "magnitude", *extra)


def calibrated(model, tmp_path, text, *extra):
    return ("sparsify", model, tmp_path / "out", "--method", "wanda", "--calibration", text, "--samples", 4, *extra)


@pytest.mark.parametrize("sparsity", ["1.0", "1.5", "-0.1", "nan", "half"])
def test_sparsity_out_of_range(refused, tmp_path, model, sparsity):
    refused(*sparsify(model, tmp_path, f"--pattern={sparsity}"))


def test_n_of_m_that_does_not_divide(refused, tmp_path, model):
    assert "self_attn.q_proj" in refused(*sparsify(model, tmp_path, "--pattern", "2:5"))


def test_tile_larger_than_the_matrix(refused, tmp_path, model):
    assert "tile is larger" in refused(*sparsify(model, tmp_path, "--pattern", "512x16:0.5"))


def test_unknown_method(refused, tmp_path, model):
    sentence = refused("sparsify", model, tmp_path / "out", "--method", "magic")
    assert "unknown method 'magic'" in sentence
    assert "wanda" in sentence


def test_unknown_option_of_a_method(refused, tmp_path, model):
    assert "unknown option 'speed'" in refused(*sparsify(model, tmp_path, "--option", "speed=9"))


@pytest.mark.parametrize("method", ["magnitude", "wanda"])
def test_no_polish_with_a_method_that_never_polishes(refused, tmp_path, model, method):
    sentence = refused("sparsify", model, tmp_path / "out", "--method", method, "--no-polish")
    assert f"method {method!r} never polishes" in sentence
    assert "--method admm" in sentence


def test_no_polish_beside_a_number_of_polish_steps(refused, tmp_path, model):
    command = ("sparsify", model, tmp_path / "out", "--option", "polish=3", "--no-polish")
    assert "contradict" in refused(*command)


def test_glob_that_matches_nothing(refused, tmp_path, model):
    sentence = refused(*sparsify(model, tmp_path, "--protect", "*.no_proj"))
    assert "'*.no_proj' matches no matrix" in sentence
    assert "q_proj" in sentence


def test_override_without_a_pattern(refused, tmp_path, model):
    assert "has no '='" in refused(*sparsify(model, tmp_path, "--override", "*.q_proj"))


def test_everything_protected(refused, tmp_path, model):
    assert "nothing to sparsify" in refused(*sparsify(model, tmp_path, "--protect", "*"))


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "empty"),
        (b"too short", "tokens"),
        (b"\x00\x01\x02\xff" * 500, "text"),
        ("Grüße aus Köln. ".encode("latin-1") * 400, "UTF-8"),
    ],
)
def test_unusable_calibration_text(refused, tmp_path, model, content, expected):
    file = tmp_path / "bad.txt"
    file.write_bytes(content)
    assert expected in refused(*calibrated(model, tmp_path, file, "--length", 64))


def test_calibration_file_that_is_not_there(refused, tmp_path, model):
    assert "/no/text.txt" in refused(*calibrated(model, tmp_path, "/no/text.txt", "--length", 64))


def test_length_over_the_models_maximum(refused, tmp_path, model, text):
    assert "512" in refused(*calibrated(model, tmp_path, text, "--length", 4096))


def test_out_exists_and_is_something_else(refused, tmp_path, model):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious.txt").write_text("mine")
    assert "exists and is not the result" in refused(*sparsify(model, tmp_path), out=None)
    assert (tmp_path / "out" / "precious.txt").read_text() == "mine"


def test_out_inside_model(refused, model):
    assert "lies inside MODEL" in refused("sparsify", model, model / "out", "--method", "magnitude", out=model / "out")


def test_model_inside_out(refused, tmp_path, model):
    assert "lies inside OUT" in refused("sparsify", model, tmp_path, "--method", "magnitude", out=None)


def test_out_below_a_file(refused, tmp_path, model, text):
    sentence = refused("sparsify", model, text / "out", "--method", "magnitude", out=None)
    assert "cannot write" in sentence


def test_memory_that_cannot_be_read(refused, tmp_path, model, text):
    assert "memory 'lots'" in refused(*calibrated(model, tmp_path, text, "--length", 64, "--max-memory", "lots"))


def test_memory_that_is_too_small(refused, tmp_path, model, text):
    assert "too small" in refused(*calibrated(model, tmp_path, text, "--length", 64, "--max-memory", "1MiB"))


@pytest.mark.parametrize("device", ["cuda", "warp"])
def test_device_that_is_not_there(refused, tmp_path, model, device):
    if device == "cuda" and torch.cuda.is_available():
        pytest.skip("this machine has a CUDA device")
    assert f"device '{device}'" in refused(*sparsify(model, tmp_path, "--device", device))


@pytest.mark.parametrize("verb", [("bench",), ("evaluate", "--text", "builtin"), ("profile", "--sensitivity")])
def test_device_that_is_not_there_for_other_verbs(refused, model, verb):
    assert "device 'warp' is unknown" in refused(verb[0], model, *verb[1:], "--device", "warp")


@pytest.mark.parametrize(
    ("wish", "expected"),
    [
        (("--length", 1024), "over the model's maximum of 512"),
        (("--length", 1), "length=1"),
        (("--windows", 0), "windows=0"),
        (("--by", "head"), "by='head'"),
        (("--dtype", "int8"), "dtype 'int8'"),
    ],
)
def test_sensitivity_that_cannot_be_measured(refused, model, text, wish, expected):
    assert expected in refused("profile", model, "--sensitivity", "--text", text, *wish)


def test_nothing_to_evaluate(refused, model):
    assert "nothing to evaluate" in refused("evaluate", model)


def test_report_on_a_foreign_directory(refused, model):
    assert "has no prunus.json" in refused("report", model)


def test_missing_recipe(refused, tmp_path):
    assert "cannot read recipe" in refused("run", tmp_path / "no.yaml", tmp_path / "out")


def test_unquoted_pattern_in_a_recipe(refused, tmp_path, model):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"version: 1\nmodel: {model}\nsteps:\n  - sparsify: {{method: magnitude, pattern: 2:4}}\n")
    sentence = refused("run", recipe, tmp_path / "out")
    assert "124" in sentence
    assert "quote" in sentence


@pytest.mark.parametrize(
    ("steps", "expected"),
    [
        ("[]", "not a list of steps"),
        ("[{sparsify: {sparsity: 0.5}}]", "unknown setting 'sparsity'"),
        ("[{melt: {}}]", "'melt'"),
        ("[{evaluate: {text: [builtin]}}]", "makes no model"),
        ("[{sparsify: {samples: 0}}]", "samples=0"),
        ('[{sparsify: {method: magnitude, pattern: "2:5"}}]', "2:5"),
        ("[{sparsify: {protect: ['*.no']}}]", "matches no matrix"),
        ('[{sparsify: {allocation: owl, pattern: "2:4"}}]', "allocation 'owl' decides"),
    ],
)
def test_bad_recipes(refused, tmp_path, model, steps, expected):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"version: 1\nmodel: {model}\nsteps: {steps}\n")
    assert expected in refused("run", recipe, tmp_path / "out")


def test_a_gram_that_is_not_positive_definite_is_damped_and_recorded(tmp_path, model, text, capsys, monkeypatch):
    """Fewer tokens than inputs: the Gram is singular, the run goes through and says what damping it took."""
    arguments = ["prunus", "sparsify", model, tmp_path / "out", "--calibration", text, "--samples", 1, "--length", 8]
    monkeypatch.setattr("sys.argv", [*map(str, arguments), "--dtype", "float32", "--method", "sparsegpt"])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 0
    last_line = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert last_line["step"] == "sparsify"
    record = json.loads((tmp_path / "out" / "prunus.json").read_text())
    assert all(row["notes"]["damping"] > 0 for row in record["history"][-1]["matrices"])
