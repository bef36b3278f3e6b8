"""One token through a whole block by the kernels: what the block's own code gives, on every instruction set."""

import copy
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from itertools import pairwise, product
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from native_levels import NATIVE, native, needs_kernels, the_best_level_afterwards  # noqa: F401
from packed_case import CASES
from packed_models import save_sparse, write_packed
from prunus.models.families import FAMILIES
from prunus.runtime import TYPES, pack
from prunus.runtime.block import BlockDecoder
from prunus.runtime.linear import PackedLinear, gather, optimize_decoding
from prunus.runtime.timing import random_matrix

TAKEN = {"llama": 3, "mistral": 3, "qwen2": 3, "qwen3": 3, "qwen3_moe": 1}  # blocks of three that ours stands in for
# widths that are a multiple of nothing: hidden, FFN, heads, groups, of a head
SIZES = ((48, 52, 4, 2, 12), (40, 130, 4, 1, 10), (64, 96, 4, 4, 16), (20, 7, 1, 1, 2))
PATTERNS = {"dense": "0", "bitmask": "0.5", "2:4": "2:4", "tiles": "tiles-0.5"}
OFF = {torch.float32: 1e-5, torch.bfloat16: 2.0**-6}  # of the largest number that comes out
ROUNDED = 0.02  # the same, where inputs are rounded to int8: a neighbour more or less
pytestmark = needs_kernels


def _model(
    family: str = "llama",
    layout: str = "bitmask",
    kind: str = "bf16",
    dtype: torch.dtype = torch.float32,
    sizes: tuple[int, ...] = SIZES[0],
) -> Any:
    """Two random blocks, packed; norms and biases are random too."""
    torch.manual_seed(0)
    names = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim")
    config = CONFIG_MAPPING[family](
        vocab_size=32, num_hidden_layers=2, max_position_embeddings=64, **dict(zip(names, sizes, strict=True))
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval().requires_grad_(False)
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.add_(0.3 * torch.randn_like(parameter))
    for seed, (name, module) in enumerate([*model.model.layers.named_modules()]):
        if isinstance(module, nn.Linear):
            packed = _linear(*module.weight.shape, layout, kind, seed)
            packed.bias = None if module.bias is None else module.bias.bfloat16()
            model.model.layers.set_submodule(name, packed)
    model.to(dtype)
    optimize_decoding(model)
    return model


def _linear(rows: int, columns: int, layout: str = "bitmask", kind: str = "bf16", seed: int = 0) -> PackedLinear:
    weight_OI = random_matrix(rows, columns, PATTERNS[layout], seed)
    packed = pack(weight_OI, layout, TYPES[kind])
    assert packed is not None
    return PackedLinear.holding(packed)


def _decoder(model: Any, index: int = 0) -> BlockDecoder:
    found = model.model.layers[index].__dict__["forward"]
    assert isinstance(found, BlockDecoder)
    return found


def _stands_in(model: Any) -> list[bool]:
    decoders = [one.__dict__.get("forward") for one in model.modules()]
    return [one.stands_in for one in decoders if isinstance(one, BlockDecoder)]


def _plain(model: Any) -> Any:
    """A copy whose blocks run their own code."""
    other = copy.deepcopy(model)
    for module in other.modules():
        if isinstance(module.__dict__.get("forward"), BlockDecoder):
            del module.__dict__["forward"]
    return other


def _last(model: Any, texts: int = 1, tokens: int = 3) -> Tensor:
    """Hidden states of the last of a few tokens that come one by one; the first of several texts is padded."""
    ids = torch.arange(texts * 12).mul(7).remainder(31).add(1).view(texts, 12)
    mask = torch.ones_like(ids)
    mask[0, :4] = texts == 1
    past = None
    with nullcontext() if torch.is_inference_mode_enabled() else torch.no_grad():
        for first, end in ((0, 12 - tokens), *((one, one + 1) for one in range(12 - tokens, 12))):
            found = model.model(ids[:, first:end], attention_mask=mask[:, :end], past_key_values=past, use_cache=True)
            past = found.past_key_values
    return torch.as_tensor(found.last_hidden_state)


def _check_equal(model: Any, dtype: torch.dtype, kind: str = "bf16", texts: int = 1) -> None:
    expected, found = _last(_plain(model), texts), _last(model, texts)
    off = ROUNDED if kind == "int8" else OFF[dtype]
    assert all(_stands_in(model))
    assert (found - expected).abs().max() <= off * expected.abs().max()


@pytest.mark.parametrize("dtype", OFF)
@pytest.mark.parametrize("level", NATIVE)
def test_every_size_and_kind_of_norm_and_bias(level: str, dtype: torch.dtype) -> None:
    native().use_level(level)
    for family, sizes in product(("llama", "qwen2", "qwen3"), SIZES):
        _check_equal(_model(family, dtype=dtype, sizes=sizes), dtype, texts=3)


@pytest.mark.parametrize("dtype", OFF)
@pytest.mark.parametrize(("layout", "kind"), CASES)
def test_every_layout_and_type(layout: str, kind: str, dtype: torch.dtype) -> None:
    _check_equal(_model("qwen2", layout, kind, dtype), dtype, kind)


@pytest.mark.parametrize("family", [one.family for one in FAMILIES])
def test_a_family_generates_what_its_own_code_does(family: str, tmp_path) -> None:  # type: ignore[no-untyped-def]
    """Whether ours stands in for its blocks or leaves them alone; two texts, one padded, past a sliding window."""
    packed = write_packed(save_sparse(family, tmp_path / "model"), tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(packed, dtype=torch.float32)
    tokens = torch.arange(24).mul(7).remainder(90).add(3).reshape(2, 12)
    mask = torch.ones_like(tokens)
    mask[0, :5] = 0
    asked = {"attention_mask": mask, "max_new_tokens": 24, "do_sample": False, "pad_token_id": 0}
    scored = {"output_scores": True, "return_dict_in_generate": True}
    found, expected = (one.generate(tokens, **asked, **scored) for one in (model, _plain(model)))
    assert sum(_stands_in(model)) == TAKEN.get(family, 0)
    assert torch.equal(found.sequences, expected.sequences)
    assert torch.allclose(torch.stack(found.scores), torch.stack(expected.scores), atol=1e-4)


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_both_ways_without_gradients(mode: type[torch.no_grad]) -> None:
    model = _model()
    with mode():
        found = _last(model)
    assert all(_stands_in(model))
    assert torch.allclose(found, _last(_plain(model)), atol=1e-4)


def test_a_first_token_without_a_prompt() -> None:
    """Matrices that nobody has looked at yet are looked at before the trial, and not in it."""
    model = _model()
    gather(model)
    with torch.no_grad():
        model(torch.zeros(1, 1, dtype=torch.int64), use_cache=True)
    assert all(_stands_in(model))


def test_what_others_call_is_not_taken_for_the_trials() -> None:
    model = _model()
    mlp = model.model.layers[0].mlp

    def meanwhile(mlp: Any, x: Tensor) -> Tensor:
        with ThreadPoolExecutor(1) as other:
            other.submit(mlp.gate_proj, x.detach()).result()
        return mlp(x)  # type: ignore[no-any-return]

    model.model.layers[0].mlp = _Changed(mlp, meanwhile)
    expected = _last(model)
    assert _stands_in(model) == [True, True]
    model.model.layers[0].mlp = mlp
    assert torch.allclose(_last(model), expected, atol=1e-4)


def test_many_callers_at_once_from_the_first_token_on() -> None:
    model = _model()
    expected = _last(_plain(model))
    with ThreadPoolExecutor(8) as callers:
        found = list(callers.map(lambda _: _last(model), range(24)))
    assert all(torch.allclose(one, expected, atol=1e-4) for one in found)
    assert all(_stands_in(model))


def test_threads_do_not_change_it() -> None:
    model, found, threads = _model(dtype=torch.bfloat16), [], torch.get_num_threads()
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        found.append(_last(model))
    torch.set_num_threads(threads)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


class _Changed(nn.Module):
    """Does something else with a module."""

    def __init__(self, inner: nn.Module, forward: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.inner, self.changed = inner, forward

    def forward(self, x: Tensor) -> Tensor:
        return self.changed(self.inner, x)


def _clips(block: Any) -> None:
    block.mlp = _Changed(block.mlp, lambda mlp, x: mlp(x).clamp(-1e9, 1e9))


def _multiplies(block: Any) -> None:
    block.mlp = _Changed(block.mlp, lambda mlp, x: mlp(x) * 1.001)


def _has_a_scale_nobody_knows(block: Any) -> None:
    block.self_attn.scaling = 1


def _gates_by_another_function(block: Any) -> None:
    block.mlp.act_fn = nn.GELU()


def _adds_a_matrix(block: Any) -> None:
    block.mlp.down_proj = nn.Sequential(block.mlp.down_proj, nn.Linear(48, 48))


def _has_a_norm_nobody_knows(block: Any) -> None:
    del block.input_layernorm.variance_epsilon
    norm = block.input_layernorm
    block.input_layernorm = _Changed(norm, lambda _, x: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * 1.0)


def _keeps_a_matrix_dense(block: Any) -> None:
    block.mlp.up_proj = nn.Linear(48, 52, bias=False)


def _gates_the_other_one(block: Any) -> None:
    """As many operations of each kind, and another result."""
    block.mlp = _Changed(block.mlp, lambda mlp, x: mlp.down_proj(mlp.gate_proj(x) * mlp.act_fn(mlp.up_proj(x))))


@pytest.mark.parametrize(
    "change",
    [
        _clips,
        _multiplies,
        _has_a_scale_nobody_knows,
        _gates_by_another_function,
        _adds_a_matrix,
        _has_a_norm_nobody_knows,
        _keeps_a_matrix_dense,
        _gates_the_other_one,
    ],
)
def test_a_block_of_another_kind_is_left_alone(change) -> None:  # type: ignore[no-untyped-def]
    model = _model()
    change(model.model.layers[1])
    assert torch.allclose(_last(model), _last(_plain(model)), atol=1e-4)
    assert _stands_in(model) == [True, False]


def _is_called_again(model: Any, expected: Tensor) -> bool:
    """Whether the block runs its own code: its MLP is asked."""
    asked = []
    handle = model.model.layers[0].mlp.register_forward_hook(lambda *_: asked.append(1))
    found = _last(model)
    handle.remove()
    assert torch.allclose(found, expected, atol=1e-4)
    return len(asked) == 4  # the prompt, and three tokens


def test_who_looks_into_a_block_sees_it_run() -> None:
    """And nothing else: a block is not tried while somebody looks."""
    model = _model()
    assert _is_called_again(model, _last(_plain(model)))
    assert not _stands_in(model)[0]
    expected = _last(model)
    assert all(_stands_in(model))
    assert _is_called_again(model, expected)
    assert all(_stands_in(model))


def test_what_changes_in_a_block_counts() -> None:
    """A norm in place and elsewhere, a matrix, a module: each is seen at the next token."""
    model = _model(layout="dense")
    found = [_last(model)]
    block = model.model.layers[0]
    block.input_layernorm.weight.mul_(2)
    found.append(_last(model))
    block.input_layernorm.weight = nn.Parameter(block.input_layernorm.weight * 2, requires_grad=False)
    found.append(_last(model))
    block.post_attention_layernorm.weight.data = block.post_attention_layernorm.weight * 2
    found.append(_last(model))
    block.self_attn.v_proj = _linear(24, 48, "dense", seed=99)
    found.append(_last(model))
    block.mlp.up_proj.load_state_dict(block.mlp.gate_proj.state_dict())
    found.append(_last(model))
    assert all(_stands_in(model))
    assert all(not torch.allclose(one, other, atol=1e-3) for one, other in pairwise(found))
    assert torch.allclose(found[-1], _last(_plain(model)), atol=1e-4)


def test_another_dtype_is_another_plan() -> None:
    model = _model(dtype=torch.bfloat16)
    _last(model)
    model.float()
    _check_equal(model, torch.float32)


def test_a_copy_is_on_its_own() -> None:
    model = _model()
    expected = _last(model)
    other = copy.deepcopy(model)
    assert _decoder(other).block is other.model.layers[0]
    other.model.layers[0].input_layernorm.weight.mul_(2)
    assert not torch.allclose(_last(other), expected, atol=1e-3)
    assert torch.equal(_last(model), expected)


@pytest.mark.parametrize("how", ["training", "gradient", "autocast", "eager", "many texts", "no cache"])
def test_everything_else_is_the_blocks_own(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = _model()
    monkeypatch.setattr(BlockDecoder, "_plan_for", lambda *_: pytest.fail("it was not to stand in"))
    ids = torch.ones(17 if how == "many texts" else 1, 1, dtype=torch.long)
    model.train(how == "training")
    if how == "eager":
        monkeypatch.undo()
        model.set_attn_implementation("eager")
    with torch.set_grad_enabled(how == "gradient"), torch.autocast("cpu", enabled=how == "autocast"):
        found = model.model(ids, use_cache=how != "no cache").last_hidden_state
    assert found.isfinite().all()
