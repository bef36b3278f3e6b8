"""The tables of the page as rows of text; every number in its unit, its conditions in the same row."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from prunus.reporting import text
from prunus.reporting.record import Run, evaluation_conditions, evaluation_text
from prunus.reporting.shapes import shapes, step_in_words

Rows = list[list[str]]

# Metric names of evaluations, and how they are called on the page; anything else in an evaluation is a condition.
METRICS = {
    "perplexity": "perplexity",
    "nll": "negative log-likelihood, nats per token",
    "bits_per_byte": "bits per byte",
    "kl": "KL to the dense model, nats per token",
    "top1_agreement": "same top token as the dense model",
    "acc": "accuracy",
    "acc_norm": "accuracy, length-normalised",
}
# What a step says of itself after "auto" was decided; it stands in place of the setting.
RESOLVED = ("dtype", "device", "calibration", "allocation", "parameters")
SHAPES = ("request", "axes", "before", "after", "groups")  # of a step that shrinks; `shapes.py` says them in words
# Of a step that trained: drawn above, or a row for each matrix
SERIES = ("curve", "evaluations", "blocks", "zeros")
COMPARING = ("kl", "top1_agreement")
PARTS = ("prompt", "dense", "sparse")
ERROR = "_standard_error"
BENCHMARK_NUMBERS: dict[str, tuple[str, Callable[[float | None], str]]] = {
    "prefill_tokens_per_second": ("prefill", lambda value: text.fixed(value, 1, " tokens/s")),
    "decode_tokens_per_second": ("decode", lambda value: text.fixed(value, 1, " tokens/s")),
    "decode_gigabytes_per_second": ("weights read in decode", lambda value: text.fixed(value, 1, " GB/s")),
    "decode_bytes_per_token": ("weights read per token", text.size),
    "bytes_on_disk": ("on disk", text.size),
    "peak_memory_bytes": ("peak resident memory", text.size),
    "peak_gpu_memory_bytes": ("peak GPU memory", text.size),
}


@dataclass(frozen=True, slots=True)
class Evaluation:
    """One evaluation's kind, conditions and rows of (metric, dense, this model)."""

    kind: str
    conditions: str
    rows: Rows


@dataclass(frozen=True, slots=True)
class Step:
    """One step of the history, ready to print."""

    name: str
    facts: Rows
    settings: Rows
    environment: Rows


def conditions(run: Run) -> Rows:
    """Under which conditions this model was made: of what, how, where, with which versions."""
    steps = run.last_call or [{}]
    settings = {k: v for step in steps for k, v in (step.get("settings") or {}).items() if v is not None}
    resolved = settings | {name: found for name in RESOLVED if (found := _of_all(steps, name))}
    source = (steps[0].get("input") or {}).get("path")
    return _facts(
        {"made from": source, **resolved, **(steps[-1].get("environment") or {}), "prunus": run.record.get("prunus")}
    )


def _of_all(steps: list[dict[str, Any]], name: str) -> Any:
    """What the steps of one call say of themselves; a list where they differ."""
    found = [step[name] for step in steps if step.get(name)]
    return found if any(one != found[0] for one in found) else next(iter(found), None)


def _facts(values: dict[str, Any]) -> Rows:
    """Name and value of everything that is there: what is None or empty was neither asked for nor recorded."""
    return [[_words(name), _fact(name, value)] for name, value in values.items() if value not in (None, "", [], {})]


def _fact(name: str, value: Any) -> str:
    if name.endswith("_bytes"):
        return text.size(value)
    return text.seconds(value) if name == "seconds" else text.plain(value)


def evaluations(run: Run) -> list[Evaluation]:
    """Every evaluation: one row per metric (name, dense, this model), all else that was recorded as conditions."""
    return [_evaluation(evaluation) for evaluation in run.evaluations]


def _evaluation(evaluation: dict[str, Any]) -> Evaluation:
    against = evaluation.get("against") or {}
    # KL and agreement compare two models: they stand under `against`, and are said of this one.
    model = {name: value for name, value in against.items() if name.removesuffix(ERROR) in COMPARING} | evaluation
    dense = {name: value for name, value in against.items() if name.removesuffix(ERROR) not in COMPARING}
    rows = [[words, _metric(dense, one), _metric(model, one)] for one, words in METRICS.items() if one in model]
    beside = against.get("metrics") or {}
    rows += [
        [name, text.number(beside[name]) if name in beside else "-", text.number(value)]
        for name, value in (evaluation.get("metrics") or {}).items()
    ]
    return Evaluation(_words(str(evaluation.get("kind", "evaluation"))), _conditions_of(evaluation), rows)


def continuations(run: Run) -> list[Evaluation]:
    """Every set of continuations; its rows are prompt, the dense model's text, this model's."""
    return [
        Evaluation(
            "continuations",
            _conditions_of(one),
            [
                [text.plain(item.get(part) or text.ABSENT).strip("\n") for part in PARTS]
                for item in one.get("items") or []
            ],
        )
        for one in run.continuations
    ]


def _conditions_of(evaluation: dict[str, Any]) -> str:
    """Everything in an evaluation that is not a result, on one line."""
    apart = {f"{metric}{suffix}" for metric in METRICS for suffix in ("", ERROR)}
    apart |= {"kind", "against", "dataset", "window", "windows", "stride", "metrics", "items", "settings_key"}
    dataset = evaluation_text(evaluation) if "window" in evaluation else evaluation.get("dataset")
    rest = [f"{_words(name)} {text.plain(value)}" for name, value in evaluation.items() if name not in apart]
    return ", ".join([dataset, *rest] if dataset else rest)


def _metric(values: dict[str, Any], metric: str) -> str:
    if values.get(metric) is None:
        return "-"
    error = values.get(f"{metric}{ERROR}")
    return text.number(values[metric]) + (f" \N{PLUS-MINUS SIGN} {text.number(error, 2)}" if error is not None else "")


def benchmark(record: dict[str, Any]) -> Rows:
    """Throughput, traffic, disk and memory: name, dense, this model."""
    dense, model = record.get("dense") or {}, record.get("model") or {}
    rows = [
        [words, show(dense.get(name)), show(model.get(name))]
        for name, (words, show) in BENCHMARK_NUMBERS.items()
        if name in model and (name != "peak_gpu_memory_bytes" or model[name] is not None)
    ]
    counted = [_joules(side, record) if side else text.ABSENT for side in (dense, model)]
    return [*rows, ["energy", *counted]]


def _joules(side: dict[str, Any], record: dict[str, Any]) -> str:
    """Joules a written token, the reading of its prompt included, and the counter that they are from."""
    value = side.get("joules_per_token")
    return text.ABSENT if value is None else f"{text.number(value, 3)} J a new token ({record.get('energy')})"


def parts(record: dict[str, Any]) -> Rows:
    """Each mix of prompts, and each number of requests at the same time: name, model, tokens/s, percentiles."""
    named = [(f"mix {one['mix']}", one) for one in record.get("mixes") or []]
    named += [(f"{one['requests']} at the same time", one) for one in record.get("concurrency") or []]
    return [
        [name, words, *_speed(part[role])]
        for name, part in named
        for role, words in (("dense", "dense"), ("model", "this model"))
        if part.get(role)
    ]


def _speed(side: dict[str, Any]) -> list[str]:
    speed = side.get("tokens_per_second", side.get("decode_tokens_per_second"))
    times = (side.get(key) or {} for key in ("ttft_seconds", "tpot_seconds"))
    waits = [" / ".join(text.seconds(one.get(p)) for p in ("p50", "p95", "p99")) for one in times]
    return [text.fixed(speed, 1), *waits]


def matrices(run: Run) -> Rows:
    """Every pruned matrix: name, method, shape, pattern, requested and achieved sparsity, error, time, notes.

    Of a quantized one, the scheme stands for the pattern.
    """
    return [
        [
            str(one["name"]),
            text.plain(one["method"]),
            " \N{MULTIPLICATION SIGN} ".join(str(side) for side in one.get("shape") or []),
            text.plain(one.get("pattern") or one.get("scheme")),
            text.fixed(one.get("sparsity_requested"), 4),
            text.fixed(one.get("sparsity"), 4),
            text.number(one.get("error")),
            text.seconds(one.get("seconds")),
            text.plain(one.get("notes") or None),
        ]
        for one in run.matrices
    ]


def steps(run: Run) -> list[Step]:
    """The history, oldest first."""
    return [_step(run, step) for step in run.history]


def _step(run: Run, step: dict[str, Any]) -> Step:
    source = {f"input {name}": value for name, value in (step.get("input") or {}).items()}
    shown_elsewhere = ("step", "settings", "input", "environment", "matrices", "sensitivity", *SHAPES, *SERIES)
    shrunk = step_in_words(run, step) if step in run.shrink_steps else {}
    rest = {name: value for name, value in step.items() if name not in shown_elsewhere}
    return Step(
        name=str(step.get("step", "step")),
        facts=_facts(source | shrunk | rest),
        settings=_facts(step.get("settings") or {}),
        environment=_facts(step.get("environment") or {}),
    )


def comparison(runs: Sequence[Run]) -> Rows:
    """One row per run: name, what was made of it, perplexity, KL, decode speed-up, time, text."""
    return [_run(run) for run in runs]


def _run(run: Run) -> list[str]:
    against = run.perplexity.get("against") or {}
    measured = run.benchmarks[-1] if run.benchmarks else {}
    changed = shapes(run)
    times = [step["seconds"] for step in run.history if step.get("seconds") is not None]
    return [
        run.name,
        text.plain(run.method),
        text.plain(run.setting("pattern")),
        text.fixed(run.sparsity, 3) if run.sparsity is not None or not changed else "-",
        text.fixed(changed.parameters_left, 3) if changed else "-",
        changed.axes_in_words() if changed else "-",
        text.fixed(run.perplexity.get("perplexity")),
        text.fixed(against.get("perplexity")),
        text.fixed(against.get("kl"), 3),
        text.interval((measured.get("speedup") or {}).get("decode")),
        text.seconds(sum(times)) if times else text.ABSENT,
        evaluation_conditions(run.perplexity) if run.perplexity else text.ABSENT,
    ]


def _words(name: str) -> str:
    return name.removesuffix("_bytes").replace("_", " ")
