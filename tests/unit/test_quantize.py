"""`prunus.quantize` on tiny models: zeros, sizes, reading back, and what plain transformers makes of the directory."""

import importlib.util
import json

import pytest
import torch
from safetensors import safe_open

import prunus
from families import TINY, save_tiny
from fresh_process import fresh_logits, run_fresh, streamed_logits
from prunus.checkpoint import open_checkpoint
from prunus.errors import UserError
from prunus.models import open_model
from prunus.quantizing import SCHEMES

CALIBRATED = {"calibration": ["builtin"], "samples": 4, "length": 32}
METHODS = {"rtn": {"method": "rtn"}, "gptq": {"method": "gptq", **CALIBRATED}}
SMALL = [name for name, scheme in SCHEMES.items() if scheme.group in (None, 32)]  # that tiny widths bear
PROVED = [("llama", scheme) for scheme in SMALL]
PROVED += [("qwen2", "int8"), ("olmo2", "int8"), ("opt", "int8"), ("gemma3_text", "w8a8"), ("phi3", "fp8")]
needs_extra = pytest.mark.skipif(
    importlib.util.find_spec("compressed_tensors") is None, reason="needs the extra 'quantize' (compressed-tensors)"
)
DENSE_NEXT = """
import json, sys, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[2], dtype=torch.float32).eval()
with torch.no_grad():
    torch.save(model(torch.tensor(json.loads(sys.argv[1]))).logits, sys.argv[2] + ".logits")
assert "prunus" not in sys.modules
"""


@pytest.fixture(scope="module")
def pruned(tiny_llama_dir, tmp_path_factory):
    out = tmp_path_factory.mktemp("pruned") / "model"
    return prunus.sparsify(tiny_llama_dir, out, method="magnitude", pattern="0.5").path


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("scheme", SMALL)
def test_zeros_stay_and_sizes_are_those_on_disk(pruned, tmp_path, scheme, method):
    run = prunus.quantize(pruned, tmp_path / "out", scheme=scheme, **METHODS[method])
    step, before, after = run.last_step, open_checkpoint(pruned), open_checkpoint(run.path)
    assert set(after.tensors) == set(before.tensors)
    for row in step["matrices"]:
        assert row["zeros_after"] >= row["zeros_before"] > 0
        name = f"{row['name']}.weight"
        found = after.read(name)
        assert not found[before.read(name) == 0].any()
        assert int((found == 0).sum()) == row["zeros_after"]
    assert torch.equal(after.read("model.norm.weight"), before.read("model.norm.weight"))
    on_disk = 0
    for file in run.path.glob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            tensors = [opened.get_tensor(name) for name in opened.keys()]  # noqa: SIM118 it is no dict
        on_disk += sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    assert step["bytes"]["after"] == on_disk == after.num_bytes
    assert prunus.quantize(pruned, tmp_path / "out", scheme=scheme, **METHODS[method]).reused


def test_joint_zeroes_as_many_as_the_pattern_says(tiny_llama_dir, tmp_path):
    asked = {"scheme": "int8", "method": "gptq", "joint": True, **CALIBRATED}
    run = prunus.quantize(tiny_llama_dir, tmp_path / "out", pattern="2:4", **asked)
    checkpoint = open_checkpoint(run.path)
    for row in run.last_step["matrices"]:
        groups = checkpoint.read(f"{row['name']}.weight").reshape(-1, 4)
        assert ((groups == 0).sum(1) >= 2).all()
        assert row["sparsity"] >= 0.5


@pytest.mark.parametrize("scheme", SMALL)
def test_a_quantized_model_is_evaluated(tiny_llama_dir, tmp_path, scheme):
    run = prunus.quantize(tiny_llama_dir, tmp_path / "out", scheme=scheme)
    (result,) = prunus.evaluate(
        run.path, text=["builtin"], length=32, windows=2, against=str(tiny_llama_dir), dtype="float32"
    )
    assert 0 < result["against"]["kl"] < 0.5


@needs_extra
@pytest.mark.parametrize(
    ("family", "scheme"),
    PROVED,
)
def test_plain_transformers_computes_the_same(tmp_path, family, scheme):
    model = save_tiny(TINY[family], tmp_path / "model")
    if not all(SCHEMES[scheme].fits(linear.shape[1]) for _, linear in open_model(model).spec.matrices):
        pytest.skip("the tiny model's widths are no multiples of the scheme's groups")
    run = prunus.quantize(model, tmp_path / "out", scheme=scheme)
    tokens_NT = torch.randint(3, 90, (2, 12), generator=torch.Generator().manual_seed(0))
    run_fresh(DENSE_NEXT, json.dumps(tokens_NT.tolist()), run.path)
    torch.testing.assert_close(fresh_logits(run.path), streamed_logits(run.path, tokens_NT), rtol=1e-3, atol=2e-3)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"scheme": "int3"}, "unknown scheme 'int3'; allowed are int8, w8a8"),
        ({"scheme": "gguf:q4_k_m"}, "make it with `prunus export MODEL OUT --to gguf:q4_k_m`"),
        ({"scheme": "int8", "method": "awq"}, "unknown method 'awq' of quantizing; allowed are rtn, gptq"),
        ({"scheme": "int8", "method": "gptq"}, "looks at calibration text: give --calibration"),
        ({"scheme": "int8", "calibration": ["builtin"]}, "looks at weights alone: leave --calibration out"),
        ({"scheme": "int8", "joint": True}, "--joint and --pattern go together"),
        ({"scheme": "int8", "joint": True, "pattern": "0.5"}, "'rtn' does not: add --method gptq"),
        ({"scheme": "int4-g128"}, r"rows of \d+ weights, no multiple of the 128 .*schemes that fit: int8"),
    ],
)
def test_bad_input_is_one_sentence(tiny_llama_dir, tmp_path, settings, message):
    with pytest.raises(UserError, match=message):
        prunus.quantize(tiny_llama_dir, tmp_path / "out", **settings)
    assert not (tmp_path / "out").exists()


def test_a_quantized_model_is_not_pruned_again(tiny_llama_dir, tmp_path):
    run = prunus.quantize(tiny_llama_dir, tmp_path / "out", scheme="int8")
    for call in (prunus.sparsify, prunus.shrink, prunus.recover):
        more = {prunus.shrink: {"ffn": 0.5}, prunus.recover: {"data": ["builtin"], "tokens": 64}}.get(call, {})
        with pytest.raises(UserError, match=r"is quantized \(int8\), and its full-precision weights are gone"):
            call(run.path, tmp_path / "again", **more)


def test_transposed_matrices_are_refused_by_name(tmp_path):
    model = save_tiny(TINY["gpt2"], tmp_path / "model")
    with pytest.raises(UserError, match=r"'gpt2' stores matrices transposed .*which compressed-tensors cannot"):
        prunus.quantize(model, tmp_path / "out", scheme="int8")


def test_experts_are_not_put_where_transformers_cannot_load_them(tmp_path):
    model = save_tiny(TINY["mixtral"], tmp_path / "model")
    with pytest.raises(UserError, match=r"'mixtral' has experts, which transformers cannot load in w8a8; take int8"):
        prunus.quantize(model, tmp_path / "out", scheme="w8a8")


def test_the_command_line(tiny_llama_dir, tmp_path, prunus):
    code, printed, errors = prunus("quantize", tiny_llama_dir, tmp_path / "out", "--scheme", "int8")
    assert code == 0
    told = json.loads(printed.splitlines()[-1])
    assert (told["step"], told["scheme"], told["method"]) == ("quantize", "int8", "rtn")
    assert "MB of weights" in errors
