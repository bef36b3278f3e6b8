"""The kernels of packed matrices: each pattern beside our dense kernel of the same type, torch's, and the memory.

One matrix (4096 x 4096 unless said), batch 1, 2, 4, 8 and 16. Weights come from memory: every pass goes over copies
that are GIGABYTES together, in one call, and all the others run before it comes again. Passes are timed in turn. Memory
of shared machines has states, 36 and 55 GB/s on one, and changes between them within seconds: the memory is read alone
before and after each pass, a pass during which it changed is left out, and what was timed in each state is told apart.
One line of JSON for each pattern, type, batch and state:

    state         "slow" or "fast" memory, or "one" where all readings are near each other
    over_dense    time of the dense kernel / time of this one, medians
    ceiling       the same in bytes: what it could be at best
    share         bytes a second of this kernel / of the memory alone beside it, the median
    probe         GB/s of the memory alone, median
    seconds       of one product, median of `passes`

(Not kernels.py: transformers would import that in place of the package of this name.)

The machine must be quiet. Only ratios of one run count.

usage: cpu_kernels.py [--rows 4096] [--columns 4096] [--batches 1,2,4,8,16] [--patterns 0.5,2:4,tiles-0.5]
                  [--types bf16,int8] [--gigabytes 0.25] [--rounds 40] [--inputs bfloat16] [--out ROWS.jsonl]
"""

import argparse
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch
from lines import add

from prunus.benchmark.machine import machine
from prunus.runtime import TYPES
from prunus.runtime.native import kernels
from prunus.runtime.packed import to_codes
from prunus.runtime.timing import Pass, dense_products, packed_as, products, random_matrix, reading

READ_BYTES = 128_000_000
APART = 1.4  # times as fast, as readings in two states are
PATTERNS = ("0.5", "0.6", "0.7", "0.8", "2:4", "tiles-0.5", "tiles-0.8")


def torchs(args: argparse.Namespace, kind: str, batch: int) -> Pass:
    """torch's own dense product: F.linear in bfloat16, `_weight_int8pack_mm` for int8."""
    weight_OI, x_MI = random_matrix(args.rows, args.columns, "0"), inputs(args, batch).bfloat16()
    if kind == "bf16":
        return dense_products(lambda one: torch.nn.functional.linear(x_MI, one), weight_OI, args.bytes)
    codes_OI, scale_O = to_codes(weight_OI, torch.int8)
    assert scale_O is not None
    scale_O = scale_O.bfloat16()
    return dense_products(lambda one: torch._weight_int8pack_mm(x_MI, one, scale_O), codes_OI, args.bytes)


def inputs(args: argparse.Namespace, batch: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, args.columns, generator=generator).to(getattr(torch, args.inputs))


@dataclass(frozen=True, slots=True)
class Timed:
    """Seconds of a pass, and bytes a second of the memory alone before and after it."""

    seconds: float
    before: float
    after: float


def measure(args: argparse.Namespace, batch: int) -> list[dict[str, object]]:
    """All patterns and types at one batch size, in turn, in each state of the memory."""
    x_MI = inputs(args, batch)
    passes: dict[str, Pass] = {}
    for kind in args.types:
        passes[f"torch {kind}"] = torchs(args, kind, batch)
        for pattern in ("0", *args.patterns):
            packed = packed_as(pattern, TYPES[kind], args.rows, args.columns)
            passes[f"{pattern} {kind}"] = products(packed, x_MI, args.bytes)
    found = by_state(between_readings(passes, args.rounds))
    return [row(name, batch, state, passes, timed) for state, timed in found.items() for name in passes]


def between_readings(passes: dict[str, Pass], rounds: int) -> dict[str, list[Timed]]:
    """Every pass in every round after the first."""
    memory, found = reading(READ_BYTES), {name: list[Timed]() for name in passes}
    for each in range(rounds + 1):
        for name, one in list(passes.items())[:: 1 if each % 2 else -1]:
            memory.run()  # what the pass before left in the caches goes
            before, seconds, after = (this.seconds() for this in (memory, one, memory))
            if each:
                found[name].append(Timed(seconds, READ_BYTES / before, READ_BYTES / after))
    return found


def by_state(found: dict[str, list[Timed]]) -> dict[str, dict[str, list[Timed]]]:
    """State -> pass -> what was timed in it. There are two where the readings lie far apart."""
    readings = sorted(speed for timed in found.values() for one in timed for speed in (one.before, one.after))
    low, high = readings[len(readings) // 20], readings[-len(readings) // 20]
    if high < APART * low:
        return {"one": found}
    middle = (low + high) / 2
    slow = {name: [one for one in timed if max(one.before, one.after) < middle] for name, timed in found.items()}
    fast = {name: [one for one in timed if min(one.before, one.after) > middle] for name, timed in found.items()}
    return {name: timed for name, timed in (("slow", slow), ("fast", fast)) if all(timed.values())}


def row(name: str, batch: int, state: str, passes: dict[str, Pass], timed: dict[str, list[Timed]]) -> dict[str, object]:
    pattern, kind = name.split()
    dense, this = passes[f"0 {kind}"], passes[name]
    seconds, beside = (
        median(one.seconds for one in timed[which]) / passes[which].count for which in (name, f"0 {kind}")
    )
    alone = [(one.before + one.after) / 2 for one in timed[name]]
    return {
        "pattern": pattern,
        "type": kind,
        "batch": batch,
        "state": state,
        "over_dense": round(beside / seconds, 3),
        "ceiling": round(dense.num_bytes / dense.count / (this.num_bytes / this.count), 3),
        "share": round(this.num_bytes / this.count / seconds / median(alone), 3),
        "probe": round(median(alone) / 1e9, 1),
        "seconds": seconds,
        "passes": len(alone),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--columns", type=int, default=4096)
    parser.add_argument("--batches", default="1,2,4,8,16")
    parser.add_argument("--patterns", default=",".join(PATTERNS))
    parser.add_argument("--types", default=",".join(TYPES))
    parser.add_argument("--gigabytes", type=float, default=0.25)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--inputs", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    args.bytes, args.types, args.patterns = int(args.gigabytes * 1e9), args.types.split(","), args.patterns.split(",")
    native = kernels()
    assert native is not None, "the kernels were not built"
    about = {"level": native.level, "threads": torch.get_num_threads(), "inputs": args.inputs}
    about |= {"shape": [args.rows, args.columns], **{key: machine()[key] for key in ("cpu", "torch", "commit")}}
    for batch in map(int, args.batches.split(",")):
        for row in measure(args, batch):
            add(args.out, row | about, show=True)


if __name__ == "__main__":
    main()
