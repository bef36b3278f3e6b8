"""With llama.cpp itself: tiny random models of several families, exported and proved. Skipped where it is absent."""

import json
import shutil

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

import prunus
from prunus.cache import cache_dir
from prunus.demo_model import NAME
from prunus.engines import find
from prunus.engines.llama_cpp import LLAMA_CPP, LlamaCpp
from prunus.errors import EngineError

TOKENIZER = cache_dir() / NAME  # a real one: the converter knows tokenizers by what they make of a text
SIZES = {
    "vocab_size": 49152,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
}
FAMILIES = {
    "llama": {"tie_word_embeddings": True},
    "qwen2": {},
    "mistral": {},
    "olmo2": {},
    "qwen3": {"tie_word_embeddings": True},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "norm_topk_prob": True},
}

pytestmark = [
    pytest.mark.skipif(find(LLAMA_CPP) is None, reason="needs llama.cpp: prunus engines install llama.cpp"),
    pytest.mark.skipif(not TOKENIZER.exists(), reason=f"needs {NAME}'s tokenizer in the cache: prunus demo"),
]


def save(folder, family="llama", **sizes):
    torch.manual_seed(0)
    config = CONFIG_MAPPING[family](**{**SIZES, **FAMILIES[family], **sizes})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter)) if parameter.ndim == 1 else parameter.mul_(5)
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "special_tokens_map.json"):
        if (TOKENIZER / name).exists():
            shutil.copyfile(TOKENIZER / name, folder / name)
    return folder


def test_requests_that_come_at_once_write_what_each_would_alone(tmp_path):
    run = prunus.export(save(tmp_path / "model"), tmp_path / "out", to="gguf:f32")
    prompts = [[(7 + 31 * i * number) % 4000 for i in range(16)] for number in (1, 2, 3)]
    with LlamaCpp(find(LLAMA_CPP)) as worker:
        worker.load(run.path / run.last_step["file"], context=32, sequences=3, threads=1)
        told = worker.ask({"do": "generate_together", "prompts": prompts, "new_tokens": 8}, timeout=60)
        alone = [
            worker.ask({"do": "generate", "prompt": prompt, "new_tokens": 8}, timeout=60)["tokens"]
            for prompt in prompts
        ]
    assert [one["tokens"] for one in told["requests"]] == alone
    assert {len(one["steps"]) for one in told["requests"]} == {7}


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "qwen2"])
def test_a_family_is_exported_and_proved(family, tmp_path):
    run = prunus.export(save(tmp_path / "model", family), tmp_path / "out", to="gguf:f16")
    step = run.last_step
    assert (run.path / step["file"]).stat().st_size == step["bytes"]
    assert sorted(file.name for file in run.path.iterdir()) == sorted([step["file"], "prunus.json"])
    assert step["proof"]["kl"] <= step["proof"]["kl_allowed"]
    assert step["proof"]["greedy"]["equal"] > 0
    assert step["engine"]["versions"]["llama-cpp-python"]
    assert prunus.export(tmp_path / "model", tmp_path / "out", to="gguf:f16").reused


def test_a_quantized_type_comes_from_the_quantizer(tmp_path):
    run = prunus.export(
        save(tmp_path / "model", hidden_size=256, intermediate_size=256), tmp_path / "out", to="gguf:q6_k"
    )
    told = run.summary()
    assert (told["step"], told["type"], told["file"]) == ("export", "q6_k", "out-q6_k.gguf")
    assert run.last_step["tensors"]["q6_k"] > 10
    assert not (run.path / "before-quantizing.gguf").exists()


@pytest.mark.parametrize("to", ["gguf:f16", "gguf:q8_0", "gguf:q6_k"])
def test_how_the_model_is_sampled_goes_along(to, tmp_path):
    model = save(tmp_path / "model", hidden_size=256, intermediate_size=256)
    said = {"temperature": 0.6, "top_k": 20, "repetition_penalty": 1.1, "eos_token_id": [2]}
    (model / "generation_config.json").write_text(json.dumps(said))
    assert prunus.export(model, tmp_path / "out", to=to).last_step["sampling"] == {
        "general.sampling.temp": pytest.approx(0.6),
        "general.sampling.top_k": 20,
        "general.sampling.penalty_repeat": pytest.approx(1.1),
        "general.sampling.penalty_last_n": -1,
    }


def test_what_the_engine_computes_otherwise_fails_the_proof(tmp_path):
    # llama.cpp takes it for granted that a Qwen 3 MoE normalises the weights of its chosen experts; this one does not
    model = save(tmp_path / "model", "qwen3_moe", norm_topk_prob=False)
    with pytest.raises(EngineError, match=r"the proof failed.*KL to transformers is"):
        prunus.export(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.partial").exists()


def test_what_the_converter_says_of_a_tokenizer_it_does_not_know_is_shown(tmp_path):
    model = save(tmp_path / "model", "qwen2")  # whose own class cuts text in another way than this tokenizer's
    with pytest.raises(EngineError, match=r"converter failed to convert; (.*\n)*.*pre-tokenizer was not recognized"):
        prunus.export(model, tmp_path / "out")
    assert not (tmp_path / "out.partial").exists()


def test_a_file_that_is_no_model_is_an_error_and_not_a_wait(tmp_path):
    (tmp_path / "torn.gguf").write_bytes(b"GGUF" + bytes(100))
    with (
        LlamaCpp(find(LLAMA_CPP)) as worker,
        pytest.raises(EngineError, match=r"failed to load: llama\.cpp cannot load"),
    ):
        worker.load(tmp_path / "torn.gguf", context=64, threads=1)
