"""A model that cannot be pruned is refused in one sentence, without a traceback or anything that looks finished."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BertConfig, LlamaConfig, LlamaForSequenceClassification, MambaConfig, T5Config

from families import TINY, save_tiny


def sparsify(model, tmp_path, *extra):
    return ("sparsify", model, tmp_path / "out", "--method", "magnitude", *extra)


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


def test_unreadable_index(refused, tmp_path):
    model = save_tiny(TINY["llama"], tmp_path / "sharded")
    (model / "model.safetensors.index.json").write_text("{")
    assert "is not a safetensors index" in refused(*sparsify(model, tmp_path))


def test_tensor_that_is_in_the_index_alone(refused, tmp_path):
    model = save_tiny(TINY["llama"], tmp_path / "sharded")
    index = model / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["model.ghost.weight"] = next(iter(content["weight_map"].values()))
    index.write_text(json.dumps(content))
    sentence = refused(*sparsify(model, tmp_path))
    assert "tensor model.ghost.weight is in model.safetensors.index.json but in no shard" in sentence


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


def test_already_quantized(refused, tmp_path, model):
    edit_config(model, quantization_config={"quant_method": "gptq", "bits": 4})
    assert "already quantized (gptq)" in refused(*sparsify(model, tmp_path))


def test_pickle_only(refused, tmp_path, model):
    (model / "model.safetensors").rename(model / "pytorch_model.bin")
    sentence = refused(*sparsify(model, tmp_path))
    assert "pickle" in sentence
    assert "save_pretrained" in sentence


@pytest.mark.parametrize("verb", ["sparsify", "bench", "evaluate", "profile"])
def test_a_hub_name_that_the_hub_does_not_give(refused, tmp_path, monkeypatch, verb):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    extra = {"sparsify": (tmp_path / "out",), "evaluate": ("--text", "builtin")}.get(verb, ())
    sentence = refused(verb, "models/foo", *extra)
    assert sentence.startswith("error: models/foo is neither a local directory nor a model the hub would give")


def test_missing_tokenizer(refused, tmp_path, model, text):
    for file in model.glob("tokenizer*"):
        file.unlink()
    command = ("sparsify", model, tmp_path / "out", "--method", "wanda", "--calibration", text, "--length", 32)
    assert "no usable tokenizer" in refused(*command)


def spoil_t5(model):
    save_config(T5Config(), model, "T5ForConditionalGeneration")


def spoil_bert(model):
    save_config(BertConfig(), model, "BertForMaskedLM")


def spoil_quantized(model):
    edit_config(model, quantization_config={"quant_method": "gptq", "bits": 4})


@pytest.mark.parametrize(
    ("spoil", "expected"),
    [(spoil_t5, "encoder-decoder"), (spoil_bert, "not a causal language"), (spoil_quantized, "already quantized")],
)
def test_the_verbs_that_load_a_model_whole_refuse_it_too(refused, tiny_llama_dir, model, spoil, expected):
    spoil(model)
    assert expected in refused("bench", model)
    assert expected in refused("bench", tiny_llama_dir, "--against", model, "--prompt-tokens", 8, "--new-tokens", 3)
    assert expected in refused("evaluate", tiny_llama_dir, "--against", model, "--prompt", "Once")


def test_remote_code_without_the_flag(refused, tmp_path, model):
    edit_config(model, model_type="family_of_its_own", auto_map={"AutoModelForCausalLM": "modeling_x.X"})
    assert "--trust-remote-code" in refused(*sparsify(model, tmp_path))
