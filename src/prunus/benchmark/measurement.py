"""`measure`: the dense and the smaller model run next to each other, repetition by repetition.

Repetitions interleave the two models and alternate who goes first, since a machine's speed drifts by more in minutes
than most speed-ups are worth; only ratios paired within one repetition become a claim.
"""

from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import torch

from prunus.benchmark.machine import machine
from prunus.benchmark.memory import peak_memory
from prunus.benchmark.statistics import percentiles, speedup, verdict
from prunus.benchmark.transformers_engine import Times, Work, decode_bytes, generate, load, prompt, vocabulary
from prunus.checkpoint import open_checkpoint
from prunus.errors import UserError
from prunus.machine_choice import DTYPES, choose_device
from prunus.models.limits import max_length
from prunus.models.skeleton import check_config
from prunus.progress import progress

Given = TypeVar("Given")
Made = TypeVar("Made")


def measure(
    directory: str | Path,
    *,
    against: str | Path | None = None,
    prompt_tokens: int = 512,
    new_tokens: int = 128,
    repetitions: int = 5,
    threads: int | None = None,
    dtype: str = "auto",
    device: str = "auto",
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """Measure latency, throughput and memory of a model directory, and its speed-up over a dense one.

    `new_tokens` counts the first token, so it is at least 2. Times are seconds, sizes bytes; "model" and "dense" hold
    the same fields, "speedup" holds paired ratios dense / model (above 1: the model is faster) of prefill and decode.
    "dense", "speedup" and "verdict" are None without `against`. Raises UserError for arguments that cannot be met.
    """
    work = Work(
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        dtype=dtype,
        device=choose_device(device),
        threads=threads if threads is not None else torch.get_num_threads(),
        trust_remote_code=trust_remote_code,
    )
    _check_work(work, repetitions)
    directories = {"model": Path(directory)} | ({"dense": Path(against)} if against is not None else {})
    for path in directories.values():
        _check_directory(path, work)
    memory = _for_each("Peak memory", directories, lambda path: peak_memory(path, work))
    before = torch.get_num_threads()
    torch.set_num_threads(work.threads)
    try:
        models = _for_each("Loading", directories, lambda path: load(path, work))
        times = _interleaved(models, work, repetitions)
    finally:
        torch.set_num_threads(before)
    sides = {role: _side(path, models[role], times[role], work) | memory[role] for role, path in directories.items()}
    conditions = _conditions(models["model"], work, repetitions)
    return {**conditions, "model": sides["model"], "dense": sides.get("dense"), **_comparison(sides, times)}


def _check_work(work: Work, repetitions: int) -> None:
    numbers = {"prompt_tokens": (work.prompt_tokens, 1), "new_tokens": (work.new_tokens, 2)}
    numbers |= {"repetitions": (repetitions, 1), "threads": (work.threads, 1)}
    for name, (given, least) in numbers.items():
        if given < least:
            raise UserError(f"{name} is {given}: give a whole number of at least {least}")
    if work.dtype not in ("auto", *DTYPES):
        raise UserError(f"dtype is {work.dtype!r}: give one of auto, {', '.join(DTYPES)}")


def _check_directory(directory: Path, work: Work) -> None:
    """Refuse, before any weight is read, what is not a causal language model or is too short for the work."""
    config = open_checkpoint(directory, trust_remote_code=work.trust_remote_code).config
    check_config(config, trust_remote_code=work.trust_remote_code)
    longest = max_length(config)
    asked = work.prompt_tokens + work.new_tokens
    if longest is not None and asked > longest:
        raise UserError(
            f"{work.prompt_tokens} prompt and {work.new_tokens} new tokens are {asked}, and {directory} reads at most "
            f"{longest}: ask for fewer"
        )


def _for_each(what: str, given: Mapping[str, Given], make: Callable[[Given], Made]) -> dict[str, Made]:
    """What `make` gives for each model, under a progress bar."""
    made = {}
    with progress(what, len(given)) as advance:
        for role, value in given.items():
            made[role] = make(value)
            advance(1)
    return made


def _interleaved(models: dict[str, Any], work: Work, repetitions: int) -> dict[str, list[Times]]:
    """The times of every model and repetition, the order reversed every other repetition, after a warm-up each."""
    ids = {role: prompt(vocabulary(model), work) for role, model in models.items()}
    with progress("Warming up", len(models)) as advance:
        for role, model in models.items():
            generate(model, ids[role], min(work.new_tokens, 4))
            advance(1)
    times: dict[str, list[Times]] = {role: [] for role in models}
    with progress("Benchmark", repetitions * len(models)) as advance:
        for repetition in range(repetitions):
            for role in sorted(models, reverse=repetition % 2 == 1):
                times[role].append(generate(models[role], ids[role], work.new_tokens))
                advance(1)
    return times


def _side(directory: Path, model: Any, times: Sequence[Times], work: Work) -> dict[str, Any]:
    """What is said of one model; TPOT percentiles stand on every decode step of every repetition."""
    tpot = percentiles([step for one in times for step in one.steps])
    read = decode_bytes(model)
    return {
        "path": str(directory),
        "bytes_on_disk": sum(file.stat().st_size for file in directory.glob("*.safetensors")),
        "parameters": sum(p.numel() for p in model.parameters()),
        "ttft_seconds": percentiles([one.first_token for one in times]),
        "tpot_seconds": tpot,
        "prefill_tokens_per_second": work.prompt_tokens / percentiles([one.prefill for one in times])["p50"],
        "decode_tokens_per_second": 1 / tpot["p50"],
        "decode_bytes_per_token": read,
        "decode_gigabytes_per_second": read / tpot["p50"] / 1e9,
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


def _conditions(model: Any, work: Work, repetitions: int) -> dict[str, Any]:
    return {
        "engine": "transformers",
        "engine_version": version("transformers"),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
        "device": work.device,
        "threads": work.threads,
        "batch": 1,
        "prompt_tokens": work.prompt_tokens,
        "prompt": f"uniform random token ids, seed {work.seed}",
        "new_tokens": work.new_tokens,
        "repetitions": repetitions,
        "energy": "not measured",
        "environment": machine(),
    }
