"""What sparse models keep of their quality, in the form in which they are fast: beside dense bf16, int8 and 4 bits.

Every run (a directory that prunus made) and the dense model are exported to each of TYPES, proved, and evaluated in the
engine that runs them: perplexity on the first windows of TEST and KL to the dense model in transformers. One line of
JSON each; `bits_per_weight` are those of the matrices in the blocks, `speed_of` names the row of decode.py that has the
same pattern and type; a NAME begins with its pattern. What is in OUT already is not done again.

usage: sparse_quality.py WORK --dense DIR --test TEST.txt --out ROWS.jsonl NAME=RUN ...
                         [--types sparse:bf16,sparse:int8] [--dense-types sparse:int8,gguf:q8_0,gguf:q4_0,gguf:q4_k_m]
"""

import argparse
from pathlib import Path
from typing import Any

from lines import add, rows_in
from peers import prunus, result_of

from prunus.benchmark.machine import machine
from prunus.checkpoint import read_record

WINDOWS, LENGTH = 16, 1024
SPEEDS = {"sparse:bf16": "bf16", "sparse:int8": "int8"}


def measured(args: argparse.Namespace, name: str, model: Path, kind: str) -> dict[str, Any]:
    out = args.work / f"{name}-{kind}".replace(":", "-")
    result_of(prunus("export", model, out, "--to", kind))
    asked = ("--text", args.test, "--length", LENGTH, "--windows", WINDOWS, "--against", args.dense)
    result = result_of(prunus("evaluate", out, *asked))["results"][0]
    record = read_record(out)
    assert record is not None
    step = next(step for step in reversed(record["history"]) if step["step"] == "export")
    return {
        "row": f"{name} {kind}",
        "perplexity": result["perplexity"],
        "kl": result["against"]["kl"],
        "bytes": step["bytes"],
        "bits_per_weight": bits(step),
        "speed_of": speed_of(name, kind),
        "engine": step["engine"]["name"],
        "dtype": step["type"],
        "windows": WINDOWS,
        "length": LENGTH,
        **{key: machine()[key] for key in ("cpu", "threads", "torch", "commit")},
    }


def bits(step: dict[str, Any]) -> float:
    """Of a weight of the blocks' matrices where they are listed, else of every parameter of the file."""
    if "matrices" not in step:
        return 8 * float(step["bytes"]) / float(step["parameters"])
    blocks = [row for row in step["matrices"] if "lm_head" not in row["name"]]
    weights = sum(row["shape"][0] * row["shape"][1] for row in blocks)
    return float(8 * sum(row["bytes"] for row in blocks) / weights)


def speed_of(name: str, kind: str) -> str:
    pattern = "0" if name == "dense" else name.split()[0]
    return f"{pattern}-{SPEEDS[kind]}" if kind in SPEEDS else kind.removeprefix("gguf:")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("runs", nargs="*", metavar="NAME=RUN")
    parser.add_argument("--dense", type=Path, required=True)
    parser.add_argument("--test", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--types", default="sparse:bf16,sparse:int8")
    parser.add_argument("--dense-types", default="sparse:bf16,sparse:int8,gguf:q8_0,gguf:q4_0,gguf:q4_k_m")
    args = parser.parse_intermixed_args()
    args.work.mkdir(parents=True, exist_ok=True)
    done = {row["row"] for row in rows_in(args.out)}
    wanted = [("dense", args.dense, kind) for kind in args.dense_types.split(",")]
    for name, _, run in (one.partition("=") for one in args.runs):
        wanted += [(name, Path(run), kind) for kind in args.types.split(",")]
    for name, model, kind in wanted:
        if f"{name} {kind}" not in done:
            add(args.out, measured(args, name, model, kind), show=True)


if __name__ == "__main__":
    main()
