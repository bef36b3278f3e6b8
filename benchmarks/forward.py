"""What pruning costs beside the one forward pass that no method can do without.

Times a bare forward pass of the calibration tokens through all blocks and whole runs (loading, hashing, statistics,
solving and saving included), in turn, in one process.

usage: forward.py --calibration TRAIN.txt [--model DIR] [--samples 64] [--length 1024] [--methods ...]
                  [--dtype auto] [--rounds 2]
"""

import argparse
import json
import statistics
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import prunus
from prunus.calibration import BlockPass, HiddenStates, embed_all, hidden_shape
from prunus.checkpoint import open_checkpoint
from prunus.demo_model import fetch_demo_model
from prunus.machine_choice import choose_dtype
from prunus.models import StreamedModel, open_model
from prunus.text.batches import TokenBatch, calibration_tokens
from prunus.text.sources import parse_source


def bare_forward(model: StreamedModel, batch: TokenBatch) -> float:
    """Seconds to take the tokens through all blocks, each loaded once."""
    hidden = HiddenStates(hidden_shape(model, batch.tokens_NT), model.dtype)
    embed_all(model, batch.tokens_NT, hidden)
    block_pass = BlockPass(model=model, real_NT=batch.real_NT, edit=None)
    start = time.perf_counter()
    for index in range(len(model.spec.blocks)):
        block_pass.run_block(index, hidden, hidden)
    return time.perf_counter() - start


def whole_run(args: argparse.Namespace, method: str, out: Path) -> float:
    settings = {"calibration": (args.calibration,), "samples": args.samples, "length": args.length}
    start = time.perf_counter()
    prunus.sparsify(args.model, out, method=method, dtype=args.dtype, **settings)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--model", default=None, help="default: the demo's model")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--methods", default="wanda,admm")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--rounds", type=int, default=2)
    args = parser.parse_args()
    args.model = args.model or str(fetch_demo_model())
    width = open_checkpoint(args.model).config.hidden_size
    model = open_model(args.model, dtype=choose_dtype(args.dtype, "cpu", width))
    args.dtype = str(model.dtype).removeprefix("torch.")
    sources = [parse_source(args.calibration)]
    batch = calibration_tokens(sources, model.tokenizer, samples=args.samples, length=args.length, seed=0)
    for method in args.methods.split(","):
        ratios, seconds = [], []
        for number in range(args.rounds):
            with TemporaryDirectory() as folder:
                forward, run = bare_forward(model, batch), whole_run(args, method, Path(folder) / "out")
            ratios.append(run / forward)
            seconds.append((round(forward, 1), round(run, 1)))
            print(f"round {number + 1}: {method} {run:.1f} s, bare forward {forward:.1f} s, ratio {run / forward:.2f}")
        print(
            json.dumps({"method": method, "dtype": args.dtype, "ratio": statistics.median(ratios), "seconds": seconds}),
            flush=True,
        )


if __name__ == "__main__":
    main()
