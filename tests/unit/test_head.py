"""The output head is left alone unless it is asked for, and refused where it is the embedding too."""

import pytest
import torch
from transformers import AutoModelForCausalLM

import prunus
from families import TINY, save_tiny
from prunus.calibration import HiddenStates, Recorder, embed_all, hidden_shape
from prunus.errors import UserError
from prunus.models import open_model
from prunus.sparsity import METHODS, Unstructured, prune

TOKENS = torch.randint(3, 128, (2, 16), generator=torch.Generator().manual_seed(3))


@pytest.fixture
def untied(tmp_path):
    return save_tiny(TINY["llama"], tmp_path / "model")


def weight_of(directory, name):
    return open_model(directory).checkpoint.read(name)


def zeros(directory):
    return float((weight_of(directory, "lm_head.weight") == 0).float().mean())


def same_embedding(one, two):
    return torch.equal(*(weight_of(directory, "model.embed_tokens.weight") for directory in (one, two)))


def test_left_alone_unless_asked_for(untied, tmp_path):
    run = prunus.sparsify(untied, tmp_path / "out", method="magnitude")
    assert zeros(run.path) == 0
    assert same_embedding(run.path, untied)


def test_pruned_when_asked_for(untied, tmp_path):
    run = prunus.sparsify(untied, tmp_path / "out", method="magnitude", head=True, overrides={"lm_head": "0.25"})
    assert zeros(run.path) == 0.25
    assert same_embedding(run.path, untied)
    assert run.last_step["matrices"][-1]["name"] == "lm_head"


def test_a_tied_head_is_refused(tmp_path):
    with pytest.raises(UserError, match="tied to the embedding"):
        prunus.sparsify(save_tiny(TINY["qwen3"], tmp_path / "m"), tmp_path / "out", method="magnitude", head=True)


def test_its_statistics_are_those_of_its_inputs(untied):
    """Wanda on the head equals Wanda on what a plain forward pass feeds it."""
    model = open_model(untied)
    hidden = HiddenStates(hidden_shape(model, TOKENS), model.dtype)
    embed_all(model, TOKENS, hidden)
    for index in range(len(model.spec.blocks)):
        model.load_block(index)
        for n in range(len(TOKENS)):
            hidden[n] = model.run_block(index, hidden[n])
    recorder, seen = Recorder(("input_sq_norm",)), []
    for n in range(len(TOKENS)):
        recorder.add(model.head_inputs(TOKENS[n : n + 1], hidden[n]))
    whole = AutoModelForCausalLM.from_pretrained(untied, dtype=torch.float32)
    whole.lm_head.register_forward_pre_hook(lambda _m, args: seen.append(args[0].flatten(0, -2)))
    with torch.no_grad():
        whole(TOKENS)
    expected = torch.cat(seen).square().mean(0)
    statistics = recorder.statistics()
    torch.testing.assert_close(statistics.sq_norm(), expected, rtol=1e-4, atol=1e-5)
    result = prune(METHODS["wanda"], whole.lm_head.weight.data, statistics, Unstructured(0.5, "row"))
    assert int((result.weight_OI == 0).sum()) == result.weight_OI.numel() // 2
