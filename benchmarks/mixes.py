"""What calibration text does to the result: one method on several mixes, perplexity on two kinds of text.

The last 500 problems of the arithmetic file are evaluated on and never calibrated on. Every row is one JSON line in
RESULTS; a mix that is already there is skipped. docs/measured/mixes.jsonl is such a file, and `make docs` makes the
table in docs/methods.md from it.

usage: mixes.py RESULTS.jsonl --prose TRAIN.txt --prose-test TEST.txt --arithmetic PROBLEMS.jsonl [--model DIR]
                [--method admm] [--pattern 0.5] [--samples 64] [--length 1024] [--windows 32]
                [--dtype auto]
"""

import argparse
from pathlib import Path
from tempfile import TemporaryDirectory

from lines import add, rows_in

import prunus
from prunus.benchmark import machine
from prunus.checkpoint import open_checkpoint
from prunus.demo_model import fetch_demo_model
from prunus.machine_choice import choose_dtype

HELD_OUT = 500  # problems
MIXES = {
    "prose": ("{prose}",),
    "prose + arithmetic": ("{prose}", "{arithmetic}"),
    "prose + arithmetic + self": ("{prose}", "{arithmetic}", "self"),
    "self": ("self",),
}


def split_problems(file: Path, folder: Path) -> tuple[Path, Path]:
    """(problems to calibrate on, problems to evaluate on)."""
    lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
    train, test = folder / "arithmetic_train.jsonl", folder / "arithmetic_test.jsonl"
    train.write_text("".join(lines[:-HELD_OUT]), encoding="utf-8")
    test.write_text("".join(lines[-HELD_OUT:]), encoding="utf-8")
    return train, test


def perplexities(args: argparse.Namespace, model: str | Path, tests: dict[str, str]) -> dict[str, float]:
    """Perplexity on each kind of text."""
    window = {"length": args.length, "windows": args.windows, "dtype": args.dtype}
    results = prunus.evaluate(model, text=tuple(tests.values()), **window)
    return {kind: round(result["perplexity"], 4) for kind, result in zip(tests, results, strict=True)}


def measure(args: argparse.Namespace, mix: str, folder: Path) -> dict[str, object]:
    train, test = split_problems(Path(args.arithmetic), folder)
    tests = {"prose": args.prose_test, "arithmetic": str(test)}
    row: dict[str, object] = {"mix": mix, **conditions(args)}
    if mix == "dense":
        return row | perplexities(args, args.model, tests)
    sources = tuple(source.format(prose=args.prose, arithmetic=train) for source in MIXES[mix])
    settings = {"samples": args.samples, "length": args.length, "method": args.method, "pattern": args.pattern}
    run = prunus.sparsify(args.model, folder / "out", calibration=sources, dtype=args.dtype, **settings)
    windows = [source["windows"] for source in run.last_step["calibration"]]
    return row | {"windows_of_each": windows} | perplexities(args, run.path, tests)


def conditions(args: argparse.Namespace) -> dict[str, object]:
    here = machine()
    return {
        "method": args.method,
        "pattern": args.pattern,
        "model": Path(args.model).name,
        "samples": args.samples,
        "length": args.length,
        "windows": args.windows,
        "dtype": str(choose_dtype(args.dtype, "cpu", open_checkpoint(args.model).config.hidden_size)),
        **{key: here[key] for key in ("cpu", "torch", "commit")},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    parser.add_argument("--prose", required=True)
    parser.add_argument("--prose-test", required=True)
    parser.add_argument("--arithmetic", required=True)
    parser.add_argument("--model", help="default: the demo's model")
    parser.add_argument("--method", default="admm")
    parser.add_argument("--pattern", default="0.5")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--windows", type=int, default=32)
    parser.add_argument("--dtype", default="auto")
    args = parser.parse_args()
    args.model = args.model or str(fetch_demo_model())
    done = {row["mix"] for row in rows_in(args.results)}
    for mix in ("dense", *MIXES):
        if mix not in done:
            with TemporaryDirectory() as folder:
                row = measure(args, mix, Path(folder))
            add(args.results, row)
            print(f"{mix:<26} prose {row['prose']:.2f}, arithmetic {row['arithmetic']:.2f}", flush=True)


if __name__ == "__main__":
    main()
