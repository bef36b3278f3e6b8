"""`prunus engines RUN`: what each engine takes of a run and what it gains, from shapes and the record alone."""

import json
import shutil

import pytest
from safetensors.torch import load_file, save_file

import prunus as package
from fake_engine import fake_install
from families import TINY, save_tiny
from prunus.checkpoint.record import new_record
from prunus.engines import ENGINES, llama_cpp
from prunus.errors import UserError
from prunus.exporting import FORMATS, vllm_directory
from prunus.steps.engine_fit import engine_fit


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """No engine is installed, and vLLM takes heads as narrow as the tiny model's."""
    monkeypatch.setenv("PRUNUS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(vllm_directory, "HEAD_SIZES", (*vllm_directory.HEAD_SIZES, 16))


def fit(model):
    return {row["engine"]: row for row in engine_fit(model)}


def test_every_engine_has_a_row_and_every_type_a_verdict(tiny_llama_dir):
    rows = fit(tiny_llama_dir)
    assert list(rows) == list(ENGINES)
    asked = {f"{form.name}:{kind.name}" for form in FORMATS.values() for kind in form.types.values() if not kind.keeps}
    taken = {one["as"].removeprefix("--to ") for row in rows.values() for one in row["takes"]}
    refused = {name for row in rows.values() for one in row["refuses"] for name in one["as"]}
    assert asked == (taken | refused) - {"as it is"}
    assert rows["llama.cpp"]["installed"] is False
    assert rows["llama.cpp"]["install"] == "prunus engines install llama.cpp"
    (f16,) = (one for one in rows["llama.cpp"]["takes"] if one["as"] == "--to gguf:f16")
    assert f16 == {"as": "--to gguf:f16", "about_bytes": 2 * parameters(tiny_llama_dir), "notes": []}
    assert "nothing that prunus knows of" in rows["transformers"]["gains"][0]


def parameters(folder):
    return sum(tensor.numel() for file in folder.glob("*.safetensors") for tensor in load_file(file).values())


def test_zeros_and_shapes_are_said_in_each_engine_s_words(tiny_llama_dir, tmp_path):
    package.sparsify(tiny_llama_dir, tmp_path / "sparse", method="magnitude", pattern="2:4")
    for name, row in fit(tmp_path / "sparse").items():
        assert row["gains"] == [f"50% zeros in the pruned matrices (2:4) bring {ENGINES[name].zeros}."]
    package.shrink(tiny_llama_dir, tmp_path / "small", ffn=64, score="magnitude", refit=False)
    after = parameters(tmp_path / "small") / parameters(tiny_llama_dir)
    (said,) = fit(tmp_path / "small")["llama.cpp"]["gains"]
    assert said.startswith(f"{1 - after:.0%} fewer parameters: a decoded token reads {after:.2f} of the bytes")


def test_a_quantized_model_is_taken_as_it_is_or_not_at_all(tiny_llama_dir, tmp_path):
    package.quantize(tiny_llama_dir, tmp_path / "w8a8", scheme="w8a8", dtype="float32")
    rows = fit(tmp_path / "w8a8")
    assert [one["as"] for one in rows["vllm"]["takes"]] == ["--to vllm:w8a8"]
    assert rows["llama.cpp"]["takes"] == []
    (refused,) = rows["llama.cpp"]["refuses"]
    assert "is quantized (w8a8), and its full-precision weights are gone" in refused["why"]


def test_a_measured_speed_up_is_said_where_it_was_measured(tiny_llama_dir, tmp_path):
    model = shutil.copytree(tiny_llama_dir, tmp_path / "model")
    ratio = {"median": 1.5, "low": 1.4, "high": 1.6}
    record = new_record("0") | {"benchmarks": [{"engine": "transformers", "speedup": {"decode": ratio}}]}
    (model / "prunus.json").write_text(json.dumps(record))
    rows = fit(model)
    assert rows["transformers"]["gains"] == ["measured: decode 1.50x (1.40 to 1.60) of the dense model."]
    assert "measured" not in rows["vllm"]["gains"][0]


def test_layers_that_differ_open_by_prunus_alone(tiny_llama_dir, tmp_path):
    package.shrink(
        tiny_llama_dir,
        tmp_path / "own",
        mlp=1,
        protect_first=0,
        protect_last=0,
        calibration=("builtin",),
        samples=2,
        length=32,
    )
    rows = fit(tmp_path / "own")
    assert rows["transformers"]["takes"][0]["as"] == "by prunus.load"
    for name in ("llama.cpp", "vllm"):
        assert (rows[name]["takes"], rows[name]["gains"]) == ([], [])
        assert "reads one width of each kind for all of them" in rows[name]["refuses"][0]["why"]


def test_an_architecture_that_an_installed_engine_does_not_know_is_refused_once(tiny_llama_dir):
    fake_install(llama_cpp.LLAMA_CPP, architectures=["OtherForCausalLM"])
    (refused,) = fit(tiny_llama_dir)["llama.cpp"]["refuses"]
    assert refused["as"] == ["gguf"]
    assert "does not know the architecture LlamaForCausalLM" in refused["why"]


def test_a_file_is_read_by_its_own_engine_alone(tmp_path):
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "m.gguf").write_text("GGUF")
    step = {"step": "export", "engine": {"name": "llama.cpp"}, "format": "gguf", "type": "q8_0", "file": "m.gguf"}
    record = new_record("0") | {"history": [step | {"input": {"path": "models/dense"}}]}
    (folder / "prunus.json").write_text(json.dumps(record))
    rows = fit(folder)
    assert rows["llama.cpp"]["takes"][0]["as"] == "gguf:q8_0, as it was exported"
    why = rows["transformers"]["refuses"][0]["why"]
    assert why == "only llama.cpp reads gguf:q8_0; ask about what it was made from, models/dense"


def test_no_weight_is_read(tiny_llama_dir, tmp_path):
    model = shutil.copytree(tiny_llama_dir, tmp_path / "model")
    tensors = load_file(model / "model.safetensors")
    save_file({name: tensor * float("nan") for name, tensor in tensors.items()}, model / "model.safetensors")
    assert fit(model)["vllm"]["takes"]  # reading one would be refused: it holds NaN


def test_the_command_tells_a_run_from_a_command(prunus, tiny_llama_dir, tmp_path):
    code, out, err = prunus("engines", tiny_llama_dir)
    assert code == 0
    assert [row["engine"] for row in json.loads(out)["engines"]] == list(ENGINES)
    assert "gguf:q8_0" in err
    assert prunus("engines")[0] == 0
    assert prunus("engines", "install", "nothing")[0] == 2
    code, _, err = prunus("engines", tmp_path / "nothing")
    assert (code, err.count("\n")) == (2, 1)


def test_what_is_no_model_is_refused(tmp_path):
    with pytest.raises(UserError, match="no such path"):
        engine_fit(tmp_path / "nothing")


@pytest.mark.parametrize("engine", ["vLLM", "llama.cpp"])
@pytest.mark.parametrize("family", ["qwen2", "llama"])
def test_heads_whose_width_an_engine_gets_wrong_are_refused(family, engine, tmp_path):
    dense = save_tiny(TINY[family], tmp_path / "dense")
    package.shrink(dense, tmp_path / "small", kv_groups=0.5, score="magnitude", refit=False)
    of_heads = {
        name: [one["why"] for one in fit(tmp_path / name)[engine.lower()]["refuses"] if "takes a head of" in one["why"]]
        for name in ("dense", "small")
    }
    assert of_heads["dense"] == []
    assert bool(of_heads["small"]) is (family == "qwen2")
    assert all(f"{engine} takes a head of qwen2 to be 64 / 2" in why for why in of_heads["small"])
