"""The dense and the smaller model next to each other, repetition by repetition, whatever the engine.

Repetitions interleave the two models and alternate who goes first, since a machine's speed drifts by more in minutes
than most speed-ups are worth; only ratios paired within one repetition become a claim.
"""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Protocol

from prunus.benchmark.machine import machine
from prunus.benchmark.statistics import percentiles, speedup, verdict
from prunus.errors import UserError
from prunus.progress import progress

WARM_UP = 4  # tokens


@dataclass(frozen=True, slots=True)
class Times:
    """One generation, in seconds: the prompt's forward, request to first token, every later token."""

    prefill: float
    first_token: float
    steps: list[float]


class Runner(Protocol):
    """One loaded model that can be timed. `vocabulary` is the number of its token ids."""

    vocabulary: int

    def generate(self, prompt: list[int], new_tokens: int) -> Times:
        """Generate exactly `new_tokens` greedy tokens, end-of-sequence or not, and time each part of it."""
        ...

    def sizes(self) -> dict[str, Any]:
        """path, bytes_on_disk, parameters, decode_bytes_per_token, and what is known of peak memory."""
        ...


def check_counts(*, prompt_tokens: int, new_tokens: int, repetitions: int, threads: int) -> None:
    """Raise UserError for a count below the least that can be measured."""
    least = {"prompt_tokens": (prompt_tokens, 1), "new_tokens": (new_tokens, 2)}
    least |= {"repetitions": (repetitions, 1), "threads": (threads, 1)}
    for name, (given, minimum) in least.items():
        if given < minimum:
            raise UserError(f"{name} is {given}: give a whole number of at least {minimum}")


def check_length(name: str, longest: int | None, *, prompt_tokens: int, new_tokens: int) -> None:
    """Raise UserError when a model cannot read that many tokens."""
    asked = prompt_tokens + new_tokens
    if longest is not None and asked > longest:
        raise UserError(
            f"{prompt_tokens} prompt and {new_tokens} new tokens are {asked}, and {name} reads at most "
            f"{longest}: ask for fewer"
        )


def compare(
    runners: Mapping[str, Runner], *, prompt_tokens: int, new_tokens: int, repetitions: int, seed: int
) -> dict[str, Any]:
    """Time "model" and, where it is there, "dense"; returns both sides, their paired ratios, and what may be claimed.

    The prompt is of uniform random token ids: the time of a dense forward does not depend on the text.
    """
    prompts = {role: _prompt(runner.vocabulary, prompt_tokens, seed) for role, runner in runners.items()}
    with progress("Warming up", len(runners)) as advance:
        for role, runner in runners.items():
            runner.generate(prompts[role], min(new_tokens, WARM_UP))
            advance(1)
    times = _interleaved(runners, prompts, new_tokens, repetitions)
    sides = {role: _side(runner.sizes(), times[role], prompt_tokens) for role, runner in runners.items()}
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "batch": 1,
        "prompt_tokens": prompt_tokens,
        "prompt": f"uniform random token ids, seed {seed}",
        "new_tokens": new_tokens,
        "repetitions": repetitions,
        "energy": "not measured",
        "environment": machine(),
        "model": sides["model"],
        "dense": sides.get("dense"),
        **_comparison(sides, times),
    }


def _prompt(vocabulary: int, tokens: int, seed: int) -> list[int]:
    return random.Random(seed).choices(range(vocabulary), k=tokens)


def _interleaved(
    runners: Mapping[str, Runner], prompts: Mapping[str, list[int]], new_tokens: int, repetitions: int
) -> dict[str, list[Times]]:
    """The times of every model and repetition, the order reversed every other repetition."""
    times: dict[str, list[Times]] = {role: [] for role in runners}
    with progress("Benchmark", repetitions * len(runners)) as advance:
        for repetition in range(repetitions):
            for role in sorted(runners, reverse=repetition % 2 == 1):
                times[role].append(runners[role].generate(prompts[role], new_tokens))
                advance(1)
    return times


def _side(sizes: dict[str, Any], times: Sequence[Times], prompt_tokens: int) -> dict[str, Any]:
    """What is said of one model; TPOT percentiles stand on every decode step of every repetition."""
    tpot = percentiles([step for one in times for step in one.steps])
    return {
        **sizes,
        "ttft_seconds": percentiles([one.first_token for one in times]),
        "tpot_seconds": tpot,
        "prefill_tokens_per_second": prompt_tokens / percentiles([one.prefill for one in times])["p50"],
        "decode_tokens_per_second": 1 / tpot["p50"],
        "decode_gigabytes_per_second": sizes["decode_bytes_per_token"] / tpot["p50"] / 1e9,
        "repetitions": [
            {"prefill_seconds": one.prefill, "ttft_seconds": one.first_token, "decode_seconds": sum(one.steps)}
            for one in times
        ],
    }


def _comparison(sides: dict[str, Any], times: dict[str, list[Times]]) -> dict[str, Any]:
    if "dense" not in sides:
        return {"speedup": None, "verdict": None}
    dense, model = times["dense"], times["model"]
    prefill = speedup([one.prefill for one in dense], [one.prefill for one in model])
    decode = speedup([sum(one.steps) for one in dense], [sum(one.steps) for one in model])
    zeros_only = sides["dense"]["parameters"] == sides["model"]["parameters"]
    return {
        "speedup": {"prefill": prefill, "decode": decode},
        "verdict": verdict(prefill, decode, zeros_only=zeros_only),
    }
