"""Quality against measured speed: what is drawn together, and what is said of a pruned model that 4 bits alone beat."""

from typing import Any

import pytest

from prunus.reporting.pareto import pareto_figures, pareto_verdicts
from prunus.reporting.record import Run
from report_page import figures, page, words
from report_record import record, side


def run(
    name: str, speed: float, perplexity: float, *, steps: tuple[str, ...], size: float = 270e6, **bench: Any
) -> Run:
    """A run whose history has these steps, measured in llama.cpp; a million parameters a megabyte of bf16."""
    origin = {"path": "models/dense", "sha256": "ab" * 32}
    history: list[dict[str, Any]] = [{"step": step, "input": origin, "settings": {}} for step in steps]
    model = side(1.0) | {"bytes_on_disk": size, "parameters": 135_000_000, "decode_tokens_per_second": speed}
    benchmark = {"engine": "llama.cpp", "threads": 2, "environment": {"cpu": "P"}, "model": model, "dense": None}
    evaluation = {
        "kind": "perplexity",
        "dataset": "t",
        "window": 8,
        "windows": 4,
        "dtype": name,
        "perplexity": perplexity,
    }
    return Run(name, {"history": history, "benchmarks": [benchmark | bench], "evaluations": [evaluation]})


PRUNED = run("small", 40.0, 30.0, steps=("shrink", "export"))
DENSE = run("dense-f16", 20.0, 20.0, steps=("export",))


def test_a_dense_quantized_model_that_is_faster_and_better_is_said_to_be():
    four_bits = run("dense-q4", 50.0, 22.0, steps=("export",), size=90e6)
    (said,) = pareto_verdicts([DENSE, PRUNED, four_bits])
    assert said == (
        "llama.cpp: do not take small (40.0 tokens/s, perplexity 30): dense and quantized, dense-q4 (50.0 tokens/s, "
        "perplexity 22) is at least as fast and as good."
    )


@pytest.mark.parametrize(("speed", "perplexity"), [(39.0, 22.0), (50.0, 31.0)])
def test_a_pruned_model_that_is_ahead_in_one_is_not_beaten(speed: float, perplexity: float):
    four_bits = run("dense-q4", speed, perplexity, steps=("export",), size=90e6)
    (said,) = pareto_verdicts([PRUNED, four_bits])
    assert said.startswith(
        "llama.cpp: no dense quantized model here is both as fast and as good as small (40.0 tokens/s"
    )


def test_a_baseline_that_is_missing_is_asked_for():
    (said,) = pareto_verdicts([PRUNED, DENSE])
    assert said.startswith("llama.cpp: no dense quantized model is among these runs")
    assert "`prunus export DENSE OUT --to gguf:q4_k_m`" in said
    quantized_and_pruned = run("small-q4", 60.0, 32.0, steps=("shrink", "export"), size=80e6)
    assert all("is among these runs" in one for one in pareto_verdicts([PRUNED, quantized_and_pruned]))


def test_the_lines_cross_at_the_cheapest_baseline_and_every_model_is_a_point():
    eight, four = (
        run("dense-q8", 30.0, 20.5, steps=("export",), size=140e6),
        run("dense-q4", 50.0, 22.0, steps=("quantize",), size=90e6),
    )
    (figure,) = pareto_figures([DENSE, PRUNED, eight, four])
    drawn = {trace["name"]: list(zip(trace["x"], trace["y"], trace["text"], strict=True)) for trace in figure.data}
    assert drawn == {
        "dense": [(20.0, 20.0, "dense-f16")],
        "dense, quantized": [(30.0, 20.5, "dense-q8"), (50.0, 22.0, "dense-q4")],
        "pruned": [(40.0, 30.0, "small")],
    }
    assert [(line["x0"], line["y0"]) for line in figure.layout["shapes"]] == [(0, 22.0), (50.0, 0)]
    assert figure.title == "Quality against measured speed in llama.cpp"


@pytest.mark.parametrize(
    "other", [{"engine": "vllm"}, {"threads": 4}, {"environment": {"cpu": "Q"}}, {"new_tokens": 9}]
)
def test_what_was_measured_otherwise_is_not_drawn_together(other: dict[str, Any]):
    assert pareto_figures([PRUNED, run("else", 1.0, 1.0, steps=("export",), **other)]) == []


def test_another_text_or_origin_is_not_drawn_together():
    text, origin = (run("else", 1.0, 1.0, steps=("export",)) for _ in range(2))
    text.record["evaluations"][0]["dataset"] = "other"
    origin.record["history"][0]["input"] = {"sha256": "cd" * 32}
    assert pareto_figures([PRUNED, text]) == pareto_figures([PRUNED, origin]) == []


def test_the_page_has_the_picture_and_the_sentence(tmp_path):
    html = page(tmp_path, record(), record("wanda", 0.6, 60.0))
    assert "transformers: no dense quantized model is among these runs" in words(html)
    (drawn,) = (f for f in figures(html) if "tokens/s" in f["layout"].get("xaxis", {}).get("title", {}).get("text", ""))
    assert {trace["name"]: trace["y"] for trace in drawn["data"]} == {"dense": [21.16], "pruned": [28.1, 60.0]}
