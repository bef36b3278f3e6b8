"""A profile reads headers alone; sensitivity is measured as asked and recorded once."""

import hashlib
from pathlib import Path

import pytest
import torch

import prunus
from prunus.checkpoint import read_record
from prunus.errors import UserError
from prunus.steps import sensitivity

ASKED = {"sensitivity": True, "pattern": "2:4", "length": 32, "windows": 2, "dtype": "float32", "device": "cpu"}


@pytest.fixture
def asked(tmp_path):
    file = tmp_path / "text.txt"
    file.write_text("".join(f"The {n} brown foxes jump over {n * 7} lazy dogs. " for n in range(100)))
    return {**ASKED, "text": str(file)}


@pytest.fixture
def sparse(tiny_llama_dir, tmp_path) -> Path:
    return prunus.sparsify(tiny_llama_dir, tmp_path / "sparse", method="magnitude", device="cpu").path


def test_no_weight_is_read(tiny_llama_dir, monkeypatch):
    def never(*_: object) -> None:
        raise AssertionError("a weight file was read")

    monkeypatch.setattr(hashlib, "file_digest", never)
    monkeypatch.setattr(prunus.checkpoint.Checkpoint, "read", never)
    result = prunus.profile(tiny_llama_dir)
    assert result["bytes"] == 4 * result["parameters"]
    assert len(result["layers"]) == 2
    assert "sensitivity" not in result


def test_sensitivity_has_a_row_for_each_block(tiny_llama_dir, asked):
    rows = prunus.profile(tiny_llama_dir, **asked)["sensitivity"]
    assert [row["block"] for row in rows] == [0, 1]
    assert all(row["kl"] > 0 for row in rows)


def test_sensitivity_runs_in_the_dtype_and_on_the_device_asked_for(tiny_llama_dir, asked, monkeypatch):
    devices = []
    measure = sensitivity.sensitivity_of_windows

    def watch(model, *args, **settings):
        devices.append(model.device)
        return measure(model, *args, **settings)

    monkeypatch.setattr(sensitivity, "sensitivity_of_windows", watch)
    rows = prunus.profile(tiny_llama_dir, **{**asked, "dtype": "bfloat16"})["sensitivity"]
    assert {row["dtype"] for row in rows} == {"bfloat16"}
    assert devices == [torch.device("cpu")]


def test_the_same_measurement_again_replaces_the_first(sparse, asked):
    prunus.profile(sparse, **asked)
    rows = prunus.profile(sparse, **asked)["sensitivity"]
    assert read_record(sparse)["sensitivity"] == rows
    other = prunus.profile(sparse, **{**asked, "pattern": "0.3"})["sensitivity"]
    assert read_record(sparse)["sensitivity"] == [*rows, *other]


def test_sensitivity_of_the_dense_model_is_kept_in_a_run_made_from_it(tiny_llama_dir, sparse, asked):
    rows = prunus.profile(tiny_llama_dir, **asked, into=sparse)["sensitivity"]
    assert read_record(sparse)["sensitivity"] == rows
    assert {row["model"] for row in rows} == {str(tiny_llama_dir)}
    assert {row["sha256"] for row in rows} == {read_record(sparse)["history"][-1]["input"]["sha256"]}


def test_rows_about_two_models_stay_apart(tiny_llama_dir, sparse, asked):
    prunus.profile(tiny_llama_dir, **asked, into=sparse)
    prunus.profile(sparse, **asked)
    assert [row["model"] for row in read_record(sparse)["sensitivity"]] == [str(tiny_llama_dir)] * 2 + [str(sparse)] * 2


def test_a_run_made_from_another_model_is_refused(tiny_llama_dir, sparse, asked):
    with pytest.raises(UserError, match="was not made from"):
        prunus.profile(sparse, **asked, into=sparse)
    with pytest.raises(UserError, match=r"has no prunus\.json"):
        prunus.profile(tiny_llama_dir, **asked, into=tiny_llama_dir)
    with pytest.raises(UserError, match="add --sensitivity"):
        prunus.profile(tiny_llama_dir, into=sparse)


def test_rows_that_cannot_be_recorded_are_returned(sparse, asked, capsys):
    (sparse / "prunus.json.tmp").mkdir()  # in the way of writing, for root too
    assert len(prunus.profile(sparse, **asked)["sensitivity"]) == 2
    assert "not recorded" in capsys.readouterr().err
