"""Pruned models in ONNX Runtime and OpenVINO themselves: exported, proved, benched. Skipped where they are absent."""

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

import prunus
from prunus.engines import ONNXRUNTIME, OPENVINO, find

CALIBRATION = {"calibration": ["builtin"], "samples": 4, "length": 32}


@pytest.fixture(params=[("onnx", ONNXRUNTIME), ("openvino", OPENVINO)], ids=lambda one: one[0])
def to(request):
    name, engine = request.param
    if find(engine) is None:
        pytest.skip(f"needs it: prunus engines install {engine.name}")
    return name


@pytest.fixture(scope="module")
def dense(tmp_path_factory, tiny_tokenizer):
    """SmolLM2's shape, small: grouped queries, tied embeddings."""
    folder = tmp_path_factory.mktemp("graphs") / "dense"
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 4, "max_position_embeddings": 256}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True}
    config = LlamaConfig(vocab_size=len(tiny_tokenizer), bos_token_id=0, eos_token_id=1, **sizes, **heads)
    config.initializer_range = 0.2
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def pruned(dense, tmp_path_factory):
    """Where each kind of pruned model lies."""
    folder = tmp_path_factory.mktemp("pruned")
    prunus.shrink(dense, folder / "narrow", ffn=128, multiple_of=32, **CALIBRATION)
    prunus.shrink(dense, folder / "fewer-heads", kv_groups=1, **CALIBRATION)
    prunus.shrink(dense, folder / "shallow", layers=2, **CALIBRATION)
    return folder


@pytest.mark.parametrize("kind", ["narrow", "fewer-heads", "shallow"])
def test_a_pruned_model_is_exact_in_the_engine(to, pruned, tmp_path, kind):
    step = prunus.export(pruned / kind, tmp_path / "out", to=f"{to}:f32").last_step
    assert step["proof"]["kl"] < 1e-5
    assert step["parameters"] == AutoModelForCausalLM.from_pretrained(pruned / kind).num_parameters()


def test_a_narrow_model_is_benched_against_the_dense_one(to, dense, pruned, tmp_path):
    run = prunus.export(pruned / "narrow", tmp_path / "out", to=f"{to}:f32")
    told = prunus.bench(run.path, against=str(dense), prompt_tokens=16, new_tokens=4, repetitions=2, threads=1)
    assert told["model"]["parameters"] < told["dense"]["parameters"]
    assert told["model"]["decode_bytes_per_token"] < told["dense"]["decode_bytes_per_token"]
    assert told["model"]["tpot_seconds"]["count"] == 6
