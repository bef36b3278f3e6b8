"""What people read: tables on stderr. The figures are the same as in the JSON on stdout."""

import math
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from prunus.models.families import FAMILIES
from prunus.progress import console, say
from prunus.result import Run
from prunus.shrinking import LAYER_SCORES, WIDTH_SCORES
from prunus.shrinking.expert_scores import EXPERT_SCORES
from prunus.sparsity import METHODS
from prunus.steps.estimate import Estimate
from prunus.terminal.engines import show_exported
from prunus.terminal.quantized import show_quantized
from prunus.terminal.shapes import show_shrunk
from prunus.terminal.table import empty_table

MB = 1e6
WIDTHS, EXPERTS = WIDTH_SCORES.values(), EXPERT_SCORES.values()
TESTS_OF_FAMILIES = (
    "a tiny random model of three blocks, saved by transformers in several shards",
    "the logits of the block-by-block run equal those of transformers",
    "every matrix of every block is found",
    "pruned to 2:4, written and loaded by plain transformers in a fresh process, it gives the same logits",
    "only the planned matrices have changed, and each of them is 2:4 everywhere",
)


def method_rows() -> list[dict[str, Any]]:
    """The table of methods, ready for JSON."""
    return [
        {
            "method": name,
            "paper": method.paper,
            "needs": list(method.needs) or ["weights only"],
            "updates kept weights": method.updates,
            "cost": method.cost,
            "when": method.when,
            "patterns": ["unstructured (row, matrix)", "N:M", "tiles"],
        }
        for name, method in METHODS.items()
    ]


def show_methods() -> None:
    table = Table(title="Pruning methods; all take unstructured, N:M and tile patterns", show_lines=True)
    for column in ("method", "idea", "paper", "needs", "cost", "when to use"):
        table.add_column(column)
    for name, method in METHODS.items():
        table.add_row(name, method.idea, method.paper, ", ".join(method.needs) or "weights", method.cost, method.when)
    console.print(table)


def score_rows() -> list[dict[str, Any]]:
    """The tables of scores for `shrink`, ready for JSON."""
    widths = [{"of": "channels and KV groups", "score": s.name, "paper": s.paper, "when": s.when} for s in WIDTHS]
    layers = [{"of": "layers", "score": s.name, "paper": s.paper, "when": s.when} for s in LAYER_SCORES.values()]
    return [*layers, *widths] + [{"of": "experts", "score": s.name, "paper": s.paper, "when": s.when} for s in EXPERTS]


def show_scores() -> None:
    table = Table(title="Scores of whole units, for `prunus shrink`", show_lines=True)
    for column in ("score", "of", "paper", "when to use"):
        table.add_column(column)
    for row in score_rows():
        table.add_row(row["score"], row["of"], row["paper"], row["when"])
    console.print(table)


def show_models() -> None:
    table = Table(title="Model families that are tested")
    for column in ("family", "models", "its blocks"):
        table.add_column(column)
    for family in FAMILIES:
        table.add_row(family.family, family.name, family.shape)
    console.print(table)
    console.print(f"Each with {'; '.join(TESTS_OF_FAMILIES)}.")
    console.print("Other decoder-only families of the usual shape work too; what is not understood is refused by name.")


def show_sparsified(run: Run) -> None:
    step = run.last_step
    rows: dict[str, list[dict[str, Any]]] = {}
    for row in step["matrices"]:
        rows.setdefault(row["projection"], []).append(row)
    table = empty_table(f"{run.path}", "projection", "pattern", "matrices", "sparsity", "error (mean)", "error (worst)")
    for projection, found in rows.items():
        errors = [row["error"] for row in found]
        patterns = sorted({row["pattern"] for row in found})
        table.add_row(
            projection,
            patterns[0] if len(patterns) == 1 else f"{len(patterns)} patterns",
            str(len(found)),
            f"{sum(row['sparsity'] for row in found) / len(found):.4f}",
            f"{sum(errors) / len(errors):.4f}",
            f"{max(errors):.4f}",
        )
    console.print(table)
    sparsity = step["sparsity"]
    console.print(
        f"{'already done: ' if run.reused else ''}{sparsity['pruned_matrices']:.2%} of the pruned matrices and "
        f"{sparsity['all_parameters']:.2%} of all parameters are zero; {step['seconds']:.0f} s, peak "
        f"{step['peak_memory_bytes'] / 2**30:.2f} GiB, forward in {step['dtype']}."
    )
    if isinstance(step["allocation"], dict):
        from prunus.reporting.text import allocation  # here, so that other tables do not wait for the plots

        console.print(allocation(step["allocation"]), markup=False, highlight=False, soft_wrap=True)


def show_recovered(run: Run) -> None:
    step = run.last_step
    before, after = step["held_out_before"], step["held_out_after"]
    table = empty_table(f"{run.path}", "on held-out text", "before", "after")
    if "kl" in after:
        table.add_row("KL to the teacher, nats per token", f"{before['kl']:.4f}", f"{after['kl']:.4f}")
    table.add_row("perplexity", *(f"{math.exp(min(side['nll'], 700)):.3f}" for side in (before, after)))
    console.print(table)
    zeros = sum(row["after"] for row in step["zeros"])
    console.print(
        f"{'already done: ' if run.reused else ''}{step['tokens']:,} tokens in {step['steps']} steps, "
        f"{step['tokens_per_second']:.0f} tokens/s, {step['seconds']:.0f} s, peak "
        f"{step['peak_memory_bytes'] / 2**30:.2f} GiB, {step['method']}, {step['dtype']}; {zeros:,} zeros in "
        f"{len(step['zeros'])} pruned matrices, none came back.",
        markup=False,
    )
    if step.get("stopped"):
        say([f"stopped early, {step['stopped']}; the weights are those of step {step['best_step']}."])


def show_estimate(estimate: Estimate, remarks: list[str]) -> None:
    table = empty_table("Dry run: nothing was touched", "projection", "pattern", "shape", "matrices", "zeros")
    for row in estimate.by_projection:
        table.add_row(
            row["projection"],
            row["pattern"],
            "x".join(map(str, row["shape"])),
            str(row["matrices"]),
            f"{row['zeros']:,}",
        )
    console.print(table)
    console.print(
        f"{estimate.zeros:,} of {estimate.weights:,} weights in {estimate.matrices} matrices would become zero "
        f"({estimate.parameters:,} parameters in all); about {estimate.memory_bytes / 2**30:.1f} GiB and "
        f"{estimate.seconds / 60:.1f} minutes (within a factor of two), {estimate.sequences_in_memory} of "
        f"{estimate.sequences} sequences waiting in memory between stages, the others on disk."
    )
    say(remarks)


def show_steps(run: Run) -> None:
    """What each step of a recipe gave, in order."""
    for step in run.steps:
        if step["step"] == "evaluate":
            show_evaluations(step["results"])
        elif step["step"] == "bench":
            show_bench(step)
        elif step["step"] == "report":
            console.print(f"report: {step['output']}", markup=False, soft_wrap=True)
        else:
            show = {
                "sparsify": show_sparsified,
                "shrink": show_shrunk,
                "recover": show_recovered,
                "quantize": show_quantized,
                "export": show_exported,
            }[step["step"]]
            show(Run.open(Path(step["out"]), reused=step["reused"]))
    if run.stopped:
        console.print(f"stopped early: {run.stopped}.", markup=False, soft_wrap=True)


def show_evaluations(results: list[dict[str, Any]]) -> None:
    for result in results:
        {"perplexity": _show_perplexity, "choices": _show_choices, "continuations": show_continuations}.get(
            result["kind"], _show_any
        )(result)


def _show_perplexity(result: dict[str, Any]) -> None:
    against = result.get("against")
    line = (
        f"perplexity {result['perplexity']:.3f}"
        + (f" (dense {against['perplexity']:.3f}), KL {against['kl']:.4f} nats," if against else "")
        + (f" top-1 agreement {against['top1_agreement']:.1%}" if against else "")
    )
    console.print(
        f"{line}  [{result['dataset']}, {result['windows']} windows of {result['window']}, {result['dtype']}, "
        f"{result['engine']}, {result['threads']} threads]",
        markup=False,
    )


def _show_choices(result: dict[str, Any]) -> None:
    against, error = result.get("against"), result["acc_norm_standard_error"]
    console.print(
        f"choices: acc_norm {result['acc_norm']:.3f}"
        + (f" +- {error:.3f}" if error is not None else "")
        + (f" (dense {against['acc_norm']:.3f})" if against else "")
        + f", acc {result['acc']:.3f}  [{result['dataset']}, {result['dtype']}]",
        markup=False,
    )


def _show_any(result: dict[str, Any]) -> None:
    against = result.get("against")
    dense = f" (dense {against['metrics']})" if against else ""
    console.print(f"{result['kind']} {result['dataset']}: {result['metrics']}{dense}", markup=False)


def show_continuations(result: dict[str, Any]) -> None:
    table = Table(title="Greedy continuations", show_lines=True)
    for column in ("prompt", "dense", "sparse"):
        table.add_column(column, ratio=1)
    for item in result["items"]:
        table.add_row(*(item[key].replace("[", "\\[") for key in ("prompt", "dense", "sparse")))
    console.print(table)


def show_bench(result: dict[str, Any]) -> None:
    sides = _sides(result)
    title = f"{result['engine']}, {result['prompt_tokens']} prompt and {result['new_tokens']} new tokens"
    table = empty_table(f"{title}, {result['dtype']}, {result['threads']} threads", "", *sides)
    table.add_row("first token, s (p50)", *(f"{side['ttft_seconds']['p50']:.3f}" for side in sides.values()))
    table.add_row("prefill, tokens/s", *(f"{side['prefill_tokens_per_second']:.1f}" for side in sides.values()))
    table.add_row("decode, tokens/s", *(f"{side['decode_tokens_per_second']:.1f}" for side in sides.values()))
    table.add_row("peak memory, GiB", *(_gib(side["peak_memory_bytes"]) for side in sides.values()))
    table.add_row("energy, J a new token", *(_joules(side) for side in sides.values()))
    console.print(table)
    _show_parts("By mix", "mix", result["mixes"])
    _show_parts("At the same time", "requests", result["concurrency"])
    console.print(result["verdict"] or "No verdict: name the dense model with --against to compare.", markup=False)


def _sides(result: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {role: result[role] for role in ("dense", "model") if result[role]}


def _joules(side: dict[str, Any]) -> str:
    return f"{side['joules_per_token']:.3f}" if "joules_per_token" in side else "not measured"


def _show_parts(title: str, name: str, rows: list[dict[str, Any]]) -> None:
    """A line for each part of a benchmark and each model; nothing where there are no parts."""
    if not rows:
        return
    seconds = ("p50", "p95", "p99")
    table = empty_table(
        title, name, "model", "tokens/s", "first token, s (p50, p95, p99)", "each token, s (p50, p95, p99)"
    )
    for row in rows:
        for role, side in _sides(row).items():
            speed = side.get("tokens_per_second", side.get("decode_tokens_per_second"))
            times = (" ".join(f"{side[key][p]:.3f}" for p in seconds) for key in ("ttft_seconds", "tpot_seconds"))
            table.add_row(escape(str(row[name])), role, f"{speed:.1f}", *times)
    console.print(table)


def _gib(size: int | None) -> str:
    return "not known" if size is None else f"{size / 2**30:.2f}"
