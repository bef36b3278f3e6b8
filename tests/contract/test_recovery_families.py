"""Families of every kind, recovered: zeros stay zeros, and plain transformers opens the result with the same logits."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from families import TINY
from fresh_process import save_logits
from prunus.checkpoint import read_record
from prunus.models import open_model
from prunus.models.families import Family
from prunus.recovery.keep_masks import matrices_of
from recovery_case import make_case, weights

# Tied and untied heads, Conv1D, fused projections, fused experts
NAMES = ("qwen3", "phi3", "gpt2", "opt", "mixtral", "gemma2")
METHODS = {
    "full": {},
    "lora": {"method": "lora", "lr": 3e-3, "lora_rank": 4},
    "block-wise": {"method": "block-wise", "loss": ("hidden",)},
}
SHORT = {"tokens": 6 * 4 * 32, "evaluate_every": 3, "patience": 0}
TOKENS = torch.randint(3, 128, (2, 24), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def recovered(tmp_path_factory):
    """By family: the case and, by method, the recovered directory with the logits that a fresh process gets from it."""
    found = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PRUNUS_CACHE", str(tmp_path_factory.mktemp("cache")))
        for name in NAMES:
            root = tmp_path_factory.mktemp(name)
            dtype = torch.bfloat16 if name == "gemma2" else torch.float32
            case = make_case(TINY[name], root, pattern="2:4", dtype=dtype)
            found[name] = case, {m: case.recover(root / m, **SHORT, **given).path for m, given in METHODS.items()}
    save_logits([path for _, made in found.values() for path in made.values()], TOKENS)
    return found


@pytest.fixture(params=NAMES)
def family(request):
    return request.param


def zeros(directory: Path) -> dict[str, torch.Tensor]:
    """Of every prunable matrix, where it is zero."""
    model = open_model(directory)
    return {
        m.name: m.linear.view(model.names.load([m.parameter], model.checkpoint.read)[m.parameter]) == 0
        for m in matrices_of(model.spec)
    }


@pytest.mark.parametrize("method", METHODS)
def test_zeros_stay_and_weights_move(recovered, family, method):
    case, made = recovered[family]
    before, after = zeros(case.sparse), zeros(made[method])
    pruned = [row["name"] for row in read_record(case.sparse)["history"][0]["matrices"]]
    assert pruned
    assert all(after[name][before[name]].all() for name in pruned)
    rows = read_record(made[method])["history"][-1]["zeros"]
    assert {row["name"]: row["after"] for row in rows} == {name: int(after[name].sum()) for name in pruned}
    old, new = weights(case.sparse), weights(made[method])
    assert {name: (t.shape, t.dtype) for name, t in new.items()} == {n: (t.shape, t.dtype) for n, t in old.items()}
    assert any(not torch.equal(new[name], old[name]) for name in old)


@pytest.mark.parametrize("method", METHODS)
def test_a_fresh_process_gets_the_same_logits(recovered, family, method):
    directory = recovered[family][1][method]
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    with torch.no_grad():
        expected = model(TOKENS).logits
    torch.testing.assert_close(torch.load(f"{directory}.logits", weights_only=True), expected, rtol=1e-4, atol=1e-4)
    original = AutoModelForCausalLM.from_pretrained(recovered[family][0].sparse, dtype=torch.float32).eval()
    with torch.no_grad():
        assert not torch.allclose(original(TOKENS).logits, expected, atol=1e-4)


def test_a_head_stored_twice_stays_tied(tmp_path):
    """Some checkpoints store a tied head beside the embedding; both copies have to be the trained one."""
    from safetensors.torch import save_file

    case = make_case(Family("llama", "tied", "", {**TINY["llama"].sizes, "tie_word_embeddings": True}), tmp_path)
    tensors = weights(case.sparse)
    for file in case.sparse.glob("*.safetensors*"):
        file.unlink()
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, case.sparse / "model.safetensors", metadata={"format": "pt"})
    new = weights(case.recover(tmp_path / "out", **SHORT).path)
    assert torch.equal(new["lm_head.weight"], new["model.embed_tokens.weight"])
    assert not torch.equal(new["lm_head.weight"], tensors["lm_head.weight"])
