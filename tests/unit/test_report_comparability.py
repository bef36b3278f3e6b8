"""The report draws only like with like, and calls every number what it is."""

from pathlib import Path
from typing import Any

import pytest

from report_page import figures, page, words
from report_record import record


@pytest.mark.parametrize(
    "other", [{"dataset_sha256": "cd" * 32}, {"dtype": "bfloat16"}, {"window": 512}, {"windows": 8}]
)
def test_unlike_evaluations_are_drawn_apart(tmp_path: Path, other: dict[str, Any]):
    first, second = record(), record("wanda", 0.6, 60.0)
    first["evaluations"][0] |= {"dataset_sha256": "ab" * 32, "dtype": "float32"}
    second["evaluations"][0] |= {"dataset_sha256": "ab" * 32, "dtype": "float32"} | other
    assert perplexity_points(page(tmp_path, first, second)) == [[28.1], [60.0]]


def test_runs_of_two_models_are_drawn_apart(tmp_path: Path):
    other = record("wanda", 0.6, 60.0)
    other["history"][0]["input"] = {"path": "models/other", "sha256": "cd" * 32}
    assert perplexity_points(page(tmp_path, record(), other)) == [[28.1], [60.0]]


def perplexity_points(html: str) -> list[list[float]]:
    axes = [(f["data"], f["layout"].get("yaxis", {}).get("title", {}).get("text")) for f in figures(html)]
    return [[y for line in data for y in line["y"]] for data, axis in axes if axis == "perplexity"]


def test_a_later_evaluation_alone_does_not_hide_the_dense_model(tmp_path: Path):
    twice = record()
    alone = {name: value for name, value in twice["evaluations"][0].items() if name != "against"}
    twice["evaluations"].append(alone)
    assert "KL 0.310 nats per token" in words(page(tmp_path, twice))


def test_tasks_of_the_dense_model_stand_beside(tmp_path: Path):
    both = record()
    against = {"path": "models/dense", "metrics": {"acc,none": 0.75}}
    both["evaluations"].append({"kind": "lm-eval", "dataset": "arc", "metrics": {"acc,none": 0.25}, "against": against})
    assert "acc,none 0.75 0.25" in words(page(tmp_path, both))


def sensitivity_row(**conditions: Any) -> dict[str, Any]:
    row = {"name": "layers.0", "block": 0, "projection": "block", "kl": 0.1, "pattern": "0.5", "window": 32}
    return {**row, "model": "models/dense", "sha256": "ab" * 32, **conditions}


@pytest.mark.parametrize(
    "other",
    [
        {"pattern": "2:4"},
        {"window": 64},
        {"windows": 4},
        {"dtype": "bfloat16"},
        {"dataset": "news"},
        {"dataset_sha256": "cd" * 32},
        {"sha256": "cd" * 32, "model": "models/other"},
        {"projection": "mlp.up_proj"},
    ],
)
def test_unlike_sensitivities_are_drawn_apart(tmp_path: Path, other: dict[str, Any]):
    alike = sensitivity_row(name="layers.1", block=1, kl=0.2)
    html = page(tmp_path, {"format": 1, "sensitivity": [sensitivity_row(), alike, sensitivity_row(**other)]})
    assert [len(figure["data"][0]["x"]) for figure in figures(html)] == [2, 1]
    assert "KL divergence from models/dense" in words(html)
    assert f"KL divergence from {other.get('model', 'models/dense')}" in words(html)


def test_sensitivity_in_a_step_is_about_its_input(tmp_path: Path):
    allocated = record()
    row = {"name": "layers.0", "block": 0, "projection": "block", "kl": 0.1}
    del allocated["sensitivity"]
    allocated["history"][0]["sensitivity"] = [row]
    seen = words(page(tmp_path, allocated))
    assert "KL divergence from models/dense, nats per token, when only this block of it is pruned" in seen
    assert "dataset windows of the calibration text" in seen


@pytest.mark.parametrize(
    ("method", "error"),
    [
        ("admm", "each matrix's output on the calibration text."),
        ("wanda", "each matrix's output on the calibration text, estimated from input norms alone"),
        ("magnitude", "each matrix's weights; no text was looked at."),
        ("tomorrow", "does not know the method"),
    ],
)
def test_an_error_is_called_what_it_is(tmp_path: Path, method: str, error: str):
    assert error in words(page(tmp_path, record(method)))


def test_errors_of_two_kinds_are_drawn_apart(tmp_path: Path):
    twice = record("wanda")
    again = record("admm")["history"][0]
    twice["history"].append(again | {"matrices": again["matrices"][:2]})
    titles = [one["data"][0]["hovertemplate"] for one in figures(page(tmp_path, twice)) if "z" in one["data"][0]]
    assert sum("error" in title for title in titles) == 2


@pytest.mark.parametrize(("used", "fate"), [("uniform", "was rejected, so sparsity is uniform"), ("owl", "was kept")])
def test_the_fate_of_an_allocation_is_said(tmp_path: Path, used: str, fate: str):
    allocated = record()
    facts = {"asked": "owl", "used": used, "held_out_kl": {"uniform": 0.25, "owl": 0.5}, "held_out_windows": 8}
    allocated["history"][0]["allocation"] = facts
    seen = words(page(tmp_path, allocated))
    assert f"Allocation owl {fate}: KL to the dense model on 8 held-out windows is 0.5" in seen
    assert "with uniform sparsity 0.25." in seen
