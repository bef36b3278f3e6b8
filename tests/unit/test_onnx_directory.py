"""What an export to ONNX refuses from the config alone, with an engine that only looks installed."""

import pytest
from transformers import MistralConfig, MistralForCausalLM

import prunus
from fake_engine import fake_install
from prunus.engines import ONNXRUNTIME
from prunus.errors import UserError


@pytest.fixture
def model(tmp_path, monkeypatch, tiny_tokenizer):
    """Makes a tiny Mistral, and an engine that knows its architecture."""
    monkeypatch.setenv("PRUNUS_CACHE", str(tmp_path / "cache"))
    fake_install(ONNXRUNTIME, architectures=["MistralForCausalLM"])
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = MistralConfig(
        vocab_size=len(tiny_tokenizer), num_key_value_heads=2, max_position_embeddings=256, sliding_window=8, **sizes
    )
    MistralForCausalLM(config).save_pretrained(tmp_path / "model")
    tiny_tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_a_window_in_every_layer_is_refused(model, tmp_path):
    with pytest.raises(UserError, match="sees 8 tokens back, and ONNX Runtime fails at texts longer than that"):
        prunus.export(model, tmp_path / "out", to="onnx")
    assert not (tmp_path / "out").exists()


def test_a_type_that_the_engine_does_not_run_is_refused(model, tmp_path):
    with pytest.raises(UserError, match="onnx type 'f16' is not one that prunus writes; allowed are f32, int8, int4"):
        prunus.export(model, tmp_path / "out", to="onnx:f16")
