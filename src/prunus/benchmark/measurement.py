"""`measure`: model directories in the engine "transformers", in this process."""

from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import torch

from prunus.benchmark.energy import find_meter
from prunus.benchmark.memory import peak_memory
from prunus.benchmark.paired import compare
from prunus.benchmark.requests import Asked, Request
from prunus.benchmark.transformers_engine import TransformersRunner, Work
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
    concurrency: Sequence[int] = (1,),
    requests: Sequence[Request] = (),
    threads: int | None = None,
    dtype: str = "auto",
    device: str = "auto",
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """Measure latency, throughput and memory of a model directory, and its speed-up over a dense one.

    `new_tokens` counts the first token, so it is at least 2. Times are seconds, sizes bytes; "model" and "dense" hold
    the same fields, "speedup" holds paired ratios dense / model (above 1: the model is faster) of prefill and decode.
    "dense", "speedup" and "verdict" are None without `against`. `requests` take the place of a random prompt; "mixes"
    then tells them apart. "concurrency" has a row for each number of requests at the same time above 1. Raises
    UserError for arguments that cannot be met.
    """
    work = Work(
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        dtype=dtype,
        device=choose_device(device),
        threads=threads if threads is not None else torch.get_num_threads(),
        trust_remote_code=trust_remote_code,
    )
    counts = {"prompt_tokens": prompt_tokens, "new_tokens": new_tokens, "repetitions": repetitions}
    asked = Asked(**counts, concurrency=concurrency, fixed=requests)
    asked.check(work.threads)
    if work.dtype not in ("auto", *DTYPES):
        raise UserError(f"dtype is {work.dtype!r}: give one of auto, {', '.join(DTYPES)}")
    directories = {"model": Path(directory)} | ({"dense": Path(against)} if against is not None else {})
    for path in directories.values():
        asked.check_fits(str(path), _longest(path, work))
    memory = _for_each("Peak memory", directories, lambda path: peak_memory(path, work))
    before = torch.get_num_threads()
    torch.set_num_threads(work.threads)
    try:
        runners = _for_each("Loading", directories, lambda path: TransformersRunner(path, work))
        result = compare(runners, asked, find_meter(work.device))
    finally:
        torch.set_num_threads(before)
    sides = {role: result[role] | memory[role] for role in directories}
    return {**_conditions(runners["model"], work), **result, **sides}


def _longest(directory: Path, work: Work) -> int | None:
    """The longest text a model reads. Refuses, before any weight is read, what is not a causal language model."""
    config = open_checkpoint(directory, trust_remote_code=work.trust_remote_code).config
    check_config(config, trust_remote_code=work.trust_remote_code)
    return max_length(config)


def _for_each(what: str, given: Mapping[str, Given], make: Callable[[Given], Made]) -> dict[str, Made]:
    """What `make` gives for each model, under a progress bar."""
    made = {}
    with progress(what, len(given)) as advance:
        for role, value in given.items():
            made[role] = make(value)
            advance(1)
    return made


def _conditions(runner: TransformersRunner, work: Work) -> dict[str, Any]:
    return {
        "engine": "transformers",
        "engine_version": version("transformers"),
        "dtype": str(next(runner.model.parameters()).dtype).removeprefix("torch."),
        "device": work.device,
        "threads": work.threads,
    }
