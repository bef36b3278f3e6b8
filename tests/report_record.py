"""A complete `prunus.json` with round numbers, for the tests that read the report made of it."""

import json
from pathlib import Path
from typing import Any

HOSTILE = "</script><script>window.pwned = true</script><b>&\"'"


def side(factor: float) -> dict[str, Any]:
    return {
        "bytes_on_disk": int(500e6 * factor),
        "parameters": 1000,
        "ttft_seconds": {"p50": 0.3 * factor, "p95": 0.4 * factor, "p99": 0.5 * factor, "count": 5},
        "tpot_seconds": {"p50": 0.03 * factor, "p95": 0.04 * factor, "p99": 0.05 * factor, "count": 50},
        "decode_tokens_per_second": 1 / (0.03 * factor),
        "peak_memory_bytes": int(900e6 * factor),
        "decode_bytes_per_token": int(450e6 * factor),
    }


def benchmark() -> dict[str, Any]:
    ratio = {"median": 2.0, "low": 1.9, "high": 2.1, "pairs": [1.9, 2.0, 2.0, 2.0, 2.1], "claim": "faster"}
    conditions = {"engine": "transformers", "device": "cpu", "threads": 2, "batch": 1, "prompt_tokens": 512}
    speed = {"speedup": {"prefill": ratio, "decode": ratio}, "verdict": "Prefill faster; decode faster."}
    return {**conditions, "model": side(0.5), "dense": side(1.0), **speed}


def record(name: str = "admm", sparsity: float = 0.5, perplexity: float = 28.1) -> dict[str, Any]:
    matrices = [
        {
            "name": f"model.layers.{block}.{projection}",
            "block": block,
            "projection": projection,
            "shape": [64, 32],
            "sparsity_requested": sparsity,
            "sparsity": sparsity,
            "error": 0.01 * (block + 1),
        }
        for block in range(3)
        for projection in ("self_attn.q_proj", "mlp.down_proj")
    ]
    step = {
        "step": "sparsify",
        "settings": {"method": name, "pattern": str(sparsity), "seed": 7},
        "input": {"path": "models/dense", "sha256": "ab" * 32},
        "started": "2026-01-02T03:04:05+00:00",
        "seconds": 182.0,
        "peak_memory_bytes": 1_420_000_000,
        "environment": {"cpu": "A processor", "memory_bytes": 8_000_000_000},
        "matrices": matrices,
        "sparsity": {"pruned_matrices": sparsity, "all_parameters": 0.39},
        "parameters": 134_515_008,
    }
    against = {"path": "models/dense", "perplexity": 21.16, "kl": 0.31, "top1_agreement": 0.801}
    evaluations = [
        {"kind": "perplexity", "dataset": "held-out", "window": 1024, "windows": 32, "perplexity": perplexity},
        {"kind": "choices", "dataset": "quiz", "acc_norm": 0.4, "acc_norm_standard_error": 0.02},
        {"kind": "continuations", "items": [{"prompt": "Once", "dense": "upon a time", "sparse": "or twice"}]},
    ]
    evaluations[0]["against"] = against
    sensitivity = [
        {"name": one["name"], "block": one["block"], "projection": one["projection"], "kl": 0.1} for one in matrices
    ]
    evidence = {"sensitivity": sensitivity, "evaluations": evaluations, "benchmarks": [benchmark()]}
    return {"format": 1, "prunus": "0.1.0", "history": [step], **evidence}


def shrink_step(before: int = 1000, after: int = 750, axis: str = "kv_groups", **settings: Any) -> dict[str, Any]:
    """Three blocks of two units along one axis, of which the second stays; scores over four decades."""
    groups = [
        {
            "name": f"model.layers.{block}.self_attn.o_proj",
            "block": block,
            "axis": axis,
            "expert": None,
            "units": 2,
            "kept": "4",
            "scores": [0.001, 10.0],
            "tokens": 64,
            "error_plain": 0.2,
            "error": 0.1,
            "seconds": 0.5,
        }
        for block in range(3)
    ]
    weights = [
        {"parameters": count, "decode_bytes": 4 * count, "kv_cache_values_per_token": 96 * count}
        for count in (before, after)
    ]
    return {
        "step": "shrink",
        "settings": {axis: 1, "score": "second-order", "expert_score": "reap", "refit": True, **settings},
        "input": {"path": "models/dense", "sha256": "ab" * 32},
        "request": "cd" * 32,
        "calibration": [{"source": "news", "windows": 4}],
        "axes": {axis: {"asked": 1, "before": 2, "after": 1}},
        "before": weights[0],
        "after": weights[1],
        "groups": groups,
        "seconds": 2.0,
    }


def shrunk(perplexity: float = 30.0, **step: Any) -> dict[str, Any]:
    """The record of a run that was shrunk and nothing else."""
    return record(perplexity=perplexity) | {"history": [shrink_step(**step)], "sensitivity": []}


def write(directory: Path, content: dict[str, Any]) -> Path:
    directory.mkdir(parents=True)
    (directory / "prunus.json").write_text(json.dumps(content), encoding="utf-8")
    return directory
