"""Layouts: what is packed is unpacked exactly, and passes its own check."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from prunus.runtime import LAYOUTS, check_packed, pack, unpack
from prunus.runtime.packed import TYPES

# bfloat16 by its bits: every number, both infinities and NaN
WEIGHTS = st.one_of(st.just(0), st.just(0x8000), st.integers(0, 0xFFFF))


@st.composite
def matrices(draw: st.DrawFn, values: st.SearchStrategy[int] = WEIGHTS) -> Tensor:
    """bfloat16 (O, I), zeros in any places, whole tiles of them among others."""
    rows, columns = draw(st.integers(1, 35)), draw(st.integers(1, 70))
    few = draw(st.lists(values, min_size=1, max_size=8))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    chosen = torch.randint(len(few), (rows, columns), generator=generator)
    weight_OI = torch.tensor(few, dtype=torch.int32)[chosen].to(torch.uint16).view(torch.bfloat16)
    kept_OI = torch.rand(rows, columns, generator=generator) >= draw(st.sampled_from([0.0, 0.5, 0.99]))
    kept_OI[:, : draw(st.integers(0, columns))] &= draw(st.booleans())
    return weight_OI.where(kept_OI, torch.zeros_like(weight_OI))


def two_of_four(weight_OI: Tensor) -> Tensor:
    """The same with at most two weights of four, and columns filled up to a multiple of four."""
    padded = torch.nn.functional.pad(weight_OI, (0, -weight_OI.shape[1] % 4)).view(len(weight_OI), -1, 4)
    before = (padded != 0).cumsum(-1)
    return padded.where(before <= 2, torch.zeros_like(padded)).flatten(1)


def bits(weight_OI: Tensor) -> Tensor:
    """A zero is a zero, whatever its sign."""
    return weight_OI.where(weight_OI != 0, torch.zeros_like(weight_OI)).view(torch.int16)


@pytest.mark.parametrize("layout", LAYOUTS)
@settings(max_examples=60, deadline=None)
@given(weight_OI=matrices())
def test_bfloat16_comes_back_to_the_bit(layout: str, weight_OI: Tensor) -> None:
    weight_OI = two_of_four(weight_OI) if layout == "2:4" else weight_OI
    if layout == "2:4":  # its unpacking adds, and NaN plus 0 may be another NaN
        weight_OI = weight_OI.nan_to_num()
    packed = pack(weight_OI, layout, TYPES["bf16"])
    assert packed is not None
    check_packed(packed)
    assert torch.equal(bits(unpack(packed)), bits(weight_OI))


@pytest.mark.parametrize("layout", LAYOUTS)
@settings(max_examples=60, deadline=None)
@given(weight_OI=matrices(st.integers(0x3C00, 0x4400)))
def test_int8_comes_back_within_half_a_step(layout: str, weight_OI: Tensor) -> None:
    weight_OI = two_of_four(weight_OI) if layout == "2:4" else weight_OI
    packed = pack(weight_OI, layout, TYPES["int8"])
    assert packed is not None
    assert packed.scale_O is not None
    check_packed(packed)
    assert bool(((unpack(packed) - weight_OI.float()).abs() <= 0.5001 * packed.scale_O[:, None]).all())


@given(weight_OI=matrices(st.integers(0x3C00, 0x4400)))
def test_two_of_four_is_refused_where_it_is_not(weight_OI: Tensor) -> None:
    is_it = weight_OI.shape[1] % 4 == 0 and torch.equal(two_of_four(weight_OI), weight_OI)
    assert (pack(weight_OI, "2:4", TYPES["bf16"]) is not None) == is_it
