"""Packed matrices that read the same tensor: one call for all of them, and the results of single calls."""

import copy
import threading
import weakref

import pytest
import torch
from torch import nn

from prunus.runtime import pack, together
from prunus.runtime.linear import PackedLinear, read_together

NAMES = ("q", "k", "v")


@pytest.fixture
def attention():
    """Three packed matrices of one width; the second is in int8."""
    torch.manual_seed(0)
    kinds = (torch.bfloat16, torch.int8, torch.bfloat16)
    made = nn.ModuleDict(
        {
            name: PackedLinear.holding(pack(torch.randn(rows, 64), "dense", kind))
            for name, rows, kind in zip(NAMES, (48, 16, 32), kinds, strict=True)
        }
    )
    read_together(made)
    return made


@pytest.fixture
def calls(monkeypatch):
    """How many matrices each call was given."""
    counts, multiply = [], together.multiply_together
    monkeypatch.setattr(
        together, "multiply_together", lambda matrices, x: counts.append(len(matrices)) or multiply(matrices, x)
    )
    return counts


def inputs(seed, rows=1):
    return torch.randn(rows, 64, generator=torch.Generator().manual_seed(seed)).bfloat16()


def passed(modules, x, names=NAMES):
    return {name: modules[name](x) for name in names}


@pytest.mark.parametrize("rows", [1, 3, 100])
def test_from_the_second_pass_on_one_call_is_enough(attention, calls, rows):
    for seed in range(3):
        found = passed(attention, inputs(seed, rows))
        for name in NAMES:
            assert torch.equal(found[name], attention[name].multiply(inputs(seed, rows)))
    assert calls == [1, 1, 1, 3, 3]


def test_a_wrong_guess_is_not_made_again(attention, calls):
    passed(attention, inputs(0))
    passed(attention, inputs(1), names="q")  # k and v were multiplied for nothing
    passed(attention, inputs(2), names="q")
    found = passed(attention, inputs(3), names="vk")
    assert calls == [1, 1, 1, 3, 1, 1, 1]
    assert torch.equal(found["k"], attention["k"].multiply(inputs(3)))


def test_the_same_tensor_twice(attention):
    x = inputs(0)
    first, second = passed(attention, x), passed(attention, x)
    assert all(torch.equal(first[name], second[name]) for name in NAMES)


def test_an_input_that_was_changed_in_place_is_another(attention):
    passed(attention, inputs(0))
    x = inputs(1)
    attention["q"](x)
    x.mul_(2)
    assert torch.equal(attention["k"](x), attention["k"].multiply(x))


def test_inference_mode(attention, calls):
    with torch.inference_mode():
        for seed in range(2):
            found = passed(attention, inputs(seed))
            assert torch.equal(found["v"], attention["v"].multiply(inputs(seed)))
    assert calls == [1, 1, 1, 3]


def test_threads_do_not_see_each_other(attention):
    def often(seed):
        for turn in range(50):
            x = inputs(seed + turn)
            found = passed(attention, x)
            right.append(all(torch.equal(found[name], attention[name].multiply(x)) for name in NAMES))

    right = []
    threads = [threading.Thread(target=often, args=(1000 * number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(right) == 200
    assert all(right)


def test_a_copy_has_readers_of_its_own(attention):
    passed(attention, inputs(0))
    other = copy.deepcopy(attention)
    assert len({id(other[name].readers) for name in NAMES}) == 1
    assert other["q"].readers is not attention["q"].readers
    assert torch.equal(other["v"](inputs(1)), attention["v"](inputs(1)))


def test_no_input_is_kept_alive(attention):
    x = inputs(0)
    passed(attention, x)
    gone = weakref.ref(x)
    del x
    assert gone() is None


def test_matrices_that_are_not_of_one_model_stay_apart(calls):
    alone = [PackedLinear.holding(pack(torch.randn(16, 64), "dense", torch.bfloat16)) for _ in range(2)]
    for seed in range(2):
        x = inputs(seed)
        for one in alone:
            one(x)
    assert calls == [1, 1, 1, 1]
