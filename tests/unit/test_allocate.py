"""Allocations are searched, compared with uniform sparsity on held-out windows, and only the better one stays."""

import pytest

import prunus
from prunus.errors import UserError

TEXT = "".join(f"The {number} brown foxes jump over {number * 7} lazy dogs and go home. " for number in range(600))
SETTINGS = {"method": "wanda", "samples": 8, "length": 64, "dtype": "float32", "device": "cpu"}


@pytest.fixture
def text(tmp_path):
    file = tmp_path / "text.txt"
    file.write_text(TEXT)
    return str(file)


@pytest.mark.parametrize("allocation", ["model", "owl", "dlp", "sensitivity"])
def test_the_better_of_allocation_and_uniform_stays(allocation, tiny_llama_dir, tmp_path, text):
    settings = {**SETTINGS, "allocation": allocation, "pattern": "0.6", "calibration": (text,)}
    run = prunus.sparsify(tiny_llama_dir, tmp_path / "out", **settings)
    facts = run.last_step["allocation"]
    assert facts["asked"] == allocation
    assert facts["used"] == min(facts["held_out_kl"], key=facts["held_out_kl"].get)
    total = sum(row["shape"][0] * row["shape"][1] for row in run.last_step["matrices"])
    zeros = sum(round(row["sparsity"] * row["shape"][0] * row["shape"][1]) for row in run.last_step["matrices"])
    if facts["used"] == allocation:
        assert zeros == round(0.6 * total)
    assert {path.name for path in tmp_path.iterdir()} == {"out", "text.txt"}
    assert prunus.sparsify(tiny_llama_dir, tmp_path / "out", **settings).reused


def test_one_threshold_over_the_model_prunes_matrices_differently(tiny_llama_dir, tmp_path, text, monkeypatch):
    from prunus.steps import allocate

    monkeypatch.setattr(
        allocate, "_held_out_kl", lambda _dense, directory, _batch, _budget: directory.name == "uniform"
    )
    settings = {**SETTINGS, "method": "magnitude", "allocation": "model", "calibration": (text,)}
    run = prunus.sparsify(tiny_llama_dir, tmp_path / "out", **settings)
    assert run.last_step["allocation"]["used"] == "model"
    assert len({row["sparsity"] for row in run.last_step["matrices"]}) > 1


def test_an_allocation_needs_an_unstructured_pattern(tiny_llama_dir, tmp_path, text):
    with pytest.raises(UserError, match="unstructured"):
        prunus.sparsify(
            tiny_llama_dir, tmp_path / "out", **SETTINGS, allocation="owl", pattern="2:4", calibration=(text,)
        )
