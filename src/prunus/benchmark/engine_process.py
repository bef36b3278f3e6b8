"""`measure_exported`: exported models in their own engine, each in a process of its own."""

from contextlib import ExitStack
from typing import Any

import torch

from prunus.benchmark.paired import Times, check_counts, check_length, compare
from prunus.engines import Installed, require
from prunus.engines.worker import Worker, bytes_of
from prunus.exporting.exported import Exported
from prunus.progress import progress

ROOM = 8  # tokens of a context beyond those that are asked for


class EngineRunner:
    """An exported model in a process of its engine. The engine's own settings, but for threads and context."""

    def __init__(self, worker: Worker, exported: Exported, context: int, threads: int) -> None:
        self.worker, self.exported = worker, exported
        self.size = bytes_of(exported.load)
        self.loaded = worker.load(exported.load, context=context, threads=threads)
        self.vocabulary = int(self.loaded["vocabulary"])

    def generate(self, prompt: list[int], new_tokens: int) -> Times:
        """Exactly `new_tokens` greedy tokens after the prompt; EngineError when the engine hangs or dies."""
        request = {"do": "generate", "prompt": prompt, "new_tokens": new_tokens}
        told = self.worker.ask(request, timeout=self.worker.patience(self.size * (1 + new_tokens // 100)))
        return Times(told["prefill"], told["first_token"], told["steps"])

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
) -> dict[str, Any]:
    """What `measure` tells, of exported models in their engine. Raises UserError before anything is loaded."""
    asked = {"prompt_tokens": prompt_tokens, "new_tokens": new_tokens}
    threads = threads if threads is not None else torch.get_num_threads()
    check_counts(**asked, repetitions=repetitions, threads=threads)
    exports = {"model": model} | ({"dense": dense} if dense is not None else {})
    for one in exports.values():
        check_length(str(one.directory), one.step.get("max_length"), **asked)
    installed = require(model.engine)
    with ExitStack() as stack:
        runners = _load(exports, installed, stack, sum(asked.values()) + ROOM, threads)
        result = compare(runners, **asked, repetitions=repetitions, seed=0)
    return {**_conditions(model, installed, threads), **result}


def _load(
    exports: dict[str, Exported], installed: Installed, stack: ExitStack, context: int, threads: int
) -> dict[str, EngineRunner]:
    runners = {}
    with progress("Loading", len(exports)) as advance:
        for role, one in exports.items():
            worker = stack.enter_context(one.engine.started(installed))
            runners[role] = EngineRunner(worker, one, context, threads)
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
