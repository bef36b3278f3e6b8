"""Bench of what `prunus export` made, in its own engine: with a program that plays llama.cpp."""

import dataclasses
import json

import pytest

import prunus
from fake_engine import fake_install, write_script
from prunus.engines import ENGINES, llama_cpp
from prunus.errors import UserError
from prunus.exporting.exported import find_exported

# Every token takes as long as its file says, so that the ratios are known.
WORKER = """
import json, sys
seconds = 1.0
for line in sys.stdin:
    r = json.loads(line)
    if r["do"] == "load":
        seconds, loaded = float(open(r["path"]).read()), r
        answer = dict(description="fake", vocabulary=64)
    if r["do"] == "memory":
        answer = dict(peak_memory_bytes=2**20)
    if r["do"] == "generate":
        n = r["new_tokens"]
        assert len(r["prompt"]) == 8 and max(r["prompt"]) < 64
        answer = dict(tokens=[0] * n, prefill=seconds, first_token=seconds, steps=[seconds] * (n - 1))
    if r["do"] == "generate_together":  # one prompt after the other, then all step together
        n, prompts = r["new_tokens"], r["prompts"]
        assert loaded["sequences"] == len(prompts) == len(set(map(tuple, prompts)))
        answer = dict(requests=[dict(first_token=seconds * i, steps=[seconds] * (n - 1)) for i in (1, 2)])
    print(json.dumps(answer), flush=True)
"""
SIZES = {"prompt_tokens": 8, "new_tokens": 4, "repetitions": 5}


@pytest.fixture
def exported(tmp_path, monkeypatch):
    """Writes directories as an export of a model of so many seconds a token leaves them."""
    monkeypatch.setenv("PRUNUS_CACHE", str(tmp_path / "cache"))
    fake_install(llama_cpp.LLAMA_CPP)
    monkeypatch.setattr(llama_cpp, "WORKER", write_script(tmp_path, WORKER))

    def make(name, seconds, engine="llama.cpp"):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "m.gguf").write_text(str(seconds))
        step = {"step": "export", "engine": {"name": engine}, "format": "gguf", "type": "q8_0", "file": "m.gguf"}
        step |= {"bytes": 3, "parameters": int(100 * seconds), "decode_bytes_per_token": 10, "max_length": 64}
        record = {"format": 1, "prunus": "0", "history": [step], "evaluations": [], "benchmarks": []}
        (folder / "prunus.json").write_text(json.dumps(record))
        return folder

    return make


def test_it_is_timed_there_beside_the_dense_export(exported):
    model, dense = exported("model", 0.25), exported("dense", 0.5)
    result = prunus.bench(model, against=str(dense), **SIZES)
    assert (result["engine"], result["dtype"], result["device"]) == ("llama.cpp", "q8_0", "cpu")
    assert result["speedup"]["decode"]["median"] == 2.0
    assert result["model"]["decode_tokens_per_second"] == 4.0
    assert result["model"]["tpot_seconds"]["count"] == 15
    assert result["model"]["bytes_on_disk"] == len("0.25")
    assert (result["model"]["peak_memory_bytes"], result["dense"]["parameters"]) == (2**20, 50)
    record = json.loads((model / "prunus.json").read_text())
    assert record["benchmarks"][0]["verdict"].startswith("Prefill faster (2.000x")
    assert prunus.bench(model, against=str(dense), skip_done=True, **SIZES)["date"] == result["date"]


def test_the_dense_model_is_exported_alike_beside_it(exported, tiny_llama_dir, monkeypatch):
    asked = {}

    def export(model, out, **settings):
        asked.update(model=str(model), **settings)
        exported(out.name, 0.5)

    monkeypatch.setattr("prunus.steps.bench.export", export)
    model = exported("model", 0.5)
    result = prunus.bench(model, against=str(tiny_llama_dir), engine="llama.cpp", **SIZES)
    assert asked == {"model": str(tiny_llama_dir), "to": "gguf:q8_0", "trust_remote_code": False}
    assert result["dense"]["path"] == str(model.with_name("model.dense"))
    assert result["speedup"]["decode"]["claim"] == "no difference"


def test_requests_at_the_same_time_share_the_engine(exported):
    model, dense = exported("model", 0.25), exported("dense", 0.5)
    (row,) = prunus.bench(model, against=str(dense), concurrency=(2,), **SIZES)["concurrency"]
    assert row["model"]["tokens_per_second"] == 2 * 4 / (2 * 0.25 + 3 * 0.25)
    assert (row["requests"], row["speedup"]["median"], row["speedup"]["claim"]) == (2, 2.0, "faster")
    assert row["dense"]["ttft_seconds"] == {"p50": 0.75, "p95": 1.0, "p99": 1.0, "count": 10}


def test_an_engine_that_runs_one_request_at_a_time_says_so(exported, monkeypatch):
    alone = dataclasses.replace(llama_cpp.LLAMA_CPP, together=False)
    monkeypatch.setitem(ENGINES, "llama.cpp", alone)
    with pytest.raises(
        UserError, match=r"llama\.cpp runs one request at a time, .* or bench in one of transformers, vllm"
    ):
        prunus.bench(exported("model", 1), concurrency=(1, 4), **SIZES)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"engine": "transformers"}, r"runs in llama\.cpp, and engine 'transformers' was asked for\.$"),
        ({"dtype": "float32"}, r"dtype is for transformers; .*model is gguf:q8_0, as it was exported"),
        ({"prompt_tokens": 63}, r"63 prompt and 4 new tokens are 67, and .*model reads at most 64"),
    ],
)
def test_what_cannot_be_is_refused(exported, settings, message):
    with pytest.raises(UserError, match=message):
        prunus.bench(exported("model", 1), **{**SIZES, **settings})


def test_two_engines_are_not_compared(exported):
    other = exported("other", 1, engine="vllm")
    with pytest.raises(UserError, match=r"model runs in llama\.cpp, .*other in vllm; compare within one engine"):
        prunus.bench(exported("model", 1), against=str(other), **SIZES)


def test_a_model_directory_is_no_export(tiny_llama_dir):
    assert find_exported(tiny_llama_dir) is None
    with pytest.raises(UserError, match=r"runs in transformers, and engine .* was asked for; export it first"):
        prunus.bench(tiny_llama_dir, engine="llama.cpp", **SIZES)
