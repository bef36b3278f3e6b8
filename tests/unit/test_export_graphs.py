"""What exports to ONNX and OpenVINO refuse, ask of the engine, and leave: with a program that plays the engine."""

import json
from dataclasses import replace

import pytest

import prunus
from fake_engine import fake_install, say_ready, write_script
from families import TINY, save_tiny
from prunus.engines import ONNXRUNTIME, OPENVINO, onnxruntime, openvino
from prunus.errors import EngineError, UserError
from prunus.exporting import FORMATS

# Notes what it is asked to convert, writes a folder, and knows no weight: every token is as likely as every other.
WORKER = """
import json, math, pathlib, sys
import numpy
V = 258
def answer(r):
    if r["do"] == "convert":
        pathlib.Path(__file__).with_name("asked.json").write_text(json.dumps(r))
        pathlib.Path(r["target"]).mkdir(parents=True)
        return {}
    if r["do"] == "load":
        return dict(description="fake", vocabulary=V, bos=0, ends=[1], chat_template=None)
    if r["do"] == "tokenize":
        return dict(tokens=[[9]])
    if r["do"] == "score":
        numpy.save(r["logits"], numpy.zeros((r["keep"], V), "float32"))
        return dict(nll=[[math.log(V)] * (len(w) - 1) for w in r["windows"]])
    return dict(tokens=[0] * r["new_tokens"])
for line in sys.stdin:
    print(json.dumps(answer(json.loads(line))), flush=True)
"""
ENGINES = {"onnx": (ONNXRUNTIME, onnxruntime), "openvino": (OPENVINO, openvino)}


@pytest.fixture(params=ENGINES)
def to(request):
    return request.param


@pytest.fixture
def engine(to, tmp_path, monkeypatch):
    """The engine of `to`, installed as a fake; returns a function that gives it another program or architectures."""
    monkeypatch.setenv("PRUNUS_CACHE", str(tmp_path / "cache"))
    line, module = ENGINES[to]
    home = fake_install(line)

    def become(*, worker=WORKER, architectures=("LlamaForCausalLM",)):
        (tmp_path / "worker").mkdir(exist_ok=True)
        monkeypatch.setattr(module, "WORKER", write_script(tmp_path / "worker", worker))
        say_ready(home, architectures=list(architectures))

    become()
    return become


def nothing_is_left(folder):
    return not (folder / "out").exists() and not (folder / "out.partial").exists()


def save(folder, tokenizer, family, **sizes):
    """A tiny random model that reads the tokens of `tokenizer`."""
    usual = {"vocab_size": len(tokenizer), "max_position_embeddings": 256}
    save_tiny(replace(TINY[family], sizes={**TINY[family].sizes, **usual, **sizes}), folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_without_the_engine_the_command_that_installs_it_is_said(to, tiny_llama_dir, tmp_path, monkeypatch):
    monkeypatch.setenv("PRUNUS_CACHE", str(tmp_path / "cache"))
    name = ENGINES[to][0].name
    with pytest.raises(UserError, match=f"{name} is not installed; run `prunus engines install {name}` first"):
        prunus.export(tiny_llama_dir, tmp_path / "out", to=to)


def test_an_architecture_that_the_engine_does_not_know_is_refused(to, engine, tiny_llama_dir, tmp_path):
    engine(architectures=["OtherForCausalLM"], worker="raise SystemExit('was asked')")
    with pytest.raises(UserError, match=f"{ENGINES[to][0].name} does not know the architecture LlamaForCausalLM"):
        prunus.export(tiny_llama_dir, tmp_path / "out", to=to)
    assert nothing_is_left(tmp_path)


def test_layers_that_differ_are_refused(to, engine, tiny_llama_dir, tmp_path):
    calibration = {"calibration": ["builtin"], "samples": 4, "length": 32, "protect_first": 0, "protect_last": 0}
    prunus.shrink(tiny_llama_dir, tmp_path / "shrunk", attention=1, **calibration)
    with pytest.raises(UserError, match="reads one width of each kind for all of them"):
        prunus.export(tmp_path / "shrunk", tmp_path / "out", to=to)


@pytest.mark.parametrize(
    ("to", "kind", "told"),
    [
        ("onnx", "f32", "fp32"),
        ("onnx", "int4", "int4"),
        ("openvino", "f16", "f16"),
        ("openvino", "int8", "int8"),
    ],
    indirect=["to"],
)
def test_the_engine_is_asked_for_the_type(to, engine, tiny_llama_dir, tmp_path, kind, told):
    with pytest.raises(EngineError):
        prunus.export(tiny_llama_dir, tmp_path / "out", to=f"{to}:{kind}")  # a program without weights proves nothing
    asked = json.loads((tmp_path / "worker" / "asked.json").read_text())
    assert (asked["type"], asked["source"], asked["trust"]) == (told, str(tiny_llama_dir), False)


def test_a_type_that_is_not_written_is_refused(to, tiny_llama_dir, tmp_path):
    allowed = ", ".join(FORMATS[to].types)
    with pytest.raises(UserError, match=f"{to} type 'int3' is not one that prunus writes; allowed are {allowed}"):
        prunus.export(tiny_llama_dir, tmp_path / "out", to=f"{to}:int3")


def test_a_failed_proof_leaves_nothing(to, engine, tiny_llama_dir, tmp_path):
    with pytest.raises(EngineError, match=r"the proof failed, so .*; NLL is 5\.5530 nats a token"):
        prunus.export(tiny_llama_dir, tmp_path / "out", to=to)
    assert nothing_is_left(tmp_path)


def test_a_conversion_that_dies_ends_the_export(to, engine, tiny_llama_dir, tmp_path):
    engine(worker="import os; os.abort()")
    with pytest.raises(EngineError, match=r"died while asked to convert|was gone when asked to convert"):
        prunus.export(tiny_llama_dir, tmp_path / "out", to=to)
    assert nothing_is_left(tmp_path)


@pytest.mark.parametrize(
    ("to", "family", "sizes", "reason"),
    [
        ("onnx", "mistral", {"sliding_window": 16}, "sees 16 tokens back"),
        ("onnx", "gemma3_text", {}, "rotary angles for each kind of layer"),
        ("openvino", "mixtral", {}, "has experts"),
        ("openvino", "qwen3_moe", {}, "has experts"),
    ],
    indirect=["to"],
)
def test_what_the_road_reads_wrongly_is_refused(to, engine, tiny_tokenizer, tmp_path, family, sizes, reason):
    model = save(tmp_path / "model", tiny_tokenizer, family, **sizes)
    name = json.loads((model / "config.json").read_text())["architectures"][0]
    engine(architectures=[name], worker="raise SystemExit('was asked')")
    with pytest.raises(UserError, match=reason):
        prunus.export(model, tmp_path / "out", to=to)
    assert nothing_is_left(tmp_path)
