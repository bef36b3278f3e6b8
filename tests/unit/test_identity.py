"""What decides a result: settings as resolved and the texts they name, so that an edited text is another step."""

import pytest

import prunus
from prunus.errors import UserError
from prunus.settings import EvaluateSettings, SparsifySettings
from prunus.sparsity import AdmmOptions
from prunus.steps.done import key_of
from prunus.steps.identity import identity

SETTINGS = {"method": "wanda", "samples": 2, "length": 32, "dtype": "float32", "device": "cpu"}


@pytest.fixture
def text(tmp_path):
    file = tmp_path / "calibration.txt"
    file.write_text("the cat sat on the mat, and the dog sat on the cat. " * 20)
    return file


def test_an_edited_text_is_not_what_was_done_before(tiny_llama_dir, text, tmp_path):
    prunus.sparsify(tiny_llama_dir, tmp_path / "out", calibration=(str(text),), **SETTINGS)
    text.write_text(text.read_text().replace("cat", "cow"))
    with pytest.raises(UserError, match="is not the result of these settings"):
        prunus.sparsify(tiny_llama_dir, tmp_path / "out", calibration=(str(text),), **SETTINGS)


def test_an_edited_text_is_measured_again(text):
    before = key_of(EvaluateSettings(text=(str(text),)))
    assert key_of(EvaluateSettings(text=(str(text),))) == before
    text.write_text("another text")
    assert key_of(EvaluateSettings(text=(str(text),))) != before


def test_weights_of_a_text_are_part_of_it_and_its_file_is_found(text):
    one, two = (identity(SparsifySettings(calibration=(f"{text}={weight}",))) for weight in (1, 2))
    assert one["calibration"] != two["calibration"]
    assert list(one["files"]) == [str(text)]


def test_defaults_of_a_method_are_written_out(tiny_llama_dir, text, tmp_path):
    settings = SparsifySettings(method="admm", options={"iterations": 5})
    assert identity(settings)["options"] == {
        "stages": 4,
        "iterations": 5,
        "penalty": AdmmOptions().penalty,
        "damping": 0.1,
        "polish": 2,
    }
    run = prunus.sparsify(tiny_llama_dir, tmp_path / "out", calibration=(str(text),), **{**SETTINGS, "method": "admm"})
    assert run.last_step["options"]["penalty"] == AdmmOptions().penalty
