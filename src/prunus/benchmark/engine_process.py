"""`measure_exported`: exported models in their own engine, each in a process of its own."""

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch

from prunus.benchmark.energy import find_meter
from prunus.benchmark.paired import compare
from prunus.benchmark.requests import Asked, Request
from prunus.benchmark.runner import Times
from prunus.engines import ENGINES, Engine, Installed, require
from prunus.engines.worker import Worker, bytes_of
from prunus.errors import UserError
from prunus.exporting.exported import Exported
from prunus.progress import progress

ROOM = 8  # tokens of a context beyond those that are asked for


class EngineRunner:
    """An exported model in a process of its engine. The engine's own settings, but for threads and room.

    `context` are the tokens of the longest request, `sequences` the most requests at the same time.
    """

    def __init__(self, worker: Worker, exported: Exported, context: int, sequences: int, threads: int) -> None:
        self.worker, self.exported = worker, exported
        self.size = bytes_of(exported.load)
        self.loaded = worker.load(exported.load, context=context, sequences=sequences, threads=threads)
        self.vocabulary = int(self.loaded["vocabulary"])

    def generate(self, prompt: list[int], new_tokens: int) -> Times:
        """Exactly `new_tokens` greedy tokens after the prompt; EngineError when the engine hangs or dies."""
        request = {"do": "generate", "prompt": prompt, "new_tokens": new_tokens}
        told = self.worker.ask(request, timeout=self.worker.patience(self.size * (1 + new_tokens // 100)))
        return Times(told["prefill"], told["first_token"], told["steps"])

    def generate_together(self, prompts: list[list[int]], new_tokens: int) -> list[Times]:
        """The same for requests that come at once."""
        request = {"do": "generate_together", "prompts": prompts, "new_tokens": new_tokens}
        work = self.size * (1 + len(prompts) * new_tokens // 100)
        told = self.worker.ask(request, timeout=self.worker.patience(work))
        return [Times(one["first_token"], one["first_token"], one["steps"]) for one in told["requests"]]

    def sizes(self) -> dict[str, Any]:
        """Of what the engine has loaded, and of its process."""
        known = {name: self.exported.step[name] for name in ("parameters", "decode_bytes_per_token")}
        peak = self.worker.ask({"do": "memory"}, timeout=self.worker.start)
        return {"path": str(self.exported.directory), "bytes_on_disk": self.size, **known, **peak}


def measure_exported(
    model: Exported,
    dense: Exported | None = None,
    *,
    prompt_tokens: int,
    new_tokens: int,
    repetitions: int,
    threads: int | None,
    concurrency: Sequence[int] = (1,),
    requests: Sequence[Request] = (),
) -> dict[str, Any]:
    """What `measure` tells, of exported models in their engine. Raises UserError before anything is loaded."""
    counts = {"prompt_tokens": prompt_tokens, "new_tokens": new_tokens, "repetitions": repetitions}
    asked = Asked(**counts, concurrency=concurrency, fixed=requests)
    threads = threads if threads is not None else torch.get_num_threads()
    asked.check(threads)
    _check_together(model.engine, asked)
    exports = {"model": model} | ({"dense": dense} if dense is not None else {})
    for one in exports.values():
        asked.check_fits(str(one.directory), one.step.get("max_length"))
    installed = require(model.engine)
    with ExitStack() as stack:
        runners = _load(exports, installed, stack, asked, threads)
        result = compare(runners, asked, find_meter("cpu"))
    return {**_conditions(model, installed, threads), **result}


def _check_together(engine: Engine, asked: Asked) -> None:
    if asked.levels and not engine.together:
        able = ", ".join(one.name for one in ENGINES.values() if one.together)
        raise UserError(
            f"{engine.name} runs one request at a time, and concurrency {asked.levels[-1]} was asked for: leave it "
            f"out, or bench in one of {able}."
        )


def _load(
    exports: dict[str, Exported], installed: Installed, stack: ExitStack, asked: Asked, threads: int
) -> dict[str, EngineRunner]:
    runners = {}
    with progress("Loading", len(exports)) as advance:
        for role, one in exports.items():
            worker = stack.enter_context(one.engine.started(installed))
            runners[role] = EngineRunner(worker, one, asked.longest + ROOM, max(asked.concurrency), threads)
            advance(1)
    return runners


def _conditions(model: Exported, installed: Installed, threads: int) -> dict[str, Any]:
    return {
        "engine": model.engine.name,
        "engine_version": installed.told,
        "dtype": model.step["type"],
        "device": "cpu",
        "threads": threads,
    }
