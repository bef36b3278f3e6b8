"""Allocations are searched, compared with uniform sparsity on held-out windows, and only the better one stays."""

import multiprocessing
import os
import signal

import pytest

import prunus
from prunus.errors import UserError
from prunus.models import open_model
from prunus.settings import SparsifySettings
from prunus.steps import allocate, held_out
from prunus.steps.calibration_text import calibration_batch
from prunus.text import self_generated

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
    if facts["used"] == allocation:  # Wanda's rows lose equally many, so a part of a row's weights may be missing
        assert abs(zeros - round(0.6 * total)) <= (0 if allocation == "model" else 128 / 2)
    assert {path.name for path in tmp_path.iterdir()} == {"out", "text.txt"}
    assert prunus.sparsify(tiny_llama_dir, tmp_path / "out", **settings).reused


def test_one_threshold_over_the_model_prunes_matrices_differently(tiny_llama_dir, tmp_path, text, monkeypatch):
    monkeypatch.setattr(allocate, "held_out_kl", lambda _dense, directory, _batch, _budget: directory.name == "uniform")
    settings = {**SETTINGS, "method": "magnitude", "allocation": "model", "calibration": (text,)}
    run = prunus.sparsify(tiny_llama_dir, tmp_path / "out", **settings)
    assert run.last_step["allocation"]["used"] == "model"
    assert len({row["sparsity"] for row in run.last_step["matrices"]}) > 1


@pytest.mark.parametrize(
    ("method", "allocation", "pattern", "group"),
    [
        ("wanda", "owl", "0.6", "row"),  # Wanda's own, as in the paper
        ("wanda", "owl", "0.6@matrix", "matrix"),
        ("wanda", "model", "0.6", "matrix"),
        ("wanda", "model", "0.6@row", "row"),
        ("magnitude", "dlp", "0.6@row", "row"),
        ("magnitude", "dlp", "0.6", "matrix"),
    ],
)
def test_an_allocation_keeps_the_comparison_group(
    method, allocation, pattern, group, tiny_llama_dir, tmp_path, text, monkeypatch
):
    monkeypatch.setattr(allocate, "held_out_kl", lambda _dense, directory, _batch, _limit: directory.name == "uniform")
    settings = {**SETTINGS, "method": method, "allocation": allocation, "pattern": pattern, "calibration": (text,)}
    run = prunus.sparsify(tiny_llama_dir, tmp_path / "out", **settings)
    assert run.last_step["allocation"]["used"] == allocation
    patterns = [row["pattern"] for row in run.last_step["matrices"]]
    assert {one.rpartition("@")[2] for one in patterns} == {group}
    assert len(set(patterns)) > 1


@pytest.mark.parametrize("used", ["uniform", "sensitivity"])
def test_what_an_allocation_measured_is_in_the_record_and_the_report(used, tiny_llama_dir, tmp_path, text, monkeypatch):
    monkeypatch.setattr(allocate, "held_out_kl", lambda _dense, directory, _batch, _limit: directory.name != used)
    settings = {**SETTINGS, "allocation": "sensitivity", "calibration": (text,)}
    run = prunus.sparsify(tiny_llama_dir, tmp_path / "out", **settings)
    assert run.last_step["allocation"]["used"] == used
    rows = run.last_step["sensitivity"]
    assert [row["block"] for row in rows] == [0, 1]
    assert all(row["kl"] > 0 and row["model"] == str(tiny_llama_dir) and row["pattern"] == "0.5@row" for row in rows)
    page = prunus.report([run.path], tmp_path / "report.html").read_text()
    assert "when only this block of it is pruned (method wanda" in page


def test_an_allocation_needs_an_unstructured_pattern(tiny_llama_dir, tmp_path, text):
    with pytest.raises(UserError, match="unstructured"):
        prunus.sparsify(
            tiny_llama_dir, tmp_path / "out", **SETTINGS, allocation="owl", pattern="2:4", calibration=(text,)
        )


def killed_at(where, model, out, text):
    """In a process of its own: search an allocation, and die at one of two moments of its end."""

    def die(*_):
        os.kill(os.getpid(), signal.SIGKILL)

    record_choice = allocate._record_choice
    if where == "before the name":
        allocate._record_choice = lambda *choice: die(record_choice(*choice))
    else:
        allocate.sync_directory = die
    prunus.sparsify(model, out, **SETTINGS, allocation="dlp", pattern="0.6", calibration=(text,))


@pytest.mark.parametrize("where", ["before the name", "after the name"])
def test_a_search_killed_at_its_end_goes_on_and_leaves_nothing(where, tiny_llama_dir, tmp_path, text, monkeypatch):
    process = multiprocessing.get_context("forkserver").Process(
        target=killed_at, args=(where, tiny_llama_dir, tmp_path / "out", text)
    )
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert (tmp_path / "out").exists() == (where == "after the name")
    monkeypatch.setattr(allocate, "_search", None)  # nothing is left to search
    settings = {**SETTINGS, "allocation": "dlp", "pattern": "0.6", "calibration": (text,)}
    run = prunus.sparsify(tiny_llama_dir, tmp_path / "out", **settings)
    assert run.last_step["allocation"]["asked"] == "dlp"
    assert {path.name for path in tmp_path.iterdir()} == {"out", "text.txt"}


def test_a_directory_of_trials_that_holds_something_else_is_left_alone(tiny_llama_dir, tmp_path, text):
    mine = tmp_path / "out.allocation" / "notes.txt"
    mine.parent.mkdir()
    mine.write_text("mine")
    with pytest.raises(UserError, match=r"holds notes\.txt, no trial of this run"):
        prunus.sparsify(tiny_llama_dir, tmp_path / "out", allocation="owl", calibration=(text,), **SETTINGS)
    assert mine.read_text() == "mine"


def test_windows_that_judge_come_from_every_source_and_from_none_that_was_seen(tiny_llama_dir, tmp_path, text):
    other = tmp_path / "other.txt"
    other.write_text("0123456789 " * 2000)
    settings = SparsifySettings(calibration=(text, str(other)), samples=24, length=64)
    model = open_model(tiny_llama_dir)
    seen = {tuple(row.tolist()) for row in calibration_batch(model, settings).tokens_NT}
    judges = [tuple(row.tolist()) for row in held_out.held_out_windows(model, settings).tokens_NT]
    assert len(judges) == held_out.HELD_OUT
    assert not seen & set(judges)
    digits = set(model.tokenizer("0123456789 ")["input_ids"])
    assert {set(window) <= digits for window in judges} == {True, False}


def test_of_the_models_own_text_only_the_windows_that_judge_are_sampled_anew(tiny_llama_dir, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    sampled = []
    real = self_generated.sample_tokens
    monkeypatch.setattr(
        self_generated,
        "sample_tokens",
        lambda *a, samples, **k: sampled.append(samples) or real(*a, samples=samples, **k),
    )
    settings = SparsifySettings(samples=24, length=16)
    model = open_model(tiny_llama_dir)
    seen = calibration_batch(model, settings).tokens_NT
    judges = held_out.held_out_windows(model, settings).tokens_NT
    assert sampled == [24, held_out.HELD_OUT]
    assert len(judges) == held_out.HELD_OUT
    assert not {tuple(row.tolist()) for row in seen} & {tuple(row.tolist()) for row in judges}
    assert held_out.held_out_windows(model, settings).tokens_NT.equal(judges)
    assert len(sampled) == 2


def test_sensitivity_is_not_measured_on_the_windows_that_judge(tiny_llama_dir, tmp_path, text, monkeypatch):
    measured = []
    real = allocate.sensitivity_of_windows
    monkeypatch.setattr(
        allocate,
        "sensitivity_of_windows",
        lambda m, tokens, *a, **k: measured.append(tokens) or real(m, tokens, *a, **k),
    )
    settings = {**SETTINGS, "allocation": "sensitivity", "calibration": (text,)}
    prunus.sparsify(tiny_llama_dir, tmp_path / "out", **settings)
    judges = held_out.held_out_windows(open_model(tiny_llama_dir), SparsifySettings(**settings)).tokens_NT
    rows = {tuple(row.tolist()) for row in measured[0]}
    assert rows
    assert not rows & {tuple(row.tolist()) for row in judges}
