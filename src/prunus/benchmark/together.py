"""Several requests at the same time: tokens a second in total, and what each request waits for its own.

All requests of a round come at once, with random prompts of one length that differ from each other; the dense and the
smaller model take turns, round by round.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

from prunus.benchmark.energy import Meter, joules_per_token, metered
from prunus.benchmark.requests import Asked, random_request
from prunus.benchmark.runner import Runner, Times
from prunus.benchmark.statistics import percentiles, speedup
from prunus.progress import progress

Round = tuple[list[Times], float | None]  # the times of its requests, and joules


def compare_together(runners: Mapping[str, Runner], asked: Asked, meter: Meter | None) -> list[dict[str, Any]]:
    """One row for each number of requests at the same time; none when only one was asked for."""
    levels = asked.levels
    if not levels:
        return []
    with progress("Requests at the same time", len(levels)) as advance:
        rows = []
        for level in levels:
            rows.append(_row(level, _rounds(runners, level, asked, meter), asked.new_tokens))
            advance(1)
    return rows


def _rounds(runners: Mapping[str, Runner], level: int, asked: Asked, meter: Meter | None) -> dict[str, list[Round]]:
    """The rounds of each model; one before the first warms up."""
    prompts = {role: _prompts(runner.vocabulary, level, asked) for role, runner in runners.items()}

    def work(role: str) -> list[Times]:
        return runners[role].generate_together(prompts[role], asked.new_tokens)

    for role in runners:
        work(role)
    rounds: dict[str, list[Round]] = {role: [] for role in runners}
    for repetition in range(asked.repetitions):
        for role in sorted(runners, reverse=repetition % 2 == 1):
            rounds[role].append(metered(meter, partial(work, role)))
    return rounds


def _prompts(vocabulary: int, level: int, asked: Asked) -> list[list[int]]:
    sizes = {"prompt_tokens": asked.prompt_tokens, "new_tokens": asked.new_tokens}
    return [random_request(vocabulary, seed=seed, **sizes).prompt for seed in range(level)]


def _row(level: int, rounds: dict[str, list[Round]], new_tokens: int) -> dict[str, Any]:
    seconds = {role: [max(map(_end, times)) for times, _ in found] for role, found in rounds.items()}
    both = "dense" in rounds
    sides = {role: _side(found, seconds[role], level * new_tokens) for role, found in rounds.items()}
    return {
        "requests": level,
        "model": sides["model"],
        "dense": sides.get("dense"),
        "speedup": speedup(seconds["dense"], seconds["model"]) if both else None,
    }


def _end(times: Times) -> float:
    """Seconds until a request's last token."""
    return times.first_token + sum(times.steps)


def _side(rounds: list[Round], seconds: list[float], new_tokens: int) -> dict[str, Any]:
    """`tokens_per_second`: all that a round wrote, over its time with the reading of the prompts; the median round."""
    requests = [one for times, _ in rounds for one in times]
    return {
        "tokens_per_second": new_tokens / percentiles(seconds)["p50"],
        "ttft_seconds": percentiles([one.first_token for one in requests]),
        "tpot_seconds": percentiles([step for one in requests for step in one.steps]),
        **joules_per_token([joules for _, joules in rounds], new_tokens * len(rounds)),
    }
