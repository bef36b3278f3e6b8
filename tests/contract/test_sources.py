"""Whatever a source is said to make, it can make smaller: the model stays the same function, bit for bit."""

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

import prunus
from families import TINY, save_tiny
from prunus.calibration import StreamedSource
from prunus.checkpoint import open_checkpoint
from prunus.models.families import Family
from prunus.models.sources import find_sources
from prunus.models.streamed import open_model

ATTENTION, FFN = {"q_proj", "k_proj", "v_proj"}, {"gate_proj", "up_proj"}
LLAMA = ATTENTION | FFN | {"down_proj"}
SCALED = {  # whose inputs can be scaled; every other matrix reads what others read too, or what no weight makes
    "llama": LLAMA,
    "mistral": LLAMA,
    "qwen2": LLAMA,
    "qwen3": LLAMA,
    "gemma2": {"down_proj"},  # its norms multiply by 1 + w
    "gemma3_text": {"down_proj"},
    "phi3": {"qkv_proj", "gate_up_proj"},  # up is a part of a matrix
    "olmo2": {"down_proj"},  # its norms stand behind the matrices
    "gpt2": set(),
    "gpt_neox": {"query_key_value", "dense_h_to_4h"},
    "opt": {*ATTENTION, "fc1"},
    "mixtral": ATTENTION,  # the router reads what the experts read
    "qwen3_moe": LLAMA,  # those of its dense layers
    "olmoe": ATTENTION,
}
TOKENS = torch.randint(3, 128, (2, 16), generator=torch.Generator().manual_seed(0))
TEXT = "The quick brown fox jumps over the lazy dog and goes home. " * 40


@pytest.mark.parametrize("family", TINY)
def test_what_is_scaled_and_made_up_for_changes_nothing(family, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(save_tiny(TINY[family], tmp_path / "model")).eval()
    sources = find_sources(model.config)
    assert {name.rpartition(".")[2] for name in sources} == SCALED[family]
    with torch.no_grad():
        before = model(TOKENS).logits
        for source in set(sources.values()):
            scale(model, source)
        after = model(TOKENS).logits
    assert torch.equal(before, after)
    assert not sources or not same_weights(model, tmp_path / "model")


def scale(model, source):
    """By random powers of two."""
    width = model.get_parameter(source.parameters[0]).shape[0]
    scale_I = torch.exp2(torch.randint(-3, 4, (width,), generator=torch.Generator().manual_seed(width)).float())
    for name in source.parameters:
        parameter = model.get_parameter(name)
        parameter /= scale_I.reshape(-1, *[1] * (parameter.ndim - 1))
    for name in source.readers:
        model.get_submodule(name).weight.mul_(scale_I)


def same_weights(model, directory):
    other = AutoModelForCausalLM.from_pretrained(directory).state_dict()
    return all(torch.equal(tensor, other[name]) for name, tensor in model.state_dict().items())


def test_another_reader_makes_it_no_source(monkeypatch, tmp_path):
    config = AutoModelForCausalLM.from_pretrained(save_tiny(TINY["llama"], tmp_path / "model")).config
    plain = find_sources(config)
    forward = nn.Linear.forward

    def read_twice(self, x):
        return forward(self, x) + 0 * x.sum()

    monkeypatch.setattr(nn.Linear, "forward", read_twice)
    assert plain
    assert not find_sources(config)


def streamed_logits(directory):
    source = StreamedSource(open_model(directory), max_memory=None)
    return source.logits(TOKENS, source.final_hidden(TOKENS, "Block by block"))


@pytest.mark.parametrize("family", ["llama", "qwen2", "opt", "phi3"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_quantized_model_is_the_dense_one_with_rounded_weights(family, dtype, tmp_path, tiny_tokenizer):
    made = TINY[family]
    sizes = {**made.sizes, "vocab_size": len(tiny_tokenizer)}
    dense = save_tiny(Family(family, family, "", sizes, made.own_names), tmp_path / "dense", dtype)
    tiny_tokenizer.save_pretrained(dense)
    half = prunus.sparsify(dense, tmp_path / "half", method="magnitude", dtype="float32").path
    (tmp_path / "text.txt").write_text(TEXT)
    text = {"calibration": (str(tmp_path / "text.txt"),), "samples": 4, "length": 32, "dtype": "float32"}
    run = prunus.quantize(half, tmp_path / "out", scheme="int8", method="awq", **text)
    before, after = open_checkpoint(half), open_checkpoint(run.path)
    rows = {row["name"]: row for row in run.last_step["matrices"]}
    scaled = {name.rpartition(".")[2] for name, row in rows.items() if row["notes"]["inputs_scaled"]}
    assert scaled == SCALED[family]
    for name in rows:
        old_OI, new_OI = before.read(f"{name}.weight").float(), after.read(f"{name}.weight").float()
        assert torch.equal(old_OI == 0, (new_OI == 0) & (old_OI == 0))
    assert not all(torch.equal(before.read(name), after.read(name)) for name in before.tensors if "norm" in name)
    logits = [streamed_logits(path) for path in (half, run.path)]
    torch.testing.assert_close(logits[0], logits[1], rtol=0, atol=0.05 * float(logits[0].abs().max()))
