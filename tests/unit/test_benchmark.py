"""Benchmark: exact statistics, honest verdicts, and one real measurement of two tiny models."""

from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from prunus.benchmark import machine, measure
from prunus.benchmark.statistics import percentiles, speedup, verdict
from prunus.benchmark.transformers_engine import decode_bytes
from prunus.errors import UserError


def tiny_llama(directory: Path, *, intermediate_size: int = 64, tied: bool = True) -> Path:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=96,
        hidden_size=32,
        intermediate_size=intermediate_size,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=tied,
    )
    LlamaForCausalLM(config).save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> dict:
    root = tmp_path_factory.mktemp("models")
    dense, small = tiny_llama(root / "dense"), tiny_llama(root / "small", intermediate_size=32)
    return measure(small, against=dense, prompt_tokens=16, new_tokens=4, repetitions=3, threads=1, device="cpu")


def test_percentiles_interpolate_linearly():
    assert percentiles([4.0, 1.0, 3.0, 2.0, 5.0]) == pytest.approx({"p50": 3.0, "p95": 4.8, "p99": 4.96, "count": 5})


def test_speedup_divides_pair_by_pair():
    ratio = speedup([2.0, 9.0, 4.0], [1.0, 3.0, 4.0])
    assert ratio["pairs"] == [2.0, 3.0, 1.0]
    assert ratio["median"] == 2.0
    # The median of three draws is the smallest with probability 7/27 and the largest with 7/27: both above 2.5%.
    assert (ratio["low"], ratio["high"]) == (1.0, 3.0)


def test_bootstrap_is_reproducible_and_narrows_with_agreement():
    dense = [1.0 + 0.01 * (i % 7) for i in range(40)]
    assert speedup(dense, [1.0] * 40) == speedup(dense, [1.0] * 40)
    ratio = speedup(dense, [1.0] * 40)
    assert 1.0 < ratio["low"] <= ratio["median"] <= ratio["high"] < 1.06


@pytest.mark.parametrize(
    ("dense", "claim"),
    [
        ([2.0, 2.1, 1.9, 2.0, 2.2], "faster"),
        ([0.5, 0.6, 0.5, 0.4, 0.5], "slower"),
        ([0.9, 1.1, 1.0, 0.8, 1.2], "no difference"),
        ([2.0, 2.0, 2.0, 2.0], "too few repetitions"),
    ],
)
def test_claim_follows_from_the_interval(dense: list[float], claim: str):
    assert speedup(dense, [1.0] * len(dense))["claim"] == claim


def test_verdict_claims_only_what_the_interval_allows():
    same, fast = speedup([0.9, 1.1, 1.0, 0.8, 1.2], [1.0] * 5), speedup([2.0] * 5, [1.0] * 5)
    few = speedup([2.0] * 3, [1.0] * 3)
    assert "zeros alone bring no speed in this engine" in verdict(same, same, zeros_only=True)
    assert "includes 1" in verdict(same, same, zeros_only=True)
    assert "smaller shapes bring no speed" in verdict(same, same, zeros_only=False)
    assert verdict(same, fast, zeros_only=True).endswith("decode faster (2.000x, 95% interval 2.000 to 2.000).")
    assert "no speed" not in verdict(same, fast, zeros_only=True)
    assert verdict(few, few, zeros_only=True).startswith("No verdict: 3 repetitions")


def test_measure_keeps_both_sides_paired(measured: dict):
    for side in ("model", "dense"):
        one = measured[side]
        assert len(one["repetitions"]) == 3
        assert one["ttft_seconds"]["count"] == 3
        assert one["tpot_seconds"]["count"] == 3 * (4 - 1)
        assert 0 < one["tpot_seconds"]["p50"] <= one["tpot_seconds"]["p95"] <= one["tpot_seconds"]["p99"]
        assert all(r["ttft_seconds"] >= r["prefill_seconds"] > 0 for r in one["repetitions"])
        assert one["decode_tokens_per_second"] == pytest.approx(1 / one["tpot_seconds"]["p50"])
        read = one["decode_bytes_per_token"] / one["tpot_seconds"]["p50"] / 1e9
        assert one["decode_gigabytes_per_second"] == pytest.approx(read)
    pairs = zip(measured["dense"]["repetitions"], measured["model"]["repetitions"], strict=True)
    expected = [dense["decode_seconds"] / model["decode_seconds"] for dense, model in pairs]
    assert measured["speedup"]["decode"]["pairs"] == pytest.approx(expected)


def test_measure_states_its_conditions(measured: dict):
    expected = {"engine": "transformers", "dtype": "float32", "device": "cpu", "threads": 1, "batch": 1}
    expected |= {"prompt_tokens": 16, "new_tokens": 4, "repetitions": 3, "energy": "not measured"}
    assert {key: measured[key] for key in expected} == expected
    assert measured["prompt"] == "uniform random token ids, seed 0"
    assert measured["environment"]["torch"] == torch.__version__
    assert set(machine()) == set(measured["environment"])


def test_sizes_are_those_of_the_shapes(measured: dict):
    # Two layers lose half of gate, up and down: 3 * 32 rows of 32 floats each.
    fewer = 2 * 3 * 32 * 32
    assert measured["dense"]["parameters"] - measured["model"]["parameters"] == fewer
    assert measured["dense"]["decode_bytes_per_token"] - measured["model"]["decode_bytes_per_token"] == 4 * fewer
    assert measured["dense"]["bytes_on_disk"] > measured["model"]["bytes_on_disk"] > 0


def test_alone_nothing_is_compared_and_memory_is_the_childs(tmp_path: Path):
    ballast = torch.ones(2**28)  # 1 GiB, resident in this process only
    model = tiny_llama(tmp_path / "model")
    result = measure(model, prompt_tokens=8, new_tokens=2, repetitions=1, threads=1, device="cpu")
    assert (result["dense"], result["speedup"], result["verdict"]) == (None, None, None)
    if Path("/proc/self/status").exists():
        assert 2**26 < result["model"]["peak_memory_bytes"] < ballast.nbytes


def test_untied_embedding_costs_one_row_per_token(tmp_path: Path):
    tied = LlamaForCausalLM.from_pretrained(tiny_llama(tmp_path / "tied"))
    untied = LlamaForCausalLM.from_pretrained(tiny_llama(tmp_path / "untied", tied=False))
    assert decode_bytes(tied) == 4 * tied.num_parameters()
    assert decode_bytes(untied) == decode_bytes(tied) + 4 * 32


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"new_tokens": 1}, "new_tokens is 1: give a whole number of at least 2"),
        ({"repetitions": 0}, "repetitions is 0"),
        ({"threads": 0}, "threads is 0"),
        ({"dtype": "int8"}, "dtype is 'int8': give one of auto"),
        ({"prompt_tokens": 63, "new_tokens": 2}, "reads at most 64"),
    ],
)
def test_bad_arguments_are_refused(tmp_path: Path, arguments: dict, message: str):
    with pytest.raises(UserError, match=message):
        measure(tiny_llama(tmp_path / "model"), **{"prompt_tokens": 8, "new_tokens": 2, **arguments})


def test_a_directory_without_a_model_is_refused(tmp_path: Path):
    with pytest.raises(UserError, match=r"no config\.json"):
        measure(tmp_path)
