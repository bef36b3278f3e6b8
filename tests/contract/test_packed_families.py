"""What holds for the packed model of every family: the same function, through plain transformers, and saved again."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from fresh_process import streamed_logits
from packed_models import save_sparse, write_packed
from prunus.checkpoint import open_checkpoint
from prunus.models.families import FAMILIES
from prunus.runtime.linear import PackedLinear

NAMES = [family.family for family in FAMILIES]
TOKENS = torch.arange(48).mul(7).remainder(90).add(3).reshape(2, 24)  # more than the kernels for a few inputs take


@pytest.fixture(scope="module", params=NAMES)
def source(request, tmp_path_factory):
    return save_sparse(request.param, tmp_path_factory.mktemp("packed") / request.param)


@pytest.fixture(scope="module", params=["bf16", "int8"])
def packed(source, request, tmp_path_factory):
    return write_packed(source, tmp_path_factory.mktemp("packed") / "out", f"sparse:{request.param}")


def opened(folder):
    model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    return model


@torch.no_grad()
def logits(model, tokens=TOKENS):
    return model(tokens, use_cache=False).logits


def test_it_computes_what_its_matrices_say(packed):
    expected = streamed_logits(packed, TOKENS)
    found = logits(opened(packed))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


def test_every_matrix_is_the_one_that_was_packed(source, packed):
    before, after = open_checkpoint(source), open_checkpoint(packed)
    unchanged = before.tensors.keys() & after.tensors.keys()
    assert len(unchanged) >= len(before.tensors) - 1  # all but a stored copy of a tied head
    for name in unchanged:
        own, stored = before.read(name).to(torch.bfloat16), after.read(name)
        if name in after.packed and after.packed[name].type == "int8":
            assert not stored[own == 0].any()
            torch.testing.assert_close(stored, before.read(name), rtol=0, atol=float(stored.abs().max() / 127))
        else:
            assert torch.equal(stored, own), name


def test_saved_again_it_is_the_same(packed, tmp_path):
    model = opened(packed)
    model.save_pretrained(tmp_path)
    again = opened(tmp_path)
    assert {type(module) for module in again.modules()} >= {PackedLinear}
    assert torch.equal(logits(again), logits(model))
    assert open_checkpoint(tmp_path).packed == open_checkpoint(packed).packed
