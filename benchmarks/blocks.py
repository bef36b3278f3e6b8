"""One token through the blocks of a packed model: their own code in torch, and kernels that stand in for it, in turn.

The model decodes greedily after a prompt of random tokens, batch 1; every round does so both ways, every other round
backwards. Products and attention are by the same kernels both times, so the difference is what torch and Python take
between them. One line of JSON:

    ours_ms, own_ms   milliseconds of a token, medians of the rounds' medians
    times_faster      own / ours, the median of the rounds, and the lowest and highest
    first_ms          the first token after the prompt, which finds out which blocks ours can stand in for, and the same
                      token by the blocks' own code
    blocks            that ours stands in for, and all

usage: blocks.py PACKED_DIRECTORY [--prompt-tokens 128] [--new-tokens 64] [--rounds 7] [--dtype bfloat16|float32]
                 [--out ROWS.jsonl]
"""

import argparse
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from lines import add
from transformers import AutoModelForCausalLM

from prunus.benchmark.machine import machine
from prunus.benchmark.transformers_engine import generate
from prunus.runtime.block import BlockDecoder
from prunus.runtime.native import kernels
from prunus.runtime.timing import Pass, in_turn


def set_own(decoders: list[BlockDecoder], own: bool) -> None:
    for decoder in decoders:
        decoder.block.__dict__.pop("forward", None)
        if not own:
            decoder.block.__dict__["forward"] = decoder


def measured(model: Any, decoders: list[BlockDecoder], args: argparse.Namespace) -> dict[str, Any]:
    prompt_1T = torch.arange(args.prompt_tokens).mul(7).remainder(90).add(3).unsqueeze(0)
    steps: dict[str, list[list[float]]] = {"ours": [], "own": []}

    def decode(name: str) -> None:
        set_own(decoders, name == "own")
        steps[name].append(generate(model, prompt_1T, args.new_tokens + 1).steps)

    in_turn({name: Pass(partial(decode, name), 0) for name in steps}, args.rounds)
    taken = {name: [median(one) * 1e3 for one in rounds[-args.rounds :]] for name, rounds in steps.items()}
    ratios = sorted(own / ours for ours, own in zip(taken["ours"], taken["own"], strict=True))
    return {
        **{f"{name}_ms": round(median(one), 2) for name, one in taken.items()},
        "times_faster": [round(one, 2) for one in (median(ratios), ratios[0], ratios[-1])],
        "first_ms": {name: round(rounds[0][0] * 1e3, 1) for name, rounds in steps.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path, metavar="PACKED_DIRECTORY")
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    model = AutoModelForCausalLM.from_pretrained(args.directory, dtype=getattr(torch, args.dtype))
    found = [module.__dict__.get("forward") for module in model.modules()]
    decoders = [one for one in found if isinstance(one, BlockDecoder)]
    native = kernels()
    row = {
        "model": args.directory.name,
        **measured(model, decoders, args),
        "blocks": [sum(one.stands_in for one in decoders), len(decoders)],
        **{name: vars(args)[name] for name in ("prompt_tokens", "new_tokens", "rounds", "dtype")},
        "level": native.level if native else None,
        "environment": machine(),
    }
    add(args.out, row, show=True)


if __name__ == "__main__":
    main()
