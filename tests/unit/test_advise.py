"""The advisor predicts every pattern and type, from measured rates, and says where dense is better."""

import json

import pytest
import torch

from packed_models import save_sparse
from prunus.checkpoint import open_checkpoint
from prunus.errors import UserError
from prunus.exporting.sparse_directory import Packer
from prunus.models import StreamedModel
from prunus.models.families import FAMILIES
from prunus.runtime import TYPES, check_packed, native, timing, unpack
from prunus.runtime.timing import Pass
from prunus.steps import advise, stand_in
from prunus.steps.profile import profile

pytestmark = pytest.mark.skipif(native.library_file() is None, reason="prunus was installed without its kernels")


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(stand_in, "LEAST_BYTES", 50_000)
    monkeypatch.setattr(advise, "_READ_BYTES", 1_000_000)
    monkeypatch.setattr(advise, "_SECONDS", 0.0)
    monkeypatch.setattr(timing, "UNCOUNTED", 0)


def row(name: str, pattern: str, seconds: float, size: int) -> dict[str, object]:
    return {"as": name, "pattern": pattern, "seconds": seconds, "bytes": size}


def test_every_pattern_and_type_is_predicted(quick, tiny_llama_dir):
    advice = profile(tiny_llama_dir, engine="sparse-cpu")["advice"]
    predicted = {(one["as"], one["pattern"]): one for one in advice["rows"]}
    assert {(f"sparse:{kind}", pattern) for kind in TYPES for pattern in advise.PATTERNS} < set(predicted)
    for kind in TYPES:
        sizes = [predicted[f"sparse:{kind}", pattern]["bytes"] for pattern in ("0", "0.5", "0.6", "0.7", "0.8")]
        assert sizes == sorted(sizes, reverse=True)
    assert all(one["tokens_per_second"] > 0 for one in advice["rows"])
    assert len(advice["says"]) == len(TYPES) * (len(advise.PATTERNS) - 1)


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


@pytest.mark.parametrize(
    ("seconds", "says"),
    [
        (0.5, "dense gguf:q4_0 is smaller."),
        (1.5, "dense gguf:q4_0 is smaller; dense gguf:q4_0 may be faster: time it."),
        (2.5, "dense gguf:q4_0 is smaller and faster; do not prune for speed here."),
    ],
)
def test_what_llama_cpp_reaches_at_best_it_may_not_reach(seconds, says):
    four_bits = {**row("gguf:q4_0", "0", 1.0, 100), "seconds_at_worst": 2.0}
    assert advise._verdict(row("sparse:int8", "0.5", seconds, 200), [four_bits]) == f"0.5 as sparse:int8: {says}"


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


def test_a_token_is_added_up_in_every_round():
    blocks = stand_in.StandIn(token=Pass(int, 0), times=5.5, num_bytes=100)
    candidate = advise.Candidate("sparse:int8", "0.5", blocks, head=Pass(int, 11))
    timed = {"outside": [1.0, 2.0], "sparse:int8 0.5": [3.0, 1.0], "head sparse:int8": [10.0, 20.0]}
    assert candidate.seconds(timed) == [1 + 2 * 5.5 + 10, 2 + 0 + 20]
    assert candidate.num_bytes == 111


def test_blocks_that_do_not_fit_into_memory(quick, tiny_llama_dir, monkeypatch):
    monkeypatch.setattr(stand_in, "half_of_free_memory", lambda: 1000)
    with pytest.raises(UserError, match="half of the free memory; free some, or ask about a smaller model"):
        profile(tiny_llama_dir, engine="sparse-cpu")


@pytest.mark.parametrize("family", [one.family for one in FAMILIES])
def test_stand_ins_of_every_family_decode(quick, family, tmp_path):
    model = StreamedModel(open_checkpoint(save_sparse(family, tmp_path), trust_remote_code=False), dtype=torch.float32)
    *blocks, _head = Packer(model, "int8").sources
    with torch.inference_mode():
        packed = stand_in.packed_stand_in(model, blocks, "0.5", torch.int8)
        for one in (packed.token, stand_in.dense_stand_in(model, blocks).token, stand_in.without_blocks(model)):
            one.run()
    assert packed.times >= 1


@pytest.mark.parametrize("pattern", advise.PATTERNS)
@pytest.mark.parametrize("kind", TYPES)
def test_rows_that_repeat_are_sound(kind, pattern):
    packed = timing.packed_as(pattern, TYPES[kind], 768, 80)
    check_packed(packed)
    whole_OI = unpack(packed)
    assert torch.equal(whole_OI, whole_OI[:256].repeat(3, 1))
