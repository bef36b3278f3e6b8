"""What takes more than a moment shows a bar, and every bar arrives at its end."""

import pytest
from rich.progress import Progress

import prunus
from prunus.benchmark import measurement
from prunus.evaluation import continuations


@pytest.fixture
def bars(monkeypatch):
    """[description, total, done] of every bar, in order."""
    shown: list[list] = []
    add, advance = Progress.add_task, Progress.advance

    def add_task(self, description, total, completed, **fields):
        shown.append([description, total, completed])
        return add(self, description, total=total, completed=completed, **fields)

    def advance_task(self, task, steps):
        shown[-1][2] += steps
        return advance(self, task, steps)

    monkeypatch.setattr(Progress, "add_task", add_task)
    monkeypatch.setattr(Progress, "advance", advance_task)
    return shown


def test_bench(bars, tiny_llama_dir, monkeypatch):
    peaks = {"peak_memory_bytes": 1, "peak_gpu_memory_bytes": None}
    monkeypatch.setattr(measurement, "peak_memory", lambda _directory, _work: peaks)
    asked = {"prompt_tokens": 8, "new_tokens": 2, "repetitions": 3, "device": "cpu"}
    prunus.bench(tiny_llama_dir, against=str(tiny_llama_dir), **asked)
    assert bars == [["Peak memory", 2, 2], ["Loading", 2, 2], ["Warming up", 2, 2], ["Benchmark", 6, 6]]


def test_sensitivity(bars, tiny_llama_dir):
    prunus.profile(tiny_llama_dir, sensitivity=True, length=16, windows=3, dtype="float32", device="cpu")
    assert bars == [["Sensitivity, dense model", 6, 6], ["Sensitivity", 2, 2]]


def test_continuations_count_the_loading(bars, tiny_llama_dir):
    continuations(tiny_llama_dir, tiny_llama_dir, prompts=("Once",), new_tokens=2)
    assert bars == [[f"Continuations of {tiny_llama_dir.name}", 2, 2]] * 2
