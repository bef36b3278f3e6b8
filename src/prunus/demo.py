"""`prunus demo`: the whole road on a small real model, with nothing from elsewhere but the model itself.

Calibration is on the model's own samples, evaluation on the English text that every Python carries (`builtin`). A
second call finishes in seconds, because every step finds itself done.
"""

from pathlib import Path
from typing import Any

from rich.table import Table

from prunus.checkpoint import read_record
from prunus.demo_model import fetch_demo_model
from prunus.progress import console
from prunus.result import Run
from prunus.steps.bench import bench
from prunus.steps.evaluate import evaluate
from prunus.steps.profile import profile
from prunus.steps.report import report
from prunus.steps.sparsify import sparsify
from prunus.terminal.profile import show_profile
from prunus.terminal.tables import show_continuations

PROMPTS = ("The capital of France is", "To bake bread you need", "Python is a programming language that")
CALIBRATION: dict[str, Any] = {"calibration": ("self",), "samples": 64, "length": 256}
WINDOW: dict[str, Any] = {"text": ("builtin",), "length": 512, "windows": 32}
BENCH: dict[str, Any] = {"prompt_tokens": 256, "new_tokens": 32, "repetitions": 5}


def run_demo(out: Path) -> dict[str, Any]:
    """Profile, sparsify to 50%, evaluate, bench, report; returns the figures that the closing table shows."""
    dense = fetch_demo_model()
    show_profile(profile(dense))
    made = sparsify(dense, out, **CALIBRATION)
    results = evaluate(made.path, against=str(dense), skip_done=True, prompts=PROMPTS, **WINDOW)
    speed = bench(made.path, against=str(dense), skip_done=True, **BENCH)
    page = report([made.path])
    figures = _figures(made, results, speed)
    _show(figures, results)
    console.print(f"Everything above, with its conditions: {page}", markup=False)
    return {"step": "demo", "out": str(made.path), "report": str(page), "reused": made.reused, **figures}


def _figures(made: Run, results: list[dict[str, Any]], speed: dict[str, Any]) -> dict[str, Any]:
    text = next(result for result in results if result["kind"] == "perplexity")
    step = (read_record(made.path) or {})["history"][-1]
    return {
        "method": step["settings"]["method"],
        "pattern": step["settings"]["pattern"],
        "calibration": "the model's own samples, {samples} x {length} tokens".format(**CALIBRATION),
        "sparsify_seconds": step["seconds"],
        "peak_memory_bytes": step["peak_memory_bytes"],
        "sparsity": step["sparsity"],
        "text": f"{text['dataset']}, {text['windows']} windows of {text['window']} tokens, {text['dtype']}",
        "perplexity": text["perplexity"],
        "dense_perplexity": text["against"]["perplexity"],
        "kl": text["against"]["kl"],
        "top1_agreement": text["against"]["top1_agreement"],
        "verdict": speed["verdict"],
    }


def _show(figures: dict[str, Any], results: list[dict[str, Any]]) -> None:
    table = Table(title="SmolLM2-135M-Instruct, dense against sparse", title_justify="left")
    for column in ("", "dense", "sparse"):
        table.add_column(column)
    table.add_row("zeros in pruned matrices", "0%", f"{figures['sparsity']['pruned_matrices']:.1%}")
    table.add_row("zeros in all parameters", "0%", f"{figures['sparsity']['all_parameters']:.1%}")
    table.add_row("perplexity", f"{figures['dense_perplexity']:.2f}", f"{figures['perplexity']:.2f}")
    table.add_row("KL to dense, nats per token", "0", f"{figures['kl']:.3f}")
    table.add_row("same most likely token", "100%", f"{figures['top1_agreement']:.1%}")
    console.print(table)
    console.print(f"Text: {figures['text']}. Calibration: {figures['calibration']}.", markup=False)
    console.print(figures["verdict"], markup=False)
    show_continuations(next(result for result in results if result["kind"] == "continuations"))
