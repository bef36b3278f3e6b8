"""The first thing read: what was cut, how much smaller, how much faster, and what quality is left."""

from dataclasses import dataclass
from typing import Any

from prunus.reporting import text
from prunus.reporting.record import Run, evaluation_conditions
from prunus.reporting.shapes import WEIGHTS, Shapes, decided_by, shapes


@dataclass(frozen=True, slots=True)
class Card:
    """One answer: the claim in a few characters, what it means, and the conditions it was measured under."""

    question: str
    answer: str
    meaning: str = ""
    conditions: str = ""


def verdict(run: Run) -> list[Card]:
    """The answers, each from the record alone; what was not measured says so.

    A model that was shrunk is smaller first of all, and has a sparsity only where zeros were made.
    """
    changed = shapes(run)
    if changed is None:
        return [_cut(run), _smaller(run), _faster(run), _quality(run)]
    zeros = [_cut(run)] if run.sparsity is not None else []
    return [_shrunk(run, changed), *zeros, _faster(run), _quality(run)]


def _shrunk(run: Run, changed: Shapes) -> Card:
    weights = [
        f"{words} {text.change(changed.before[name], changed.after[name], show)}"
        for name, (words, show) in WEIGHTS.items()
        if name in changed.before and name in changed.after
    ]
    meaning = f"{changed.axes_in_words()}: {'; '.join(weights)}.{_disk(run)}"
    how = [f"{name.replace('_', ' ')} {text.plain(value)}" for name, value in decided_by(run).items()]
    conditions = ", ".join(["parameters after / before", *how])
    return Card("Smaller by", text.fixed(changed.parameters_left, 2, "x"), meaning, conditions)


def _disk(run: Run) -> str:
    model, dense = _last(run, "model").get("bytes_on_disk"), _last(run, "dense").get("bytes_on_disk")
    return f" On disk {text.change(dense, model, text.size)}." if model and dense else ""


def _cut(run: Run) -> Card:
    if run.sparsity is None:
        return Card("Sparsity", text.ABSENT)
    meaning = "of the weights in the pruned matrices are zero"
    if run.sparsity_all is not None:
        meaning += f"; {run.sparsity_all:.3f} of all parameters"
    meaning = f"{meaning}. {text.allocation(run.allocation)}".strip()
    if run.history[-1] in run.shrink_steps:
        meaning += " Zeros were not counted again after the model was shrunk."
    method, pattern = run.method, run.setting("pattern")
    conditions = ", ".join(f"{name} {value}" for name, value in (("method", method), ("pattern", pattern)) if value)
    return Card("Sparsity", f"{run.sparsity:.3f}", meaning, conditions)


def _smaller(run: Run) -> Card:
    sizes = run.quantized.get("bytes") or {}
    model = _last(run, "model").get("bytes_on_disk") or sizes.get("after")
    dense = _last(run, "dense").get("bytes_on_disk") or sizes.get("before")
    if not model or not dense:
        return Card("Smaller by", text.ABSENT)
    meaning = f"{text.size(dense)} dense, {text.size(model)} now, on disk."
    if model >= dense and run.sparsity:
        meaning += " Zeros are stored at full size in this format."
    share = round(1 - model / dense, 3) or 0.0  # never "-0.0%"
    return Card("Smaller by", f"{share:.1%}", meaning, "weight files of the directory")


def _faster(run: Run) -> Card:
    benchmark = run.benchmarks[-1] if run.benchmarks else {}
    decode = (benchmark.get("speedup") or {}).get("decode")
    if not decode:
        return Card("Faster by", text.ABSENT)
    claims = {"faster": f"{decode['median']:.2f}x", "slower": f"{decode['median']:.2f}x, slower"}
    answer = claims.get(decode["claim"], decode["claim"])
    ratios = "; ".join(f"{phase} {text.interval(ratio)}" for phase, ratio in benchmark["speedup"].items())
    return Card("Faster by", answer, f"{ratios} (95% interval).".capitalize(), benchmark_conditions(benchmark))


def _quality(run: Run) -> Card:
    evaluation = run.perplexity
    if not evaluation:
        return Card("Quality kept", text.ABSENT)
    now, against = evaluation.get("perplexity"), evaluation.get("against") or {}
    conditions = evaluation_conditions(evaluation)
    before = against.get("perplexity")
    if before is None:
        return Card("Quality kept", text.fixed(now), "perplexity; the dense model was not measured.", conditions)
    meaning = ["perplexity, dense to this model"]
    if "kl" in against:
        meaning.append(f"KL {text.fixed(against['kl'], 3)} nats per token")
    if "top1_agreement" in against:
        meaning.append(f"the same top token in {text.fixed(100 * against['top1_agreement'], 1)}% of places")
    return Card(
        "Quality kept",
        text.change(before, now, text.fixed),
        "; ".join(meaning) + ".",
        conditions,
    )


def benchmark_conditions(benchmark: dict[str, Any]) -> str:
    """One line that says how a benchmark was run."""
    processor = (benchmark.get("environment") or {}).get("cpu" if benchmark.get("device") == "cpu" else "gpu")
    engine = f"{benchmark.get('engine', 'engine not recorded')} {benchmark.get('engine_version', '')}".strip()
    named = ("threads", "batch", "prompt_tokens", "new_tokens", "repetitions", "date")
    parts = [engine, benchmark.get("dtype"), benchmark.get("device"), processor]
    parts += [f"{name.replace('_', ' ')} {benchmark[name]}" for name in named if name in benchmark]
    return ", ".join(str(part) for part in parts if part)


def _last(run: Run, side: str) -> dict[str, Any]:
    benchmark = run.benchmarks[-1] if run.benchmarks else {}
    return benchmark.get(side) or {}
