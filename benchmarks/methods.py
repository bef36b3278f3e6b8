"""The table of methods and patterns: quality and time of every pair on one model, one text, one machine.

Every row is one JSON line in RESULTS; a pair that is already there is skipped, so the table can be made in pieces.
docs/measured/methods.jsonl is such a file, and `make docs` makes the tables in docs/methods.md from it.

usage: methods.py RESULTS.jsonl --calibration TRAIN.txt --test TEST.txt [--model DIR] [--samples 64] [--length 1024]
                  [--windows 32] [--dtype auto] [--methods wanda,admm,...] [--patterns 0.5,2:4,...]
"""

import argparse
from pathlib import Path
from tempfile import TemporaryDirectory

from lines import add, rows_in
from torch import Tensor

import prunus
from prunus.benchmark import machine
from prunus.calibration import StreamedSource
from prunus.checkpoint import open_checkpoint
from prunus.demo_model import fetch_demo_model
from prunus.evaluation.evaluate import evaluate_text
from prunus.machine_choice import choose_dtype
from prunus.models import open_model
from prunus.sparsity import METHODS
from prunus.text.batches import TokenBatch, evaluation_windows
from prunus.text.sources import parse_source

PATTERNS = ("0.5", "0.6", "0.7", "2:4", "4:8", "16x16:0.5")
MEMORY = 8 << 30


class DenseOnce(StreamedSource):
    """The dense model runs once; its final hidden states serve every comparison."""

    hidden_NTH: Tensor | None = None

    def final_hidden(self, tokens_NT: Tensor, progress_text: str) -> Tensor:
        if self.hidden_NTH is None:
            self.hidden_NTH = super().final_hidden(tokens_NT, progress_text)
        return self.hidden_NTH


def measure(
    args: argparse.Namespace, method: str, pattern: str, dense: DenseOnce, batch: TokenBatch
) -> dict[str, object]:
    with TemporaryDirectory() as folder:
        run = prunus.sparsify(
            args.model,
            Path(folder) / "out",
            method=method,
            pattern=pattern,
            calibration=(args.calibration,),
            samples=args.samples,
            length=args.length,
            dtype=args.dtype,
        )
        sparse = StreamedSource(open_model(run.path, dtype=dense.dtype), max_memory=MEMORY)
        result = evaluate_text(sparse, dense, batch, against=None)
    step, parent = run.last_step, result["against"]
    return {
        "method": method,
        "pattern": pattern,
        "perplexity": round(result["perplexity"], 4),
        "dense_perplexity": round(parent["perplexity"], 4),
        "kl": round(parent["kl"], 5),
        "top1_agreement": round(parent["top1_agreement"], 5),
        "seconds": step["seconds"],
        "solving_seconds": round(sum(row["seconds"] for row in step["matrices"]), 1),
        "peak_memory_bytes": step["peak_memory_bytes"],
        "model": Path(args.model).name,
        "calibration": f"{args.samples} x {args.length} tokens of {Path(args.calibration).name}",
        "test": f"{args.windows} x {args.length} tokens of {Path(args.test).name}",
        "dtype": step["dtype"],
        **conditions(),
    }


def conditions() -> dict[str, object]:
    """What a time depends on."""
    here = machine()
    return {key: here[key] for key in ("cpu", "threads", "torch", "commit")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--test", required=True)
    parser.add_argument("--model", help="default: the demo's model")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--windows", type=int, default=32)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--patterns", default=",".join(PATTERNS))
    args = parser.parse_args()
    args.model = args.model or str(fetch_demo_model())
    done = {(row["method"], row["pattern"]) for row in rows_in(args.results)}
    dtype = choose_dtype(args.dtype, "cpu", open_checkpoint(args.model).config.hidden_size)
    dense = DenseOnce(open_model(args.model, dtype=dtype), max_memory=MEMORY)
    text = parse_source(args.test)
    batch = evaluation_windows(text, dense.tokenizer, length=args.length, windows=args.windows)
    for pattern in args.patterns.split(","):
        for method in args.methods.split(","):
            if (method, pattern) in done:
                continue
            row = measure(args, method, pattern, dense, batch)
            add(args.results, row)
            print(f"{pattern:>10} {method:<10} perplexity {row['perplexity']:.2f}, {row['seconds']:.0f} s", flush=True)


if __name__ == "__main__":
    main()
