"""What a step will take is known from shapes, and a bound on memory decides what waits in it."""

import psutil
import pytest
import torch

from prunus.errors import UserError
from prunus.models import StreamedModel, open_model
from prunus.settings import SparsifySettings
from prunus.sparsity import METHODS
from prunus.steps import estimate, memory_plan
from prunus.steps.memory_plan import plan_memory
from prunus.steps.plan import make_plan

MIB = 1 << 20
FROM_FILE = SparsifySettings(calibration=("some.txt",), samples=64, length=512)
FROM_ITSELF = SparsifySettings(calibration=("self=2",), samples=64, length=512)


@pytest.fixture(scope="module")
def model(tiny_llama_dir) -> StreamedModel:
    return open_model(tiny_llama_dir, dtype=torch.float32)


@pytest.fixture(autouse=True)
def process_of_100_mib(monkeypatch):
    class Memory:
        rss = 100 * MIB

    monkeypatch.setattr(psutil.Process, "memory_info", lambda _: Memory)


def test_without_a_bound_so_much_waits_in_memory(model, monkeypatch):
    each = memory_plan._sequence_bytes(model, 512)
    monkeypatch.setattr(memory_plan, "WAITING_BYTES", 10 * each)
    plan = plan_memory(model, METHODS["wanda"].needs, FROM_FILE, None)
    hidden = 64 * 512 * 64 * 4
    assert (plan.sequences, plan.sequences_in_memory) == (64, 10)
    assert plan.disk_bytes == 2 * hidden + 54 * each
    assert each == 512 * (64 + 64 + 128) * 4  # residual, normed input, the input of the down projection


def test_a_bound_is_kept_by_what_waits(model):
    tight = plan_memory(model, METHODS["wanda"].needs, FROM_FILE, 110 * MIB)
    assert 1 <= tight.sequences_in_memory < 64
    assert tight.memory_bytes <= 110 * MIB < tight.memory_bytes + memory_plan._sequence_bytes(model, 512)
    assert plan_memory(model, METHODS["wanda"].needs, FROM_FILE, 1 << 30).sequences_in_memory == 64


def test_a_bound_below_one_sequence_is_refused(model):
    with pytest.raises(UserError, match=r"0\.10 GiB is too small: one block, its statistics and one sequence of 512"):
        plan_memory(model, METHODS["wanda"].needs, FROM_FILE, 101 * MIB)


def test_a_method_that_needs_no_text_needs_no_sequences(model):
    plan = plan_memory(model, METHODS["magnitude"].needs, FROM_ITSELF, 102 * MIB)
    assert (plan.sequences, plan.disk_bytes) == (0, 0)


def test_sampling_its_own_text_loads_the_model_whole_and_says_so(model, monkeypatch):
    monkeypatch.setattr(memory_plan, "WAITING_BYTES", 1)
    whole = plan_memory(model, METHODS["wanda"].needs, FROM_ITSELF, None).memory_bytes
    cache = 64 * 512 * 2 * 2 * 32 * 4  # all tokens x layers x keys and values x width of the KV heads
    assert whole == 100 * MIB + (model.checkpoint.num_parameters * 4) + cache
    assert whole > plan_memory(model, METHODS["wanda"].needs, FROM_FILE, 110 * MIB).memory_bytes
    with pytest.raises(UserError, match="the whole model, which samples its own text"):
        plan_memory(model, METHODS["wanda"].needs, FROM_ITSELF, 110 * MIB)


def test_sampling_its_own_text_takes_longer_and_the_estimate_says_so(model, monkeypatch):
    monkeypatch.setattr(estimate, "product_seconds", lambda *_: 1e-4)
    method = METHODS["wanda"]
    plan = make_plan(model.spec, method, "0.5", {}, ())
    seconds = [estimate.estimate_sparsify(model, plan, method, s, None).seconds for s in (FROM_FILE, FROM_ITSELF)]
    assert seconds[1] > 1.5 * seconds[0] > 0
