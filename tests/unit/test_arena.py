"""Tensors that lie together keep their values, their storages and each other's memory."""

import copy
import gc
from itertools import pairwise

import pytest
import torch
from safetensors.torch import load, save

from prunus.runtime.arena import Arena


def some() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {
        "bfloat16": torch.randn(7, 13).bfloat16(),
        "bytes": torch.randint(-128, 128, (3, 5, 11), dtype=torch.int8),
        "none": torch.empty(0, 4, dtype=torch.int32),
        "one": torch.tensor(2.5),
        "large": torch.randn(1 << 20),
    }


@pytest.fixture
def moved() -> dict[str, torch.Tensor]:
    arena = Arena(some().values())
    return {name: arena.copy(tensor) for name, tensor in some().items()}


def test_values_and_shapes_stay(moved):
    gc.collect()  # the arena itself is gone
    for name, tensor in some().items():
        assert moved[name].dtype == tensor.dtype
        assert torch.equal(moved[name], tensor)


def test_they_lie_one_behind_the_other_on_whole_lines(moved):
    starts = [tensor.data_ptr() for tensor in moved.values() if tensor.numel()]
    sizes = [tensor.numel() * tensor.element_size() for tensor in moved.values() if tensor.numel()]
    assert all(start % 64 == 0 for start in starts)
    assert [b - a for a, b in pairwise(starts)] == [-(-size // 64) * 64 for size in sizes[:-1]]


def test_writing_one_changes_no_other(moved):
    moved["bytes"].fill_(-1)
    moved["bfloat16"].zero_()
    assert torch.equal(moved["one"], some()["one"])
    assert torch.equal(moved["large"], some()["large"])


def test_they_are_saved_and_copied_as_tensors_of_their_own(moved):
    saved = load(save(moved))
    copied = copy.deepcopy(moved["large"])
    moved["large"].zero_()
    assert torch.equal(saved["large"], some()["large"])
    assert torch.equal(copied, some()["large"])


def test_one_outlives_the_others(moved):
    kept = moved.pop("bytes")
    moved.clear()
    gc.collect()
    assert torch.equal(kept, some()["bytes"])


def test_there_may_be_nothing_to_hold():
    Arena([])
