"""Where no length is asked for, windows are as long as the model allows; what was asked for stays."""

import json

import pytest

import prunus as library
from prunus.checkpoint import read_record
from prunus.models import open_model
from prunus.settings import EvaluateSettings, SparsifySettings
from prunus.steps.length import fit_length

MODEL_MAXIMUM = 512  # of the tiny Llama
NOTE = "windows are 512 tokens long, the model's maximum, and not the usual"
FEW = ("--samples", 2, "--dtype", "float32", "--device", "cpu")


@pytest.mark.parametrize(
    "command",
    [
        ("sparsify", "--method", "wanda"),
        ("shrink", "--ffn", "0.5", "--score", "activation"),
        ("quantize", "--scheme", "int4-g32", "--method", "gptq"),
    ],
    ids=lambda command: command[0],
)
def test_calibration_windows_are_as_long_as_the_model_allows(command, prunus, model, text, tmp_path):
    asked = (*command[1:], "--calibration", text, *FEW)
    code, printed, said = prunus(command[0], model, tmp_path / "out", *asked, "--dry-run")
    assert code == 0, said
    assert said.count(NOTE) == 1
    code, printed, said = prunus(command[0], model, tmp_path / "out", *asked)
    assert code == 0, said
    assert NOTE in said
    assert read_record(tmp_path / "out")["history"][-1]["settings"]["length"] == MODEL_MAXIMUM
    _, printed, _ = prunus(command[0], model, tmp_path / "out", *asked, "--length", MODEL_MAXIMUM)
    assert json.loads(printed.splitlines()[-1])["reused"] is True  # it is the same step, said in full


def test_python_and_recipes_mean_the_same(model, text, tmp_path, capsys):
    settings = {"method": "wanda", "samples": 2, "dtype": "float32", "device": "cpu", "calibration": (str(text),)}
    library.sparsify(model, tmp_path / "out", **settings)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(json.dumps({"version": 1, "model": str(model), "steps": [{"sparsify": settings}]}))
    assert library.run(recipe, tmp_path / "out").reused
    assert NOTE in capsys.readouterr().err


def test_a_method_that_reads_no_text_is_told_nothing_of_its_length(model, tmp_path, capsys):
    run = library.sparsify(model, tmp_path / "out", method="magnitude", device="cpu")
    assert run.last_step["settings"]["length"] == 2048
    assert NOTE not in capsys.readouterr().err


def test_evaluation_windows_are_as_long_as_the_model_allows(prunus, model, text):
    asked = ("evaluate", model, "--text", text, "--windows", 1, "--dtype", "float32", "--device", "cpu")
    code, printed, said = prunus(*asked)
    assert code == 0, said
    assert NOTE in said
    assert json.loads(printed.splitlines()[-1])["results"][0]["window"] == MODEL_MAXIMUM


def test_training_windows_are_as_long_as_the_model_allows(model, text, tmp_path, capsys):
    library.sparsify(model, tmp_path / "sparse", method="magnitude", device="cpu")
    asked = {"data": (str(text),), "tokens": 1024, "batch_tokens": 1024, "held_out": 1, "device": "cpu"}
    run = library.recover(tmp_path / "sparse", tmp_path / "out", **asked)
    assert run.last_step["settings"]["length"] == MODEL_MAXIMUM
    assert NOTE in capsys.readouterr().err


def test_what_was_asked_for_stays_and_so_does_what_fits(tiny_llama_dir):
    config = open_model(tiny_llama_dir).config
    for asked in (SparsifySettings(length=2048), SparsifySettings(length=16), EvaluateSettings(length=4096)):
        assert fit_length(asked, config) is asked
    config.max_position_embeddings = 2048
    assert fit_length(SparsifySettings(), config).length == 2048
