"""The module with a packed matrix, by itself: products, gradients, compilation, copies, moves."""

import copy

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from prunus.errors import UserError
from prunus.runtime import LAYOUTS, TYPES, pack, unpack
from prunus.runtime.choose import choose_layout, pack_cheapest
from prunus.runtime.entry import BIAS, SCALE, Entry
from prunus.runtime.linear import PackedLinear, gather
from prunus.runtime.operator import packed_linear

ROWS, COLUMNS = 37, 52


def matrix(layout, rows=ROWS, columns=COLUMNS):
    """A random matrix whose zeros fit the layout."""
    torch.manual_seed(0)
    weight = torch.randn(rows, columns).to(torch.bfloat16).float()
    if layout == "bitmask":
        weight *= torch.rand_like(weight) > 0.6
    if layout == "2:4":
        weight *= torch.tensor([1.0, 0, 0, 1]).repeat(columns // 4)
    if layout == "tiles":
        weight[16:32, : columns // 2] = 0
    return weight


def module(packed, bias=None):
    """As a loaded file leaves it."""
    sizes = {"rows": packed.rows, "columns": packed.columns, "values": packed.parts["weight"].numel()}
    kind = next(name for name, dtype in TYPES.items() if dtype == packed.dtype)
    made = PackedLinear(Entry(layout=packed.layout, type=kind, bias=bias is not None, **sizes))
    tensors = {**packed.parts, SCALE: packed.scale_O, BIAS: bias}
    made.load_state_dict({name: one for name, one in tensors.items() if one is not None}, assign=True)
    return made


@pytest.mark.parametrize("kind", list(TYPES))
@pytest.mark.parametrize("layout", list(LAYOUTS))
@pytest.mark.parametrize("lead", [(40,), (2, 20), (0,)], ids=str)
def test_it_is_a_linear_layer(layout, kind, lead):
    packed = pack(matrix(layout), layout, TYPES[kind])
    bias = torch.randn(ROWS, dtype=torch.bfloat16)
    x = torch.randn(*lead, COLUMNS)
    expected = nn.functional.linear(x, unpack(packed).float(), bias.float())
    torch.testing.assert_close(module(packed, bias)(x), expected, rtol=1e-4, atol=1e-4)
    low = module(packed, bias)(x.bfloat16())
    assert low.dtype == torch.bfloat16
    torch.testing.assert_close(low.float(), expected, rtol=0.05, atol=0.1)


@pytest.mark.parametrize("layout", list(LAYOUTS))
def test_one_input_gives_what_many_give(layout):
    made = module(pack(matrix(layout), layout, torch.bfloat16))
    x = torch.randn(20, COLUMNS)
    torch.testing.assert_close(torch.cat([made(row) for row in x.split(1)]), made(x), rtol=1e-4, atol=1e-4)
    assert made(x[0]).shape == (ROWS,)


def test_the_input_has_its_gradient():
    made = module(pack_cheapest(matrix("bitmask"), torch.bfloat16), torch.randn(ROWS, dtype=torch.bfloat16))
    x = torch.randn(3, COLUMNS, requires_grad=True)
    made(x).square().sum().backward()
    other = x.detach().clone().requires_grad_()
    nn.functional.linear(other, unpack(made.packed).float(), made.bias.float()).square().sum().backward()
    torch.testing.assert_close(x.grad, other.grad, rtol=1e-4, atol=1e-3)


def test_it_compiles_without_a_break():
    chain = nn.Sequential(
        *(module(pack_cheapest(matrix("bitmask", 64, 64) * scale, torch.bfloat16)) for scale in (1, 2, 3))
    )
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(chain, backend=counter, fullgraph=True)
    x = torch.randn(20, 64)
    for one in chain:
        one.prepare()
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), chain(x), rtol=1e-4, atol=1e-4)
    assert counter.frame_count == 1


def test_the_operator_is_sound():
    made = module(pack_cheapest(matrix("bitmask"), torch.bfloat16))
    made.prepare()
    x = torch.randn(20, COLUMNS, requires_grad=True)
    torch.library.opcheck(packed_linear, (x, made._handle, ROWS))


def test_types_stay_when_a_model_is_cast():
    made = module(pack_cheapest(matrix("bitmask"), torch.int8), torch.randn(ROWS, dtype=torch.bfloat16))
    before = {name: one.dtype for name, one in made.named_buffers()}
    x = torch.randn(5, COLUMNS)
    expected = made(x)
    assert torch.equal(nn.ModuleList([made]).to(torch.float16)[0](x), expected)
    assert {name: one.dtype for name, one in made.named_buffers()} == before
    assert torch.equal(made.double()(x), expected)


def test_a_copy_stands_alone():
    made = module(pack_cheapest(matrix("bitmask"), torch.bfloat16))
    x = torch.randn(5, COLUMNS)
    expected = made(x)
    copied = copy.deepcopy(made)
    made.weight.zero_()
    assert torch.equal(copied(x), expected)
    x.requires_grad_()
    copied(x)
    assert int(copied._handle) != int(made._handle)


def test_shared_memory_is_where_it_multiplies_from():
    made = module(pack_cheapest(matrix("bitmask"), torch.bfloat16))
    x = torch.randn(5, COLUMNS)
    expected = made(x)
    assert torch.equal(made.share_memory()(x), expected)
    assert made._multiplier.packed.parts["weight"].is_shared()
    assert made._multiplier.matrix.weight == made.weight.data_ptr()


@pytest.mark.parametrize("assign", [True, False])
def test_other_tensors_are_looked_at_before_they_are_used(assign):
    made = module(pack_cheapest(matrix("bitmask"), torch.bfloat16))
    x = torch.randn(5, COLUMNS)
    twice = module(pack_cheapest(matrix("bitmask") * 2, torch.bfloat16))
    expected = made(x) * 2
    made.load_state_dict(twice.state_dict(), assign=assign)
    torch.testing.assert_close(made(x), expected)
    damaged = {**twice.state_dict(), "weight_mask": torch.full_like(made.weight_mask, -1)}
    made.load_state_dict(damaged, assign=assign)
    with pytest.raises(UserError, match="the packed matrix is damaged"):
        made(x)


def test_elsewhere_it_does_not_run():
    made = PackedLinear(Entry(layout="dense", type="bf16", rows=16, columns=16, values=256))
    with pytest.raises(UserError, match="run on the CPU, and this one lies on meta"):
        made.prepare()


def test_it_says_what_it_is():
    assert "in_features=52, out_features=37, dense, bf16" in repr(
        module(pack(matrix("dense"), "dense", torch.bfloat16))
    )


# --- the choice of a layout ---


@pytest.mark.parametrize(
    ("layout", "expected"), [("dense", "dense"), ("bitmask", "bitmask"), ("2:4", "2:4"), ("tiles", "tiles")]
)
def test_the_cheapest_layout_is_the_one_the_zeros_lie_in(layout, expected):
    assert pack_cheapest(matrix(layout, 64, 256), torch.bfloat16).layout == expected


def test_of_equals_the_first_is_taken():
    first, second = (pack(matrix("dense"), "dense", torch.bfloat16) for _ in range(2))
    assert choose_layout([first, second]) is first


def test_what_was_gathered_no_file_can_change():
    made = module(pack_cheapest(matrix("bitmask"), torch.bfloat16))
    mapped, x = made.weight, torch.randn(5, COLUMNS)
    gather(made)
    expected = made(x)
    mapped.zero_()
    assert torch.equal(made(x), expected)
