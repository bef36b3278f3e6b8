"""What an export refuses, and what it leaves when the engine fails: with a program that plays llama.cpp."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import prunus
from fake_engine import fake_install, say_ready, write_script
from prunus.checkpoint import open_checkpoint
from prunus.engines import find, llama_cpp
from prunus.errors import EngineError, UserError
from prunus.exporting import GGUF_TYPES, Conversion, parse_target
from prunus.exporting.generation import left_behind
from prunus.exporting.gguf_file import read_sampling
from prunus.exporting.widths import check_widths
from prunus.models.streamed import open_model

CONVERTER = "import sys, pathlib; pathlib.Path(sys.argv[sys.argv.index('--outfile') + 1]).write_text('GGUF')"
# Knows the tokenizer, and no weight: every token is as likely as every other.
WORKER = """
import json, math, sys
import numpy
V = 258
def answer(r):
    if r["do"] == "load":
        return dict(description="fake", vocabulary=V, bos=0, eos=1, ends=[1], chat_template=None)
    if r["do"] == "tokenize":
        return dict(tokens=json.loads(open(__file__ + ".tokens").read()))
    if r["do"] == "score":
        numpy.save(r["logits"], numpy.zeros((r["keep"], V), "float32"))
        return dict(nll=[[math.log(V)] * (len(w) - 1) for w in r["windows"]])
    return dict(tokens=[0] * r["new_tokens"])
for line in sys.stdin:
    print(json.dumps(answer(json.loads(line))), flush=True)
"""


@pytest.fixture
def engine(tmp_path, monkeypatch, tiny_tokenizer):
    """An installed engine that is a fake; returns a function that gives it other programs or other facts."""
    monkeypatch.setenv("PRUNUS_CACHE", str(tmp_path / "cache"))
    home = fake_install(llama_cpp.LLAMA_CPP)

    def become(*, worker=WORKER, converter=CONVERTER, architectures=("LlamaForCausalLM",)):
        for name, text in (("worker", worker), ("converter", converter)):
            (tmp_path / name).mkdir(exist_ok=True)
            monkeypatch.setattr(llama_cpp, name.upper(), write_script(tmp_path / name, text))
        from prunus.exporting.tokenization import SAMPLE

        (tmp_path / "worker" / "script.py.tokens").write_text(json.dumps([tiny_tokenizer(SAMPLE)["input_ids"]]))
        say_ready(home, architectures=list(architectures))

    become()
    return become


def nothing_is_left(folder):
    return not (folder / "out").exists() and not (folder / "out.partial").exists()


def test_without_the_engine_the_command_that_installs_it_is_said(tiny_llama_dir, tmp_path, monkeypatch, refused):
    monkeypatch.setenv("PRUNUS_CACHE", str(tmp_path / "cache"))
    sentence = refused("export", tiny_llama_dir, tmp_path / "out", "--to", "gguf:f16")
    assert "llama.cpp is not installed; run `prunus engines install llama.cpp` first." in sentence


@pytest.mark.parametrize(
    ("to", "message"),
    [
        ("onyx", "cannot export to 'onyx'; write gguf:TYPE with TYPE one of f32, f16"),
        ("gguf:q9", "gguf type 'q9' is not one that prunus writes; allowed are f32, f16"),
    ],
)
def test_an_unknown_target_is_refused(tiny_llama_dir, tmp_path, to, message):
    with pytest.raises(UserError, match=message):
        prunus.export(tiny_llama_dir, tmp_path / "out", to=to)


def test_a_target_is_read():
    assert parse_target("gguf").kind.name == "f16"
    assert parse_target("gguf:Q4_K_M").kind is GGUF_TYPES["q4_k_m"]


def test_an_architecture_that_the_engine_does_not_know_is_refused(engine, tiny_llama_dir, tmp_path):
    engine(architectures=["OtherForCausalLM"])
    with pytest.raises(UserError, match=r"llama\.cpp does not know the architecture LlamaForCausalLM \(here: "):
        prunus.export(tiny_llama_dir, tmp_path / "out")


def test_code_beside_a_model_is_not_run_unasked(engine, tiny_llama_dir, tmp_path):
    model = shutil.copytree(tiny_llama_dir, tmp_path / "model")
    (model / "modeling.py").write_text("raise SystemExit")
    with pytest.raises(UserError, match=r"holds Python code, which llama\.cpp may run when it converts"):
        prunus.export(model, tmp_path / "out")


def test_a_full_disk_is_seen_beforehand(engine, tiny_llama_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: SimpleNamespace(free=1000))
    with pytest.raises(UserError, match=r"needs about 0\.0 GiB, and 0\.0 are free; choose another disk"):
        prunus.export(tiny_llama_dir, tmp_path / "out")
    assert nothing_is_left(tmp_path)


# --- widths ---


def llama(folder, hidden=64, ffn=128):
    config = LlamaConfig(
        vocab_size=258, hidden_size=hidden, intermediate_size=ffn, num_hidden_layers=2, num_attention_heads=2
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return open_model(folder).spec


def test_rows_that_no_block_divides_are_refused(tmp_path):
    spec = llama(tmp_path, ffn=100)
    with pytest.raises(UserError, match=r"rows of mlp\.down_proj have 100 weights.*shrink to 96 or 128 instead"):
        check_widths(spec, 64, GGUF_TYPES["q8_0"])
    assert check_widths(spec, 64, GGUF_TYPES["f16"]) == []


def test_rows_that_fall_back_are_named_with_the_width_that_would_not(tmp_path):
    spec = llama(tmp_path, ffn=512)
    (note,) = check_widths(spec, 64, GGUF_TYPES["q4_k_m"])
    assert note.startswith(
        "rows of 64 weights are no multiple of 256: llama.cpp writes the embedding, self_attn.q_proj"
    )
    assert "as q5_0" in note
    assert note.endswith("a width of 256 would avoid it.")
    assert "down_proj" not in note
    assert check_widths(spec, 64, GGUF_TYPES["q4_0"]) == []


def test_layers_that_differ_are_refused(engine, tiny_llama_dir, tmp_path):
    calibration = {"calibration": ["builtin"], "samples": 4, "length": 32, "protect_first": 0, "protect_last": 0}
    prunus.shrink(tiny_llama_dir, tmp_path / "shrunk", attention=1, **calibration)
    with pytest.raises(UserError, match=r"differ, and llama\.cpp reads one width of each kind for all of them; shrink"):
        prunus.export(tmp_path / "shrunk", tmp_path / "out")


# --- how the model is sampled ---

GENERATION = {
    "do_sample": True,
    "temperature": 0.6,
    "top_k": 20,
    "top_p": 0.95,
    "repetition_penalty": 1.1,
    "no_repeat_ngram_size": 3,
    "eos_token_id": [1],
}
HEADER_ONLY = """
import json, sys
from pathlib import Path
from gguf import GGUFWriter
options = dict(zip(sys.argv[2::2], sys.argv[3::2]))
writer = GGUFWriter(options["--outfile"], "llama")
for key, value in json.loads(Path(options["--metadata"]).read_text()).items():
    (writer.add_int32 if isinstance(value, int) else writer.add_float32)(key, value)
writer.write_header_to_file()
writer.write_kv_data_to_file()
writer.close()
"""


@pytest.fixture
def sampled(tiny_llama_dir, tmp_path):
    model = shutil.copytree(tiny_llama_dir, tmp_path / "model")
    (model / "generation_config.json").write_text(json.dumps(GENERATION))
    return model


def write_gguf(model, folder):
    folder.mkdir()
    target = parse_target("gguf")
    installed, checkpoint = find(llama_cpp.LLAMA_CPP), open_checkpoint(model)
    job = Conversion(
        checkpoint=checkpoint, kind=target.kind, installed=installed, folder=folder, stem="out", timeout=60.0
    )
    return target.format.write(job)


def test_how_the_model_is_sampled_goes_into_the_file(engine, sampled, tmp_path):
    engine(converter=HEADER_ONLY)
    assert read_sampling(write_gguf(sampled, tmp_path / "folder")) == {
        "general.sampling.temp": pytest.approx(0.6),
        "general.sampling.top_k": 20,
        "general.sampling.top_p": pytest.approx(0.95),
        "general.sampling.penalty_repeat": pytest.approx(1.1),
        "general.sampling.penalty_last_n": -1,  # the whole text, as in transformers
    }
    assert sorted(file.name for file in (tmp_path / "folder").iterdir()) == ["out-f16.gguf"]


def test_a_converter_that_drops_it_ends_the_export(engine, sampled, tmp_path):
    engine(converter=HEADER_ONLY.replace(".items()", ".fromkeys(()).items()"))
    with pytest.raises(EngineError, match=r"says general\.sampling\.temp=None, and generation_config\.json says 0\.6"):
        write_gguf(sampled, tmp_path / "folder")


def test_what_a_file_cannot_hold_is_said(sampled, tiny_llama_dir):
    assert left_behind(open_checkpoint(sampled)) == [
        "generation_config.json says no_repeat_ngram_size=3, which a GGUF file has no place for."
    ]
    assert left_behind(open_checkpoint(tiny_llama_dir)) == []
    (note,) = parse_target("gguf").format.check(open_model(sampled), parse_target("gguf").kind)
    assert "no_repeat_ngram_size=3" in note


# --- failures of the engine ---


def test_a_failed_proof_leaves_nothing_that_looks_finished(engine, tiny_llama_dir, tmp_path, prunus):
    code, printed, errors = prunus("export", tiny_llama_dir, tmp_path / "out", "--to", "gguf:f16")
    assert (code, printed) == (1, "")
    assert "the proof failed, so" in errors
    assert "nats, over the 0.0001 of f16; NLL is 5.5530 nats a token" in errors
    assert "Traceback" not in errors
    assert nothing_is_left(tmp_path)


def test_what_was_not_carried_along_is_said(engine, tiny_llama_dir, tmp_path):
    engine(
        worker=WORKER.replace("bos=0, eos=1, ends=[1]", "bos=5, eos=1, ends=[7]").replace(
            "vocabulary=V", "vocabulary=9"
        )
    )
    with pytest.raises(EngineError) as error:
        prunus.export(tiny_llama_dir, tmp_path / "out")
    for sentence in ("begins with token 5, the model with 0", "not stop at token 1", "the file has 9 tokens"):
        assert sentence in str(error.value)


def test_another_tokenization_fails_the_proof(engine, tiny_llama_dir, tmp_path):
    engine(
        worker=WORKER.replace("json.loads(open", "(lambda t: [[*t[0][:7], 3]])(json.loads(open").replace(
            "read()))", "read())))"
        )
    )
    with pytest.raises(EngineError, match=r"the engine reads other tokens, from number 7 on of .The pruned"):
        prunus.export(tiny_llama_dir, tmp_path / "out")


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (
            {"converter": "raise SystemExit('cannot map tensor x')"},
            "failed to convert; it said last:\n  cannot map tensor x",
        ),
        ({"converter": ""}, "ended well, but wrote no out-f16.gguf"),
        ({"converter": "import time; time.sleep(600)"}, "had not finished to convert after 10 s"),
        ({"worker": "import os; os.abort()"}, "died while asked to load|was gone when asked to load"),
        ({"worker": "input(); print('hello')"}, "answered 'load' with what is no answer: 'hello'"),
    ],
)
def test_an_engine_that_fails_ends_the_export(engine, tiny_llama_dir, tmp_path, broken, message):
    engine(**broken)
    with pytest.raises(EngineError, match=message):
        prunus.export(tiny_llama_dir, tmp_path / "out", timeout=10)
    assert nothing_is_left(tmp_path)


def test_bounds_grow_as_bits_shrink():
    ordered = sorted(GGUF_TYPES.values(), key=lambda kind: -kind.bits)
    assert [kind.kl for kind in ordered] == sorted(kind.kl for kind in ordered)
    assert torch.tensor([kind.nll for kind in ordered]).diff().ge(0).all()
