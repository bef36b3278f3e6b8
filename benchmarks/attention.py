"""Attention of one new token: torch's, and the kernel that packed models decode with, in turn.

For each shape of heads and each number of positions, bfloat16, batch 1, one line of JSON: microseconds of both (medians
of the rounds) and the median of their ratios; and how far both are from float64. Keys and values are in the caches, as
they are not when a model's weights have just gone by: what a token spends is more.

usage: attention.py [--shapes 32/4x64,32/32x64,9/3x64,32/8x128] [--positions 128,256,1024,4096] [--rounds 50]
                    [--out ROWS.jsonl]
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from lines import add
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from prunus.benchmark.machine import machine
from prunus.runtime.native import kernels
from prunus.runtime.timing import Pass, in_turn


def measure(heads: int, groups: int, width: int, positions: int, rounds: int) -> dict[str, float]:
    native = kernels()
    assert native is not None, "the kernels were not built"
    torch.manual_seed(0)
    query = torch.randn(1, heads, 1, width).bfloat16()
    key, value = torch.randn(2, 1, groups, positions, width).bfloat16()
    exact = scaled_dot_product_attention(query.double(), key.double(), value.double(), enable_gqa=True)[:, :, 0]
    both: dict[str, Callable[[], Tensor]] = {
        "torch": lambda: scaled_dot_product_attention(query, key, value, enable_gqa=True)[:, :, 0],
        "ours": lambda: native.attend(query[:, :, 0], key, value, None, width**-0.5),
    }
    times = in_turn({name: Pass(run, 0) for name, run in both.items()}, rounds)
    told = {f"{name}_microseconds": round(median(times[name]) * 1e6, 1) for name in both}
    told |= {f"{name}_off": float((both[name]().double() - exact).abs().max()) for name in both}
    return told | {"times_faster": round(median(t / o for t, o in zip(*times.values(), strict=True)), 2)}


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default="32/4x64,32/32x64,9/3x64,32/8x128", help="heads / groups x width")
    parser.add_argument("--positions", default="128,256,1024,4096")
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    native = kernels()
    about = {"level": native.level if native else None, "threads": torch.get_num_threads(), "rounds": args.rounds}
    about |= {key: machine()[key] for key in ("cpu", "torch", "commit")}
    for shape in args.shapes.split(","):
        heads, groups, width = map(int, shape.replace("/", " ").replace("x", " ").split())
        for positions in map(int, args.positions.split(",")):
            found = measure(heads, groups, width, positions, args.rounds)
            add(args.out, {"shape": shape, "positions": positions} | found | about, show=True)


if __name__ == "__main__":
    main()
