"""The advisor predicts every pattern and type, from measured rates, and says where dense is better."""

import json

import pytest

from prunus.errors import UserError
from prunus.runtime import TYPES, costs, native, timing
from prunus.steps import advise
from prunus.steps.profile import profile

pytestmark = pytest.mark.skipif(native.library_file() is None, reason="prunus was installed without its kernels")


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(costs, "_BYTES", 1_000_000)
    monkeypatch.setattr(costs, "_ROUNDS", 1)
    monkeypatch.setattr(timing, "UNCOUNTED", 0)


def row(name: str, pattern: str, seconds: float, size: int) -> dict[str, object]:
    return {"as": name, "pattern": pattern, "seconds": seconds, "bytes": size}


def test_every_pattern_and_type_is_predicted(quick, tiny_llama_dir):
    advice = profile(tiny_llama_dir, engine="sparse-cpu")["advice"]
    predicted = {(one["as"], one["pattern"]): one for one in advice["rows"]}
    assert {(f"sparse:{kind}", pattern) for kind in TYPES for pattern in costs.PATTERNS} < set(predicted)
    for kind in TYPES:
        sizes = [predicted[f"sparse:{kind}", pattern]["bytes"] for pattern in ("0", "0.5", "0.6", "0.7", "0.8")]
        assert sizes == sorted(sizes, reverse=True)
    assert all(one["tokens_per_second"] > 0 for one in advice["rows"])
    assert len(advice["says"]) == len(TYPES) * (len(costs.PATTERNS) - 1)


def test_the_bytes_are_those_of_the_packed_matrices(quick, tiny_llama_dir):
    advice = profile(tiny_llama_dir, engine="sparse-cpu")["advice"]
    dense = next(one for one in advice["rows"] if one["as"] == "transformers bf16")
    packed = next(one for one in advice["rows"] if (one["as"], one["pattern"]) == ("sparse:bf16", "0"))
    assert packed["bytes"] == pytest.approx(dense["bytes"], rel=0.01)


@pytest.mark.parametrize(
    ("seconds", "size", "says"),
    [
        (2.0, 200, "dense gguf:q4_0 is smaller and faster; do not prune for speed here."),
        (0.5, 50, "smaller and faster than every dense one."),
        (0.5, 200, "dense gguf:q4_0 is smaller."),
        (2.0, 50, "dense gguf:q4_0 is faster."),
    ],
)
def test_what_beats_what(seconds, size, says):
    sentence = advise._verdict(row("sparse:bf16", "0.5", seconds, size), [row("gguf:q4_0", "0", 1.0, 100)])
    assert sentence == f"0.5 as sparse:bf16: {says}"


def test_other_engines_are_not_asked(tiny_llama_dir):
    with pytest.raises(UserError, match="vllm gives no advice; sparse-cpu does"):
        profile(tiny_llama_dir, engine="vllm")


def test_without_kernels_it_says_what_to_do(tiny_llama_dir, monkeypatch):
    monkeypatch.setattr(advise, "kernels", lambda: None)
    with pytest.raises(UserError, match=r"install a C\+\+ compiler"):
        profile(tiny_llama_dir, engine="sparse-cpu")


def test_the_command_line_prints_it(quick, tiny_llama_dir, prunus):
    code, out, _ = prunus("profile", tiny_llama_dir, "--engine", "sparse-cpu")
    assert code == 0
    assert json.loads(out.splitlines()[-1])["advice"]["engine"] == "sparse-cpu"
