"""With ONNX Runtime itself: tiny random models of every family that its builder knows. Skipped where it is absent."""

from dataclasses import replace

import pytest

import prunus
from families import TINY, save_tiny
from prunus.engines import find
from prunus.engines.onnxruntime import ONNXRUNTIME
from prunus.errors import UserError

pytestmark = pytest.mark.skipif(find(ONNXRUNTIME) is None, reason="needs it: prunus engines install onnxruntime")
EXACT = {
    "llama": {},
    "mistral": {"sliding_window": None},
    "qwen2": {},
    "qwen3": {},
    "gemma2": {},
    "phi3": {"original_max_position_embeddings": 256},
}


def save(folder, tokenizer, family="llama", **sizes):
    """A tiny random model of a family that reads the tokens of `tokenizer`."""
    usual = {"vocab_size": len(tokenizer), "max_position_embeddings": 256, "bos_token_id": 0, "eos_token_id": 1}
    save_tiny(replace(TINY[family], sizes={**TINY[family].sizes, **usual, **sizes}), folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("family", EXACT)
def test_a_family_is_exact(family, tmp_path, tiny_tokenizer):
    model = save(tmp_path / "model", tiny_tokenizer, family, **EXACT[family])
    step = prunus.export(model, tmp_path / "out", to="onnx").last_step
    assert step["proof"]["kl"] < 1e-6
    assert step["proof"]["greedy"]["equal"] == 32


@pytest.mark.parametrize("family", [one for one in TINY if one not in {*EXACT, "gpt2"} - {"mistral"}])
def test_another_family_is_refused(family, tmp_path, tiny_tokenizer):
    model = save(tmp_path / "model", tiny_tokenizer, family)
    with pytest.raises(UserError, match=r"onnxruntime|ONNX|onnx"):
        prunus.export(model, tmp_path / "out", to="onnx")
    assert not (tmp_path / "out").exists()
