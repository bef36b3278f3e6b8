"""Evaluation of what `prunus export` made, by an engine: here a worker that is transformers in disguise."""

import json

import pytest

import prunus
from fake_engine import fake_install, write_script
from prunus.engines import llama_cpp
from prunus.errors import UserError

WORKER = """
import json, sys
import numpy, torch
from transformers import AutoModelForCausalLM
for line in sys.stdin:
    r = json.loads(line)
    answer = {}
    if r["do"] == "load":
        assert "model" not in globals(), "a second load reads the file again"
        context = r["context"]
        model = AutoModelForCausalLM.from_pretrained(r["path"], dtype=torch.float32)
    if r["do"] == "score":
        (window,) = r["windows"]
        assert len(window) <= context
        with torch.no_grad():
            logits = model(torch.tensor([window])).logits[0, : r["keep"]]
        numpy.save(r["logits"], logits.numpy())
        answer = {"nll": [[0.0] * (len(window) - 1)]}
    print(json.dumps(answer), flush=True)
"""


@pytest.fixture
def exported(tiny_llama_dir, tmp_path, monkeypatch):
    """A directory as an export of the tiny model leaves it, whose "file" is that model."""
    monkeypatch.setenv("PRUNUS_CACHE", str(tmp_path / "cache"))
    fake_install(llama_cpp.LLAMA_CPP)
    monkeypatch.setattr(llama_cpp, "WORKER", write_script(tmp_path, WORKER))
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "model").symlink_to(tiny_llama_dir)
    step = {"step": "export", "engine": {"name": "llama.cpp", "versions": {"x": "1"}}, "format": "gguf", "type": "f32"}
    step |= {"file": "model", "input": {"path": str(tiny_llama_dir)}}
    record = {"format": 1, "prunus": "0", "history": [step], "evaluations": [], "benchmarks": []}
    (folder / "prunus.json").write_text(json.dumps(record))
    return folder


@pytest.fixture
def choices(tmp_path):
    rows = [
        {"ctx": "The vine is", "endings": ["cut", "not cut at all"], "label": 0},
        {"ctx": "A tree", "endings": ["grows in the garden behind the old house", "is"], "label": 1},
    ]
    file = tmp_path / "choices.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    return file


def test_figures_are_those_of_transformers(exported, tiny_llama_dir, choices):
    asked = {"text": ["builtin"], "length": 32, "windows": 3, "choices": str(choices), "dtype": "float32"}
    text, chosen = prunus.evaluate(exported, against=str(tiny_llama_dir), **asked)
    expected, expected_choices = prunus.evaluate(tiny_llama_dir, **asked)
    assert text["perplexity"] == pytest.approx(expected["perplexity"], rel=1e-5)
    assert text["against"]["kl"] == pytest.approx(0, abs=1e-5)
    assert chosen["acc_norm"] == expected_choices["acc_norm"]
    assert (text["engine"], text["dtype"], text["engine_versions"]) == ("llama.cpp", "f32", {"x": "1"})
    recorded = json.loads((exported / "prunus.json").read_text())["evaluations"]
    assert [one["kind"] for one in recorded] == ["perplexity", "choices"]


def test_what_runs_only_in_transformers_is_refused(exported, tiny_llama_dir):
    with pytest.raises(UserError, match=r"run in transformers, and .*out is gguf:f32: give --text or --choices"):
        prunus.evaluate(exported, prompts=["A vine"], against=str(tiny_llama_dir))
