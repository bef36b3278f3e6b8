"""Every tested family in every scheme that it takes, with zeros: loaded by plain transformers in a fresh process, it
computes what the streamed model computes, and what the codes and scales say."""

import itertools
import json

import pytest
import torch
from safetensors.torch import load_file

from families import TINY, save_tiny
from fresh_process import fresh_logits, save_logits, streamed_logits
from prunus.checkpoint import open_checkpoint
from prunus.errors import UserError
from prunus.models import open_model
from prunus.models.families import Family
from prunus.steps.profile import describe
from prunus.steps.quantize import quantize
from prunus.steps.sparsify import sparsify

TOKENS = torch.randint(3, 128, (2, 16), generator=torch.Generator().manual_seed(0))
TEXT = "The quick brown fox jumps over the lazy dog and goes home. " * 40
SCHEMES = {"int8": "rtn", "w8a8": "rtn", "int4-g32": "gptq", "fp8": "rtn"}
EXPERTS = ("mixtral", "qwen3_moe", "olmoe")
TAKEN = [
    (family, scheme)
    for family, scheme in itertools.product(TINY, SCHEMES)
    if family != "gpt2" and not (family in EXPERTS and scheme == "w8a8")
]
ROUNDED_AT_ONCE = ("opt",)  # hands its matrices all tokens in one row of rows, where compressed-tensors takes one scale


@pytest.fixture(scope="module")
def pruned(tmp_path_factory, tiny_tokenizer):
    """Of every family: a model with half of its weights zero."""
    root = tmp_path_factory.mktemp("quantized")
    (root / "text.txt").write_text(TEXT)
    for name, family in TINY.items():
        sizes = {**family.sizes, "vocab_size": len(tiny_tokenizer)}
        dense = save_tiny(Family(name, name, "", sizes, family.own_names), root / f"{name}-dense")
        tiny_tokenizer.save_pretrained(dense)
        sparsify(dense, root / name, method="magnitude", dtype="float32")
    return root


@pytest.fixture(scope="module")
def quantized(pruned):
    """The same in every scheme, and beside each directory the logits that a fresh process gets."""
    pytest.importorskip("compressed_tensors", reason="extra [quantize] is not installed")
    outs = []
    for family, scheme in TAKEN:
        method = SCHEMES[scheme]
        text = {"calibration": (str(pruned / "text.txt"),), "samples": 4, "length": 32} if method == "gptq" else {}
        out = pruned / f"{family}-{scheme}"
        outs.append(quantize(pruned / family, out, scheme=scheme, method=method, dtype="float32", **text).path)
    save_logits(outs, TOKENS)
    return pruned


@pytest.mark.parametrize(("family", "scheme"), TAKEN)
def test_plain_transformers_computes_the_same(quantized, family, scheme):
    out = quantized / f"{family}-{scheme}"
    fresh, streamed = fresh_logits(out), streamed_logits(out, TOKENS)
    if family in ROUNDED_AT_ONCE and scheme in ("w8a8", "fp8"):
        assert 0 < (fresh - streamed).abs().max() < 0.5
        return
    torch.testing.assert_close(fresh, streamed, rtol=1e-5, atol=2e-5)
    before = streamed_logits(quantized / family, TOKENS)
    assert 0 < (fresh - before).abs().max() < 0.6 * before.abs().max()


@pytest.mark.parametrize(("family", "scheme"), TAKEN)
def test_zeros_stay_and_the_rest_is_left_alone(quantized, family, scheme):
    before, after = open_checkpoint(quantized / family), open_checkpoint(quantized / f"{family}-{scheme}")
    assert set(before.tensors) == set(after.tensors)
    matrices = set(open_model(quantized / family).names.keys_of(prunable(quantized / family)))
    for name in before.tensors:
        old, new = before.read(name), after.read(name)
        if name in matrices:
            assert not new[old == 0].any()
            assert not torch.equal(old, new)
        else:
            assert torch.equal(old, new)


def prunable(directory):
    return {block.full_parameter(linear) for block, linear in open_model(directory).spec.matrices}


@pytest.mark.parametrize("family", EXPERTS)
def test_routers_are_named_as_left_dense(quantized, family):
    ignored = json.loads((quantized / f"{family}-int8" / "config.json").read_text())["quantization_config"]["ignore"]
    routers = [name for name in ignored if name.endswith("gate")]
    assert len(routers) == 3 - (family == "qwen3_moe")
    assert "lm_head" in ignored


@pytest.mark.parametrize("family", EXPERTS)
def test_a_profile_counts_experts_as_they_are_stored(quantized, family):
    dense, small = (describe(open_model(quantized / name)) for name in (family, f"{family}-int8"))
    assert 0 < small["decode_bytes_per_token"] < 0.6 * dense["decode_bytes_per_token"]


@pytest.mark.parametrize("family", EXPERTS)
def test_experts_in_w8a8_are_refused(pruned, family):
    with pytest.raises(UserError, match=r"has experts, which transformers cannot load in w8a8; take int8 or fp8"):
        quantize(pruned / family, pruned / "none", scheme="w8a8")


def test_transposed_matrices_are_refused(pruned):
    with pytest.raises(
        UserError, match=r"'gpt2' stores matrices transposed .*c_attn.* export MODEL OUT --to gguf:q8_0"
    ):
        quantize(pruned / "gpt2", pruned / "none", scheme="int8")


def test_files_hold_codes(quantized):
    tensors = {}
    for file in (quantized / "llama-int4-g32").glob("*.safetensors"):
        tensors |= load_file(file)
    name = "model.layers.0.mlp.down_proj."
    parts = {key.removeprefix(name): (t.dtype, tuple(t.shape)) for key, t in tensors.items() if key.startswith(name)}
    assert parts == {
        "weight_packed": (torch.int32, (64, 12)),
        "weight_scale": (torch.float32, (64, 3)),
        "weight_shape": (torch.int64, (2,)),
    }
