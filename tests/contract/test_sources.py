"""Whatever a source is said to make, it can make smaller: the model stays the same function, bit for bit."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM

import prunus
from families import TINY, save_tiny
from prunus.calibration import StreamedSource
from prunus.checkpoint import open_checkpoint
from prunus.models.families import Family
from prunus.models.sources import find_sources
from prunus.models.streamed import open_model
from prunus.steps.quantize_edit import QuantizeEdit

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


def make_inputs_uneven(directory):
    """Some channels of every norm are 16 times as large, as in large trained models."""
    for file in directory.glob("*.safetensors"):
        tensors = load_file(file)
        for name in tensors:
            if "norm" in name:
                tensors[name][::8] *= 16
        save_file(tensors, file, metadata={"format": "pt"})


@pytest.mark.parametrize("family", ["llama", "qwen2", "opt", "phi3"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_is_stored_computes_what_the_pass_saw(family, dtype, tmp_path, tiny_tokenizer, monkeypatch):
    made = TINY[family]
    sizes = {**made.sizes, "vocab_size": len(tiny_tokenizer)}
    dense = save_tiny(Family(family, family, "", sizes, made.own_names), tmp_path / "dense", dtype)
    make_inputs_uneven(dense)
    tiny_tokenizer.save_pretrained(dense)
    half = prunus.sparsify(dense, tmp_path / "half", method="magnitude", dtype="float32").path
    seen = watch_fold(monkeypatch)
    (tmp_path / "text.txt").write_text(TEXT)
    text = {"calibration": (str(tmp_path / "text.txt"),), "samples": 4, "length": 32, "dtype": "float32"}
    run = prunus.quantize(half, tmp_path / "out", scheme="int8", method="awq", **text)
    before, after = open_checkpoint(half), open_checkpoint(run.path)
    rows = run.last_step["matrices"]
    assert {row["name"].rpartition(".")[2] for row in rows if row["notes"]["inputs_scaled"]} == SCALED[family]
    assert not all(torch.equal(before.read(name), after.read(name)) for name in before.tensors if "norm" in name)
    assert not any(after.read(f"{row['name']}.weight")[before.read(f"{row['name']}.weight") == 0].any() for row in rows)
    sources = find_sources(before.config)
    themselves = {source.matrix for source in sources.values()}
    for name, source in sources.items():
        if not source.matrix and f"{name}.weight" not in themselves:
            scale_I = before.read(source.parameters[0]) / after.read(source.parameters[0])
            stored = after.read(f"{name}.weight").to(dtype)
            assert torch.equal(stored, seen[f"{name}.weight"] * scale_I)
    if dtype == torch.float32:  # in bfloat16 codes times scales are read unrounded
        model = AutoModelForCausalLM.from_pretrained(half, dtype=dtype).eval()
        model.load_state_dict(seen, strict=False)
        with torch.no_grad():
            torch.testing.assert_close(streamed_logits(run.path), model(TOKENS).logits, rtol=1e-4, atol=1e-4)


def watch_fold(monkeypatch):
    """The tensors of each block as the pass left them."""
    seen, fold = {}, QuantizeEdit.fold

    def watched(edit, state):
        seen.update({name: tensor.clone() for name, tensor in state.items()})
        fold(edit, state)

    monkeypatch.setattr(QuantizeEdit, "fold", watched)
    return seen
