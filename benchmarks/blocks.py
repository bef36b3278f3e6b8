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
import json
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from prunus.benchmark.machine import machine
from prunus.runtime.block import BlockDecoder
from prunus.runtime.native import kernels


def set_own(decoders: list[BlockDecoder], own: bool) -> None:
    for decoder in decoders:
        decoder.block.__dict__.pop("forward", None)
        if not own:
            decoder.block.__dict__["forward"] = decoder


def milliseconds(model: Any, prompt_tokens: int, new_tokens: int) -> list[float]:
    """Of each token after the prompt."""
    ids, past, taken = torch.arange(prompt_tokens).mul(7).remainder(90).add(3).unsqueeze(0), None, []
    for _ in range(new_tokens + 1):
        start = time.perf_counter()
        found = model(ids, past_key_values=past, use_cache=True)
        ids, past = found.logits[:, -1:].argmax(-1), found.past_key_values
        taken.append((time.perf_counter() - start) * 1e3)
    return taken[1:]


def measured(model: Any, decoders: list[BlockDecoder], args: argparse.Namespace) -> dict[str, Any]:
    first: dict[str, float] = {}
    times: dict[str, list[float]] = {"ours": [], "own": []}
    for each in range(args.rounds + 1):
        for name in list(times)[:: 1 if each % 2 else -1]:
            set_own(decoders, name == "own")
            taken = milliseconds(model, args.prompt_tokens, args.new_tokens)
            first.setdefault(name, round(taken[0], 1))
            if each:
                times[name].append(median(taken))
    ratios = sorted(own / ours for ours, own in zip(times["ours"], times["own"], strict=True))
    return {
        **{f"{name}_ms": round(median(one), 2) for name, one in times.items()},
        "times_faster": [round(one, 2) for one in (median(ratios), ratios[0], ratios[-1])],
        "first_ms": first,
    }


@torch.inference_mode()
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
    line = json.dumps(row)
    print(line)
    if args.out:
        with args.out.open("a") as file:
            file.write(line + "\n")


if __name__ == "__main__":
    main()
