"""What packing a model would gain on this machine, before anything is pruned: `prunus profile --engine sparse-cpu`.

A few blocks of the model, in each pattern and type, decode in turn for some seconds, and so do the output head, the
model without its blocks, and the memory alone. What a token of the whole model takes is added up from them in every
round: memory is not equally fast from one second to the next, and the spread is told.
"""

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median, quantiles
from typing import Any

import torch

from prunus.errors import UserError
from prunus.exporting.sparse_directory import Packer, Source
from prunus.models import StreamedModel
from prunus.progress import progress
from prunus.runtime import TYPES
from prunus.runtime.native import kernels
from prunus.runtime.timing import Pass, in_turn, reading
from prunus.steps.stand_in import StandIn, dense_stand_in, head_by_torch, packed_head, packed_stand_in, without_blocks

ADVISES = "sparse-cpu"
PATTERNS = ("0", "0.5", "0.6", "0.7", "0.8", "2:4", "tiles-0.5", "tiles-0.8")
LLAMA_CPP_SHARE = 0.8  # of the bandwidth, as it reaches at best
LLAMA_CPP_LEAST = 0.5  # of that, as it reached where it was slowest: docs/sparse-cpu.md
BITS_OF_4 = 4.5  # Q4_0: 32 weights of 4 bits and a scale of 16
MEMORY, OUTSIDE = "memory", "outside"  # passes beside those of candidates
_SECONDS, _LEAST_ROUNDS = 6.0, 5
_READ_BYTES = 160_000_000


@dataclass(frozen=True, slots=True)
class Candidate:
    """One way to run the model: its blocks in a pattern, its head dense."""

    name: str
    pattern: str
    blocks: StandIn
    head: Pass

    @property
    def num_bytes(self) -> int:
        """What a token reads."""
        return self.blocks.num_bytes + self.head.num_bytes

    @property
    def passes(self) -> dict[str, Pass]:
        return {f"{self.name} {self.pattern}": self.blocks.token, f"head {self.name}": self.head}

    def seconds(self, timed: Mapping[str, list[float]]) -> list[float]:
        """Of a whole token, in each round."""
        rounds = zip(*(timed[name] for name in (OUTSIDE, *self.passes)), strict=True)
        return [outside + max(some - outside, 0.0) * self.blocks.times + head for outside, some, head in rounds]


@torch.inference_mode()
def advise(model: StreamedModel) -> dict[str, Any]:
    """Predicted decode speed (batch 1, bfloat16) of every pattern and type on this machine, and what it says.

    Raises UserError where prunus was installed without kernels, nothing of the model can be packed, or the blocks that
    are timed do not fit into memory.
    """
    native = kernels()
    if native is None:
        raise UserError("the kernels of packed models are not built here; install a C++ compiler, then prunus again.")
    *blocks, head = Packer(model, "int8").sources  # which has a head of its own, tied or not
    if not blocks:
        raise UserError(f"{model.checkpoint.path} has no matrix that could be packed: all of them are experts.")
    candidates = candidates_of(model, blocks, head)
    timed = _timed(passes_of(model, candidates))
    by_torch, *rows = (_row(one.name, one.pattern, one.seconds(timed), one.num_bytes) for one in candidates)
    memory = [_READ_BYTES / seconds for seconds in timed[MEMORY]]
    four_bits = _four_bits(candidates[0], memory)
    return {
        "engine": ADVISES,
        "level": native.level,
        "threads": torch.get_num_threads(),
        "bandwidth_gigabytes_per_second": median(memory) / 1e9,
        "rounds": len(memory),
        "seconds_outside_blocks": median(timed[OUTSIDE]),
        "rows": [by_torch, four_bits, *rows],
        "says": _verdicts(rows, four_bits),
    }


def candidates_of(model: StreamedModel, blocks: Sequence[Source], head: Source) -> list[Candidate]:
    """All of them, the dense one by torch first."""
    by_torch = head_by_torch(head)
    heads = {kind: packed_head(head, dtype) for kind, dtype in TYPES.items()}
    if model.spec.head is None:
        heads["bf16"] = by_torch  # a tied head is the embedding, which is not packed
    wanted = [(kind, pattern) for kind in TYPES for pattern in PATTERNS]
    found = [Candidate("transformers bf16", "0", dense_stand_in(model, blocks), by_torch)]
    with progress("Packing blocks", len(wanted)) as advance:
        for kind, pattern in wanted:
            stand_in = packed_stand_in(model, blocks, pattern, TYPES[kind])
            found.append(Candidate(f"sparse:{kind}", pattern, stand_in, heads[kind]))
            advance(1, f"{pattern} as {kind}")
    return found


def passes_of(model: StreamedModel, candidates: Iterable[Candidate]) -> dict[str, Pass]:
    """All that is timed in turn."""
    passes = {MEMORY: reading(_READ_BYTES), OUTSIDE: without_blocks(model)}
    for candidate in candidates:
        passes |= candidate.passes
    return passes


def _timed(passes: Mapping[str, Pass]) -> dict[str, list[float]]:
    """Seconds of every pass in as many rounds as fit into some seconds."""
    begin = time.perf_counter()
    for one in passes.values():
        one.seconds()  # runs some of them twice
    once = time.perf_counter() - begin
    return in_turn(passes, max(_LEAST_ROUNDS, int(_SECONDS / once)))


def _row(name: str, pattern: str, seconds: Sequence[float], size: int) -> dict[str, Any]:
    """`range`: tokens a second in all but the slowest and the fastest tenth of the rounds."""
    fastest, *_, slowest = quantiles(seconds, n=10, method="inclusive")
    return {
        "as": name,
        "pattern": pattern,
        "tokens_per_second": 1 / median(seconds),
        "range": [1 / slowest, 1 / fastest],
        "seconds": median(seconds),
        "bytes": size,
    }


def _four_bits(dense: Candidate, memory: Sequence[float]) -> dict[str, Any]:
    """What the dense model could do in llama.cpp, by its bytes; `seconds_at_worst` is not in other rows."""
    size = int(dense.num_bytes * BITS_OF_4 / 16)
    row = _row("gguf:q4_0 (at best)", "0", [size / (speed * LLAMA_CPP_SHARE) for speed in memory], size)
    return {**row, "seconds_at_worst": row["seconds"] / LLAMA_CPP_LEAST}


def _verdicts(rows: Iterable[dict[str, Any]], four_bits: dict[str, Any]) -> list[str]:
    """One sentence for each sparse row that something dense beats, or that beats everything dense."""
    rows = list(rows)
    dense = [four_bits, *(row for row in rows if row["pattern"] == "0")]
    return [_verdict(row, dense) for row in rows if row["pattern"] != "0"]


def _verdict(row: dict[str, Any], dense: list[dict[str, Any]]) -> str:
    name = f"{row['pattern']} as {row['as']}"
    smaller = [one["as"] for one in dense if one["bytes"] <= row["bytes"]]
    faster = [one["as"] for one in dense if one.get("seconds_at_worst", one["seconds"]) <= row["seconds"]]
    perhaps = [one["as"] for one in dense if one["seconds"] <= row["seconds"] and one["as"] not in faster]
    if better := [one for one in smaller if one in faster]:
        return f"{name}: dense {better[0]} is smaller and faster; do not prune for speed here."
    told = (smaller, "is smaller"), (faster, "is faster"), (perhaps, "may be faster: time it")
    beaten = "; ".join(f"dense {', '.join(names)} {how}" for names, how in told if names)
    return f"{name}: {beaten or 'smaller and faster than every dense one'}."
