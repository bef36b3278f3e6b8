"""Nothing is measured in vain: what cannot be measured is known first, and what was measured is never lost."""

import json
import sys
from types import SimpleNamespace

import pytest
from safetensors.torch import load_file, save_file

import prunus
from prunus.benchmark import measurement
from prunus.calibration import StreamedSource
from prunus.checkpoint import read_record
from prunus.errors import UserError

FORWARD = {"dtype": "float32", "device": "cpu"}
WINDOWS = {"length": 32, "windows": 4}


@pytest.fixture
def sparse(model, tmp_path):
    return prunus.sparsify(model, tmp_path / "sparse", method="magnitude", device="cpu").path


@pytest.fixture
def choices(tmp_path):
    """A file of two questions; returns its path. The second, on line 3, holds that many characters and two more."""

    def write(characters: int) -> str:
        rows = ({"ctx": context, "endings": ["b", "c"], "label": 0} for context in ("a", "a" * characters))
        file = tmp_path / "choices.jsonl"
        file.write_text("\n\n".join(map(json.dumps, rows)))
        return str(file)

    return write


@pytest.fixture
def never_measured(monkeypatch):
    """Any forward pass fails the test."""
    monkeypatch.setattr(StreamedSource, "final_hidden", None)


def test_a_question_over_the_models_maximum_is_known_first(refused, model, text, choices, never_measured):
    asked = ("--text", text, "--length", 32, "--choices", choices(511), "--dtype", "float32")
    sentence = refused("evaluate", model, *asked)
    assert "The task on line 3 takes 513 tokens, over the model's maximum of 512" in sentence


def test_a_question_as_long_as_the_models_maximum_is_answered(model, choices):
    (result,) = prunus.evaluate(model, choices=choices(510), **FORWARD)
    assert result["tasks"] == 2


def test_missing_choices_are_known_first(refused, model, text, never_measured):
    asked = ("--text", text, "--length", 32, "--choices", "/no/choices.jsonl", "--dtype", "float32")
    assert "/no/choices.jsonl" in refused("evaluate", model, *asked)


def test_a_second_text_that_is_missing_is_known_first(refused, model, text, never_measured):
    asked = ("--text", text, "--text", "/no/text.txt", "--length", 32, "--dtype", "float32")
    assert "/no/text.txt" in refused("evaluate", model, *asked)


def test_an_unknown_task_is_known_first(refused, model, text, never_measured, monkeypatch):
    tasks = SimpleNamespace(TaskManager=lambda include_path: SimpleNamespace(all_tasks=["quiz"]))
    monkeypatch.setitem(sys.modules, "lm_eval", SimpleNamespace(__path__=[]))
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", tasks)
    assert "no task riddle" in refused("evaluate", model, "--text", text, "--length", 32, "--tasks", "quiz,riddle")


def test_a_missing_extra_is_known_first(refused, model, text, never_measured, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    assert "prunus[eval]" in refused("evaluate", model, "--text", text, "--length", 32, "--tasks", "quiz")


def test_a_length_over_the_models_maximum_is_known_first(refused, model, text, never_measured):
    assert "over the model's maximum of 512" in refused("evaluate", model, "--text", text, "--length", 513)


def test_prompts_need_a_tokenizer_and_that_is_known_first(refused, model, text, never_measured):
    for file in model.glob("tokenizer*"):
        file.unlink()
    asked = ("--prompt", "Once", "--against", model, "--text", text, "--length", 32)
    assert "no usable tokenizer" in refused("evaluate", model, *asked)


@pytest.mark.parametrize(("factor", "value"), [(1e5, "inf"), (3e38, "nan")])
def test_a_perplexity_that_is_no_number_names_model_and_text(refused, model, text, factor, value):
    file = model / "model.safetensors"
    tensors = load_file(file)
    tensors["model.norm.weight"] *= factor
    save_file(tensors, file, metadata={"format": "pt"})
    sentence = refused("evaluate", model, "--text", text, "--length", 32, "--windows", 2, "--dtype", "float32")
    assert f"perplexity of {model.resolve()} on {text} is {value}" in sentence


def test_choices_of_a_broken_model_are_refused(model, choices):
    file = model / "model.safetensors"
    tensors = load_file(file)
    tensors["model.norm.weight"] *= 3e38
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"log-likelihood of .* is nan"):
        prunus.evaluate(model, choices=choices(10), **FORWARD)


def test_results_that_cannot_be_recorded_are_shown(sparse, text, capsys, monkeypatch):
    peaks = {"peak_memory_bytes": 1, "peak_gpu_memory_bytes": None}
    monkeypatch.setattr(measurement, "peak_memory", lambda _directory, _work: peaks)
    (sparse / "prunus.json.tmp").mkdir()  # in the way of writing, for root too
    assert prunus.evaluate(sparse, text=(str(text),), **WINDOWS, **FORWARD)[0]["perplexity"] > 0
    assert "shown but not recorded" in capsys.readouterr().err
    assert prunus.bench(sparse, prompt_tokens=8, new_tokens=3, repetitions=1, **FORWARD)["model"]
    assert "shown but not recorded" in capsys.readouterr().err
    record = read_record(sparse)
    assert record["evaluations"] == record["benchmarks"] == []


def test_a_foreign_directory_is_left_as_it_is(model, text):
    before = sorted(model.iterdir())
    prunus.evaluate(model, text=(str(text),), **WINDOWS, **FORWARD)
    assert sorted(model.iterdir()) == before


def test_hidden_states_that_wait_on_disk_give_the_same(model, text):
    asked = {"text": (str(text),), **WINDOWS, **FORWARD}
    assert prunus.evaluate(model, max_memory=1, **asked) == prunus.evaluate(model, **asked)
