"""The dense and the smaller model next to each other, repetition by repetition, whatever the engine.

Repetitions interleave the two models and alternate who goes first, since a machine's speed drifts by more in minutes
than most speed-ups are worth; only ratios paired within one repetition become a claim.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from typing import Any

from prunus.benchmark.energy import NOT_MEASURED, Meter, joules_per_token, metered
from prunus.benchmark.machine import machine
from prunus.benchmark.requests import RANDOM, Asked, Request, sizes_in_words
from prunus.benchmark.runner import Runner, Times
from prunus.benchmark.statistics import percentiles, speedup, verdict
from prunus.benchmark.together import compare_together
from prunus.progress import progress

WARM_UP = 4  # tokens

Requests = Mapping[str, Sequence[Request]]  # of each model: the same ones, or random ones of its vocabulary


@dataclass(frozen=True, slots=True)
class Timed:
    """A request that was carried out, and the joules that went by meanwhile, where they are counted."""

    request: Request
    times: Times
    joules: float | None


def compare(runners: Mapping[str, Runner], asked: Asked, meter: Meter | None) -> dict[str, Any]:
    """Time "model" and, where it is there, "dense"; returns both sides, their paired ratios, and what they allow."""
    requests = {role: asked.requests(runner.vocabulary) for role, runner in runners.items()}
    _warm_up(runners, requests)
    timed = _interleaved(runners, requests, asked.repetitions, meter)
    together = compare_together(runners, asked, meter)
    sides = {role: _side(runner.sizes(), timed[role]) for role, runner in runners.items()}
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "batch": 1,
        "prompt_tokens": sizes_in_words([len(one.prompt) for one in requests["model"]]),
        "prompt": asked.prompt,
        "new_tokens": sizes_in_words([one.new_tokens for one in requests["model"]]),
        "repetitions": asked.repetitions,
        "energy": meter.source if meter else NOT_MEASURED,
        "environment": machine(),
        "model": sides["model"],
        "dense": sides.get("dense"),
        **_comparison(sides, timed),
        "mixes": _mixes(timed),
        "concurrency": together,
    }


def _warm_up(runners: Mapping[str, Runner], requests: Requests) -> None:
    with progress("Warming up", len(runners)) as advance:
        for role, runner in runners.items():
            runner.generate(requests[role][0].prompt, min(requests[role][0].new_tokens, WARM_UP))
            advance(1)


def _interleaved(
    runners: Mapping[str, Runner], requests: Requests, repetitions: int, meter: Meter | None
) -> dict[str, list[Timed]]:
    """Every request of every repetition by each model next to the other, the order reversed every other time."""
    timed: dict[str, list[Timed]] = {role: [] for role in runners}
    number = len(requests["model"])
    with progress("Benchmark", repetitions * number * len(runners)) as advance:
        for turn in range(repetitions * number):
            for role in sorted(runners, reverse=(turn // number + turn % number) % 2 == 1):
                request = requests[role][turn % number]
                times, joules = metered(meter, partial(runners[role].generate, request.prompt, request.new_tokens))
                timed[role].append(Timed(request, times, joules))
                advance(1)
    return timed


def _side(sizes: dict[str, Any], timed: Sequence[Timed]) -> dict[str, Any]:
    """What is said of one model over all requests."""
    found = _latency(timed)
    return {
        **sizes,
        **found,
        "decode_gigabytes_per_second": sizes["decode_bytes_per_token"] / found["tpot_seconds"]["p50"] / 1e9,
        "repetitions": [
            {
                "prefill_seconds": one.times.prefill,
                "ttft_seconds": one.times.first_token,
                "decode_seconds": sum(one.times.steps),
            }
            for one in timed
        ],
    }


def _latency(timed: Sequence[Timed]) -> dict[str, Any]:
    """TPOT percentiles stand on every decode step of every repetition; energy is that of whole requests."""
    tpot = percentiles([step for one in timed for step in one.times.steps])
    return {
        "ttft_seconds": percentiles([one.times.first_token for one in timed]),
        "tpot_seconds": tpot,
        "prefill_tokens_per_second": 1
        / percentiles([one.times.prefill / len(one.request.prompt) for one in timed])["p50"],
        "decode_tokens_per_second": 1 / tpot["p50"],
        **joules_per_token([one.joules for one in timed], sum(one.request.new_tokens for one in timed)),
    }


def _mixes(timed: Mapping[str, Sequence[Timed]]) -> list[dict[str, Any]]:
    """The same for each mix alone; empty for random tokens, which are no mix."""
    names = list(dict.fromkeys(one.request.mix for one in timed["model"] if one.request.mix != RANDOM))
    return [
        _mix(name, {role: [t for t in side if t.request.mix == name] for role, side in timed.items()}) for name in names
    ]


def _mix(name: str, timed: dict[str, list[Timed]]) -> dict[str, Any]:
    requests = [one.request for one in timed["model"]]
    return {
        "mix": name,
        "prompts": len({tuple(one.prompt) for one in requests}),
        "prompt_tokens": sizes_in_words([len(one.prompt) for one in requests]),
        "new_tokens": sizes_in_words([one.new_tokens for one in requests]),
        "model": _latency(timed["model"]),
        "dense": _latency(timed["dense"]) if "dense" in timed else None,
        "speedup": _speedups(timed) if "dense" in timed else None,
    }


def _speedups(timed: Mapping[str, Sequence[Timed]]) -> dict[str, dict[str, Any]]:
    dense, model = ([one.times for one in timed[role]] for role in ("dense", "model"))
    return {
        "prefill": speedup([one.prefill for one in dense], [one.prefill for one in model]),
        "decode": speedup([sum(one.steps) for one in dense], [sum(one.steps) for one in model]),
    }


def _comparison(sides: dict[str, Any], timed: dict[str, list[Timed]]) -> dict[str, Any]:
    if "dense" not in sides:
        return {"speedup": None, "verdict": None}
    ratios = _speedups(timed)
    zeros_only = sides["dense"]["parameters"] == sides["model"]["parameters"]
    return {"speedup": ratios, "verdict": verdict(ratios["prefill"], ratios["decode"], zeros_only=zeros_only)}
