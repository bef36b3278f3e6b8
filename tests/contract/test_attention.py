"""The attention of one token, on every instruction set of this processor: against float64, and inside transformers."""

from itertools import product
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AutoModelForCausalLM

import prunus
from native_levels import NATIVE, native, needs_kernels, the_best_level_afterwards  # noqa: F401
from packed_models import save_sparse, write_packed
from prunus.runtime import attention
from prunus.runtime.attention import NAME, WIDEST

HEADS = ((1, 1), (4, 4), (9, 3), (7, 1), (12, 2))  # and the groups that share keys and values
SHAPES = ((1, 64), (5, 20), (127, 33), (128, 64), (129, 1), (300, 80), (400, WIDEST))  # positions, width of a head
ROUNDED = {torch.float32: 0.0, torch.bfloat16: 2.0**-8}  # of a result, relative
OFF = 1e-5  # scores go up to 30, and the softmax makes of their rounding errors relative ones
pytestmark = needs_kernels


def _tensors(heads: int, groups: int, positions: int, width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Of two texts. Keys and values are views of a longer cache, queries of all that a token projects."""
    torch.manual_seed(positions * width + heads)
    cache = torch.randn(2, 2, groups, positions + 3, width, dtype=dtype)
    query = torch.randn(2, 1, heads + 2, width, dtype=dtype).transpose(1, 2)[:, :heads]
    return query, *(one[:, :, :positions] for one in cache)  # type: ignore[return-value]


def _mask(positions: int) -> Tensor:
    """(2, 1, 1, T) as transformers makes it: the first text looks at few, the second at all but its padding."""
    mask = torch.ones(2, 1, 1, positions, dtype=torch.bool)
    mask[0, ..., : positions - 1] = torch.rand(positions - 1) > 0.8
    mask[1, ..., : positions // 2] = False
    return mask


@pytest.mark.parametrize("dtype", ROUNDED)
@pytest.mark.parametrize("level", NATIVE)
def test_against_float64(level: str, dtype: torch.dtype) -> None:
    native().use_level(level)
    for (heads, groups), (positions, width) in product(HEADS, SHAPES):
        query, key, value = _tensors(heads, groups, positions, width, dtype)
        for mask, scale in ((None, None), (_mask(positions), 0.5)):
            wide = [one.double() for one in (query, key, value)]
            expected = scaled_dot_product_attention(*wide, attn_mask=mask, scale=scale, enable_gqa=True)
            found, _ = attention.attention(SimpleNamespace(), query, key, value, mask, scaling=scale)  # type: ignore[arg-type]
            off = (found.transpose(1, 2).double() - expected).abs()
            about = f"{heads} heads, {groups} groups, {positions} x {width}, {'' if mask is None else 'masked'}"
            assert found.shape == (2, 1, heads, width), about
            assert (off <= OFF + ROUNDED[dtype] * expected.abs()).all(), f"{about}: off by {off.max():.2g}"


def test_scores_far_apart_and_places_where_nobody_looks() -> None:
    """Softmax is relative to the largest score, wherever it comes; -infinity alone gives zeros."""
    key = torch.zeros(1, 1, 300, 16)
    key[..., 0] = torch.linspace(-500, 500, 300)
    value = torch.arange(300.0).view(1, 1, 300, 1).expand(-1, -1, -1, 16).contiguous()
    for sign, largest in ((1.0, 299), (-1.0, 0)):
        query = torch.zeros(1, 1, 16).index_fill(2, torch.tensor(0), sign * 100)
        assert torch.allclose(native().attend(query, key, value, None, 1.0), torch.full((1, 1, 16), float(largest)))
    mask = torch.zeros(1, 300, dtype=torch.bool)
    assert not native().attend(query, key, value, mask, 1.0).any()
    mask[0, 200] = True  # behind a whole block of nothing, far below the scores that are not looked at
    assert torch.equal(native().attend(query, key, value, mask, 1.0), torch.full((1, 1, 16), 200.0))


@pytest.mark.parametrize("level", NATIVE)
@pytest.mark.parametrize("where", ["query", "key", "value"])
def test_what_is_no_number_stays_none(level: str, where: str) -> None:
    native().use_level(level)
    tensors = dict(zip(("query", "key", "value"), _tensors(4, 2, 200, 64, torch.float32), strict=True))
    tensors[where][0, 0, -1, 5] = torch.nan
    found = native().attend(tensors["query"][:, :, 0], tensors["key"], tensors["value"], None, 0.1)
    assert found[0, 0].isnan().any()
    assert not found[1].isnan().any()


def test_threads_do_not_change_it() -> None:
    query, key, value = _tensors(12, 2, 300, 64, torch.bfloat16)
    found, threads = [], torch.get_num_threads()
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        found.append(native().attend(query[:, :, 0], key, value, None, 0.1))
    torch.set_num_threads(threads)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


@pytest.mark.parametrize(
    "change",
    [
        *(
            "two tokens",
            "dropout",
            "gradient",
            "float16",
            "widths differ",
            "too wide",
            "position bias",
            "heads left over",
        ),
        *("float mask", "mask of each head", "short mask"),
    ],
)
def test_what_the_kernel_does_not_take_goes_to_torch(change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    width = WIDEST + 1 if change == "too wide" else 16
    query, key, value = _tensors(4, 2, 5, width, torch.float16 if change == "float16" else torch.float32)
    mask, dropout = None, 0.5 if change == "dropout" else 0.0
    others = {"position_bias": torch.zeros(1, 4, 1, 5)} if change == "position bias" else {}
    if change == "two tokens":
        query = torch.cat([query, query], 2)
    elif change == "gradient":
        query.requires_grad_()
    elif change == "float mask":
        mask = torch.zeros(2, 1, 1, 5)
    elif change == "mask of each head":
        mask = torch.ones(2, 4, 1, 5, dtype=torch.bool)
    elif change == "short mask":
        mask = torch.ones(2, 1, 1, 4, dtype=torch.bool)
    elif change == "heads left over":
        query = query[:, :3]
    elif change == "widths differ":
        value = value[..., :8]
    asked = []
    monkeypatch.setattr(attention, "sdpa_attention_forward", lambda *_args, **told: asked.append(told) or ("torch's",))
    told = attention.attention(SimpleNamespace(), query, key, value, mask, dropout=dropout, scaling=0.3, **others)  # type: ignore[arg-type]
    assert told == ("torch's",)  # type: ignore[comparison-overlap]
    assert asked == [{"dropout": dropout, "scaling": 0.3, **others}]


@pytest.fixture(scope="module", params=["llama", "qwen3", "gemma3_text", "mistral", "opt"])
def packed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("packed")
    return str(write_packed(save_sparse(request.param, folder / "model"), folder / "out"))


def test_a_packed_model_generates_with_it_what_torchs_attention_does(packed: str) -> None:
    """Two texts, one of them padded, past what a sliding window holds."""
    tokens = torch.arange(24).mul(7).remainder(90).add(3).reshape(2, 12)
    mask = torch.ones_like(tokens)
    mask[0, :5] = 0
    asked = {"attention_mask": mask, "max_new_tokens": 24, "do_sample": False, "pad_token_id": 0}
    scored = {"output_scores": True, "return_dict_in_generate": True}
    ours = AutoModelForCausalLM.from_pretrained(packed, dtype=torch.float32)
    torchs = AutoModelForCausalLM.from_pretrained(packed, dtype=torch.float32)
    torchs.set_attn_implementation("sdpa")
    assert ours.config._attn_implementation == NAME
    found, expected = ours.generate(tokens, **asked, **scored), torchs.generate(tokens, **asked, **scored)
    assert torch.equal(found.sequences, expected.sequences)
    assert torch.allclose(torch.stack(found.scores), torch.stack(expected.scores), atol=1e-4)


def test_another_attention_that_was_asked_for_is_kept(packed: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(packed, attn_implementation="eager")
    assert model.config._attn_implementation == "eager"


def test_it_is_not_written_down(packed: str, tmp_path) -> None:  # type: ignore[no-untyped-def]
    prunus.load(packed).save_pretrained(tmp_path / "saved")
    assert f'"{NAME}"' not in (tmp_path / "saved" / "config.json").read_text()
