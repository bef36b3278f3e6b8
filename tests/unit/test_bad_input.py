"""Each mistake ends in one sentence on stderr, exit code 2, no traceback, and nothing that looks finished."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BertConfig, LlamaConfig, LlamaForSequenceClassification, MambaConfig, T5Config

from families import TINY, save_tiny
from prunus import cli

TEXT = "The quick brown fox jumps over the lazy dog and goes home. " * 400


@pytest.fixture
def model(tmp_path, tiny_llama_dir):
    return Path(shutil.copytree(tiny_llama_dir, tmp_path / "model"))


@pytest.fixture
def text(tmp_path):
    file = tmp_path / "text.txt"
    file.write_text(TEXT)
    return file


@pytest.fixture
def refused(tmp_path, capsys, monkeypatch):
    """Run the command line; returns the one sentence it must end with."""

    def run(*arguments: object, out: Path | None = tmp_path / "out") -> str:
        monkeypatch.setattr("sys.argv", ["prunus", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        captured = capsys.readouterr()
        assert stop.value.code == 2
        assert "Traceback" not in captured.err
        assert captured.out == ""
        if out is not None:
            assert not out.exists()
        sentence = captured.err[captured.err.index("error: ") :].strip()
        assert "\n" not in sentence
        return sentence

    return run


def sparsify(model, tmp_path, *extra):
    return ("sparsify", model, tmp_path / "out", "--method", "magnitude", *extra)


def calibrated(model, tmp_path, text, *extra):
    return ("sparsify", model, tmp_path / "out", "--method", "wanda", "--calibration", text, "--samples", 4, *extra)


def test_no_such_path(refused, tmp_path):
    assert "no such path: /no/where" in refused(*sparsify("/no/where", tmp_path))


def test_a_file_is_not_a_model(refused, tmp_path, text):
    assert "is a file, not a model directory" in refused(*sparsify(text, tmp_path))


def test_not_a_model_directory(refused, tmp_path):
    (tmp_path / "empty").mkdir()
    assert "has no config.json" in refused(*sparsify(tmp_path / "empty", tmp_path))


def test_damaged_config(refused, tmp_path, model):
    (model / "config.json").write_text("{")
    assert "not a JSON object" in refused(*sparsify(model, tmp_path))


def test_unknown_architecture(refused, tmp_path, model):
    edit_config(model, model_type="no_such_family")
    assert "unsupported architecture 'no_such_family'" in refused(*sparsify(model, tmp_path))


def edit_config(model, **changes):
    file = model / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def save_config(config, model, architecture):
    config.architectures = [architecture]
    config.save_pretrained(model)


def test_architecture_that_is_not_understood(refused, tmp_path, model):
    save_config(MambaConfig(hidden_size=64, num_hidden_layers=2, vocab_size=64), model, "MambaForCausalLM")
    sentence = refused(*sparsify(model, tmp_path))
    assert "'mamba' is not supported" in sentence
    assert "MambaMixer" in sentence


def test_encoder_decoder(refused, tmp_path, model):
    save_config(T5Config(), model, "T5ForConditionalGeneration")
    assert "encoder-decoder" in refused(*sparsify(model, tmp_path))


def test_classification_model(refused, tmp_path, model):
    shutil.rmtree(model)
    LlamaForSequenceClassification(LlamaConfig(**TINY["llama"].tiny_sizes)).save_pretrained(model)
    assert "LlamaForSequenceClassification is not a causal language model" in refused(*sparsify(model, tmp_path))


def test_masked_language_model(refused, tmp_path, model):
    save_config(BertConfig(), model, "BertForMaskedLM")
    assert "not a causal language model" in refused(*sparsify(model, tmp_path))


def test_missing_shard(refused, tmp_path):
    model = save_tiny(TINY["llama"], tmp_path / "sharded")
    sorted(model.glob("*.safetensors"))[1].unlink()
    assert "is missing from" in refused(*sparsify(model, tmp_path))


def test_truncated_shard(refused, tmp_path, model):
    file = model / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    assert "corrupt or truncated" in refused(*sparsify(model, tmp_path))


def test_corrupt_shard(refused, tmp_path, model):
    (model / "model.safetensors").write_bytes(b"not safetensors at all")
    assert "corrupt or truncated" in refused(*sparsify(model, tmp_path))


def test_index_that_reaches_outside(refused, tmp_path):
    model = save_tiny(TINY["llama"], tmp_path / "sharded")
    index = model / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["model.norm.weight"] = "../text.safetensors"
    index.write_text(json.dumps(content))
    assert "outside its directory" in refused(*sparsify(model, tmp_path))


def edit_tensors(model, **changes):
    file = model / "model.safetensors"
    tensors = {**load_file(file), **changes}
    save_file({k: v for k, v in tensors.items() if v is not None}, file, metadata={"format": "pt"})


UP = "model.layers.1.mlp.up_proj.weight"


def test_tensor_of_the_wrong_shape(refused, tmp_path, model):
    edit_tensors(model, **{UP: torch.zeros(3, 5)})
    sentence = refused(*sparsify(model, tmp_path))
    assert UP in sentence
    assert "(3, 5)" in sentence


def test_missing_tensor(refused, tmp_path, model):
    edit_tensors(model, **{UP: None})
    assert f"no tensor for {UP}" in refused(*sparsify(model, tmp_path))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_or_inf_is_named(refused, tmp_path, model, value):
    weight = load_file(model / "model.safetensors")[UP]
    weight[1, 2] = value
    edit_tensors(model, **{UP: weight})
    assert f"tensor {UP}" in refused(*sparsify(model, tmp_path))


@pytest.mark.parametrize("sparsity", ["1.0", "1.5", "-0.1", "nan", "half"])
def test_sparsity_out_of_range(refused, tmp_path, model, sparsity):
    refused(*sparsify(model, tmp_path, f"--pattern={sparsity}"))


def test_n_of_m_that_does_not_divide(refused, tmp_path, model):
    assert "self_attn.q_proj" in refused(*sparsify(model, tmp_path, "--pattern", "2:5"))


def test_tile_larger_than_the_matrix(refused, tmp_path, model):
    assert "tile is larger" in refused(*sparsify(model, tmp_path, "--pattern", "512x16:0.5"))


def test_unknown_method(refused, tmp_path, model):
    sentence = refused("sparsify", model, tmp_path / "out", "--method", "magic")
    assert "unknown method 'magic'" in sentence
    assert "wanda" in sentence


def test_unknown_option_of_a_method(refused, tmp_path, model):
    assert "unknown option 'speed'" in refused(*sparsify(model, tmp_path, "--option", "speed=9"))


def test_glob_that_matches_nothing(refused, tmp_path, model):
    sentence = refused(*sparsify(model, tmp_path, "--protect", "*.no_proj"))
    assert "'*.no_proj' matches no matrix" in sentence
    assert "q_proj" in sentence


def test_override_without_a_pattern(refused, tmp_path, model):
    assert "has no '='" in refused(*sparsify(model, tmp_path, "--override", "*.q_proj"))


def test_everything_protected(refused, tmp_path, model):
    assert "nothing to sparsify" in refused(*sparsify(model, tmp_path, "--protect", "*"))


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "empty"),
        (b"too short", "tokens"),
        (b"\x00\x01\x02\xff" * 500, "text"),
        ("Grüße aus Köln. ".encode("latin-1") * 400, "UTF-8"),
    ],
)
def test_unusable_calibration_text(refused, tmp_path, model, content, expected):
    file = tmp_path / "bad.txt"
    file.write_bytes(content)
    assert expected in refused(*calibrated(model, tmp_path, file, "--length", 64))


def test_calibration_file_that_is_not_there(refused, tmp_path, model):
    assert "/no/text.txt" in refused(*calibrated(model, tmp_path, "/no/text.txt", "--length", 64))


def test_length_over_the_models_maximum(refused, tmp_path, model, text):
    assert "512" in refused(*calibrated(model, tmp_path, text, "--length", 4096))


def test_out_exists_and_is_something_else(refused, tmp_path, model):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious.txt").write_text("mine")
    assert "exists and is not the result" in refused(*sparsify(model, tmp_path), out=None)
    assert (tmp_path / "out" / "precious.txt").read_text() == "mine"


def test_out_inside_model(refused, model):
    assert "lies inside MODEL" in refused("sparsify", model, model / "out", "--method", "magnitude", out=model / "out")


def test_model_inside_out(refused, tmp_path, model):
    assert "lies inside OUT" in refused("sparsify", model, tmp_path, "--method", "magnitude", out=None)


def test_out_below_a_file(refused, tmp_path, model, text):
    sentence = refused("sparsify", model, text / "out", "--method", "magnitude", out=None)
    assert "cannot write" in sentence


def test_already_quantized(refused, tmp_path, model):
    edit_config(model, quantization_config={"quant_method": "gptq", "bits": 4})
    assert "already quantized (gptq)" in refused(*sparsify(model, tmp_path))


def test_pickle_only(refused, tmp_path, model):
    (model / "model.safetensors").rename(model / "pytorch_model.bin")
    sentence = refused(*sparsify(model, tmp_path))
    assert "pickle" in sentence
    assert "save_pretrained" in sentence


def test_remote_code_without_the_flag(refused, tmp_path, model):
    edit_config(model, auto_map={"AutoModelForCausalLM": "modeling_x.X"})
    assert "--trust-remote-code" in refused(*sparsify(model, tmp_path))


def test_memory_that_cannot_be_read(refused, tmp_path, model, text):
    assert "memory 'lots'" in refused(*calibrated(model, tmp_path, text, "--length", 64, "--max-memory", "lots"))


def test_memory_that_is_too_small(refused, tmp_path, model, text):
    assert "too small" in refused(*calibrated(model, tmp_path, text, "--length", 64, "--max-memory", "1MiB"))


@pytest.mark.parametrize("device", ["cuda", "warp"])
def test_device_that_is_not_there(refused, tmp_path, model, device):
    if device == "cuda" and torch.cuda.is_available():
        pytest.skip("this machine has a CUDA device")
    assert f"device '{device}'" in refused(*sparsify(model, tmp_path, "--device", device))


def test_nothing_to_evaluate(refused, model):
    assert "nothing to evaluate" in refused("evaluate", model)


def test_report_on_a_foreign_directory(refused, model):
    assert "has no prunus.json" in refused("report", model)


def test_missing_recipe(refused, tmp_path):
    assert "cannot read recipe" in refused("run", tmp_path / "no.yaml", tmp_path / "out")


def test_unquoted_pattern_in_a_recipe(refused, tmp_path, model):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"version: 1\nmodel: {model}\nsteps:\n  - sparsify: {{method: magnitude, pattern: 2:4}}\n")
    sentence = refused("run", recipe, tmp_path / "out")
    assert "124" in sentence
    assert "quote" in sentence


@pytest.mark.parametrize(
    ("steps", "expected"),
    [
        ("[]", "not a list of steps"),
        ("[{sparsify: {sparsity: 0.5}}]", "unknown setting 'sparsity'"),
        ("[{melt: {}}]", "'melt'"),
        ("[{evaluate: {text: [builtin]}}]", "makes no model"),
        ("[{sparsify: {samples: 0}}]", "samples=0"),
        ('[{sparsify: {method: magnitude, pattern: "2:5"}}]', "2:5"),
        ("[{sparsify: {protect: ['*.no']}}]", "matches no matrix"),
    ],
)
def test_bad_recipes(refused, tmp_path, model, steps, expected):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"version: 1\nmodel: {model}\nsteps: {steps}\n")
    assert expected in refused("run", recipe, tmp_path / "out")


def test_a_gram_that_is_not_positive_definite_is_damped_and_recorded(tmp_path, model, text, capsys, monkeypatch):
    """Fewer tokens than inputs: the Gram is singular, the run goes through and says what damping it took."""
    arguments = ["prunus", "sparsify", model, tmp_path / "out", "--calibration", text, "--samples", 1, "--length", 8]
    monkeypatch.setattr("sys.argv", [*map(str, arguments), "--dtype", "float32", "--method", "sparsegpt"])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 0
    last_line = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert last_line["step"] == "sparsify"
    record = json.loads((tmp_path / "out" / "prunus.json").read_text())
    assert all(row["notes"]["damping"] > 0 for row in record["history"][-1]["matrices"])
