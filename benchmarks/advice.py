"""What the advisor predicts (`prunus profile --engine sparse-cpu`) beside what whole models take, in the same minute.

The memory of a shared machine is not equally fast from one minute to the next, so a prediction and a measurement agree
only by chance unless they are of the same time: here every round times a few tokens of each whole model, as
decode.py makes them, and everything that the advisor times. One line of JSON for each model:

    predicted, measured   tokens a second, from the medians of the rounds
    ratio                 predicted / measured, the median of the rounds

The machine must be quiet, and have memory for all of them (12 GB).

usage: advice.py FOLDER [--models dense,0.5-bf16,...] [--rounds 40] [--out ROWS.jsonl]
"""

import argparse
from pathlib import Path
from statistics import median
from typing import Any

import torch
from decode import MODELS, pack_model
from lines import add
from transformers import AutoModelForCausalLM

from prunus.benchmark.machine import machine
from prunus.checkpoint import open_checkpoint
from prunus.exporting.sparse_directory import Packer
from prunus.models import StreamedModel
from prunus.runtime.timing import Pass, in_turn
from prunus.steps.advise import candidates_of, passes_of

PROMPT, TOKENS = 160, 2  # before the rounds, and in each


def decoding(model: Any) -> Pass:
    """Some more tokens of a text, each time."""
    cache = model(torch.zeros(1, PROMPT, dtype=torch.int64), use_cache=True).past_key_values

    def some() -> None:
        for _ in range(TOKENS):
            model(torch.zeros(1, 1, dtype=torch.int64), past_key_values=cache, use_cache=True).logits.argmax(-1)

    return Pass(some, 0, again=True)


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    streamed = StreamedModel(open_checkpoint(args.folder, trust_remote_code=False), dtype=torch.float32)
    *blocks, head = Packer(streamed, "int8").sources
    candidates = {name_of(one.name, one.pattern): one for one in candidates_of(streamed, blocks, head)}
    dense = AutoModelForCausalLM.from_pretrained(args.folder, dtype=torch.bfloat16).eval()
    passes = {}
    for name in args.models.split(","):
        pattern, _, kind = name.rpartition("-")
        passes[name] = decoding(dense if name == "dense" else pack_model(dense, pattern, kind))
    timed = in_turn(passes | passes_of(streamed, candidates.values()), args.rounds)
    for name in passes:
        predicted, measured = candidates[name].seconds(timed), [seconds / TOKENS for seconds in timed[name]]
        told = {"model": name, "predicted": 1 / median(predicted), "measured": 1 / median(measured)}
        told["ratio"] = median(m / p for p, m in zip(predicted, measured, strict=True))
        about = {"rounds": args.rounds, **{key: machine()[key] for key in ("cpu", "torch", "transformers", "commit")}}
        add(args.out, {key: round(v, 3) if isinstance(v, float) else v for key, v in told.items()} | about, show=True)


def name_of(engine: str, pattern: str) -> str:
    return "dense" if engine.startswith("transformers") else f"{pattern}-{engine.removeprefix('sparse:')}"


if __name__ == "__main__":
    main()
