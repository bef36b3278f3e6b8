"""The kernels of packed matrices: each pattern beside our dense kernel of the same type, torch's, and the memory.

One matrix (4096 x 4096 unless said), batch 1, 2, 4, 8 and 16. Weights come from memory: every pass goes over copies
that are GIGABYTES together, and all the others run before it comes again, so several times the last-level cache lies
between two readings of the same bytes. Passes are timed in turn; the memory is read alone in every round. One line of
JSON for each pattern, type and batch:

    over_dense    time of the dense kernel / time of this one, the median of the rounds
    ceiling       the same in bytes: what it could be at best
    share         bytes a second of this kernel / of the memory alone, the median
    probe         GB/s of the memory alone, median of the rounds
    seconds       of one product, median

(Not kernels.py: transformers would import that in place of the package of this name.)

The machine must be quiet. Bandwidth of shared machines moves within minutes: only ratios of one run count.

usage: cpu_kernels.py [--rows 4096] [--columns 4096] [--batches 1,2,4,8,16] [--patterns 0.5,2:4,tiles-0.5]
                  [--types bf16,int8] [--gigabytes 0.5] [--rounds 7] [--inputs bfloat16] [--out ROWS.jsonl]
"""

import argparse
import json
from pathlib import Path
from statistics import median

import torch

from prunus.benchmark.machine import machine
from prunus.runtime import TYPES
from prunus.runtime.native import kernels
from prunus.runtime.packed import to_codes
from prunus.runtime.timing import Pass, dense_products, in_turn, packed_as, products, random_matrix, reading

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


def measure(args: argparse.Namespace, batch: int) -> list[dict[str, object]]:
    """All patterns and types at one batch size, in turn."""
    x_MI = inputs(args, batch)
    passes = {"memory": reading(args.bytes)}
    for kind in args.types:
        passes[f"torch {kind}"] = torchs(args, kind, batch)
        for pattern in ("0", *args.patterns):
            packed = packed_as(pattern, TYPES[kind], args.rows, args.columns)
            passes[f"{pattern} {kind}"] = products(packed, x_MI, args.bytes)
    seconds = in_turn(passes, args.rounds)
    return [row(name, batch, passes, seconds) for name in passes if name != "memory"]


def row(name: str, batch: int, passes: dict[str, Pass], seconds: dict[str, list[float]]) -> dict[str, object]:
    pattern, kind = name.split()
    dense, this, memory = passes[f"0 {kind}"], passes[name], passes["memory"]
    each = [one / this.count for one in seconds[name]]
    rounds = list(zip(each, seconds[f"0 {kind}"], seconds["memory"], strict=True))
    size, bandwidth = this.num_bytes / this.count, [memory.num_bytes / one for one in seconds["memory"]]
    return {
        "pattern": pattern,
        "type": kind,
        "batch": batch,
        "over_dense": round(median(other / dense.count / own for own, other, _ in rounds), 3),
        "ceiling": round(dense.num_bytes / dense.count / size, 3),
        "share": round(median(size / own / (memory.num_bytes / alone) for own, _, alone in rounds), 3),
        "probe": round(median(bandwidth) / 1e9, 1),
        "seconds": median(each),
        "rounds": len(rounds),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--columns", type=int, default=4096)
    parser.add_argument("--batches", default="1,2,4,8,16")
    parser.add_argument("--patterns", default=",".join(PATTERNS))
    parser.add_argument("--types", default=",".join(TYPES))
    parser.add_argument("--gigabytes", type=float, default=0.5)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--inputs", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    args.bytes, args.types, args.patterns = int(args.gigabytes * 1e9), args.types.split(","), args.patterns.split(",")
    native = kernels()
    assert native is not None, "the kernels were not built"
    about = {"level": native.level, "threads": torch.get_num_threads(), "inputs": args.inputs}
    about |= {"shape": [args.rows, args.columns], **{key: machine()[key] for key in ("cpu", "torch", "commit")}}
    for batch in map(int, args.batches.split(",")):
        for line in measure(args, batch):
            text = json.dumps(line | about)
            print(text, flush=True)
            if args.out:
                with args.out.open("a", encoding="utf-8") as file:
                    file.write(text + "\n")


if __name__ == "__main__":
    main()
