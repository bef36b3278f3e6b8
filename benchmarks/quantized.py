"""Quantization on SmolLM2-135M: every scheme by every method, and where pruning comes in.

The groups of rows, for --only:

    schemes    the dense model in every scheme, rounded (rtn) and by GPTQ; "refused" where a width does not fit
    orders     50% zeros and int4 in groups of 32: prune, then quantize; both in one sweep (joint); and quantize, then
               prune by Wanda, which leaves the kept weights where they are. The last one no step of prunus makes: the
               quantized model is written out in full precision here, pruned, and measured like that, on its grid

Perplexity on the first 16 windows of 1024 tokens of the test text, KL to the dense model on the same windows, both with
an fp32 forward in which w8a8 and fp8 round their inputs too. Bytes are those of the weight files. Seconds and peaks are
what each step's own record says. One line of JSON per row goes to RESULTS; a row that is there is skipped.
docs/measured/quantized.jsonl is such a file, and `make docs` makes the tables in docs/quantization.md from it.

usage: quantized.py RESULTS.jsonl WORK --train TRAIN.txt --test TEST.txt [--model DIR] [--only "orders;int8 rtn"]
"""

import argparse
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

from lines import add, rows_in
from peers import demo_model, prunus, result_of
from safetensors.torch import save_file

from prunus.checkpoint import open_checkpoint
from prunus.quantizing import QUANTIZERS, SCHEMES

SAMPLES, LENGTH, WINDOWS = 64, 1024, 16
READS_NO_TEXT = ("rtn", "magnitude")
WRITTEN_OUT = ("write out in full precision",)  # a step of this script

Step = tuple[str, ...]  # verb and options


def groups() -> dict[str, dict[str, list[Step]]]:
    """Group -> name of each row -> its steps."""
    return {"orders": {"dense": [], **orders()}, "schemes": {"dense": [], **schemes()}}


def schemes() -> dict[str, list[Step]]:
    return {f"{scheme} {method}": [quantize(scheme, method)] for scheme in SCHEMES for method in QUANTIZERS}


def orders() -> dict[str, list[Step]]:
    gptq = quantize("int4-g32", "gptq")
    pruned = {name: sparsify(name) for name in ("admm", "sparsegpt", "wanda")}
    return {
        **{f"{name} 50%": [step] for name, step in pruned.items()},
        **{f"{name} 50%, then int4-g32 gptq": [step, gptq] for name, step in pruned.items()},
        "joint 50% int4-g32": [(*gptq, "--joint", "--pattern", "0.5")],
        "int4-g32 gptq, then wanda 50%": [gptq, WRITTEN_OUT, pruned["wanda"]],
    }


def sparsify(method: str) -> Step:
    return ("sparsify", "--method", method, "--pattern", "0.5")


def quantize(scheme: str, method: str) -> Step:
    return ("quantize", "--scheme", scheme, "--method", method)


def measure(args: argparse.Namespace, name: str, steps: list[Step]) -> dict[str, Any]:
    model, results = Path(args.model), []
    for number in range(1, len(steps) + 1):
        out = args.work / re.sub(r"[^a-z0-9.]+", "-", " then ".join(" ".join(step) for step in steps[:number]))
        results.append(carry_out(args, steps[number - 1], model, out))
        model = out
    window = ("--length", LENGTH, "--windows", WINDOWS, "--dtype", "float32")
    against = ("--against", args.model) if steps else ()
    (quality,) = result_of(prunus("evaluate", model, "--text", args.test, *window, *against))["results"]
    last = json.loads((model / "prunus.json").read_text())["history"][-1] if steps else {}
    return {
        "row": name,
        "perplexity": round(quality["perplexity"], 4),
        "kl": round(quality["against"]["kl"], 5) if steps else 0.0,
        "bytes": sum(file.stat().st_size for file in model.glob("*.safetensors")),
        "sparsity": round(last["sparsity"]["pruned_matrices"], 4) if steps else 0.0,
        "seconds": [round(result["seconds"], 1) for result in results if result],
        "peak_gib": [round(result["peak_memory_bytes"] / 2**30, 2) for result in results if result],
        "environment": last.get("environment"),
    }


def carry_out(args: argparse.Namespace, step: Step, model: Path, out: Path) -> dict[str, Any]:
    """The step's own result; what lies in WORK already is used again."""
    if step == WRITTEN_OUT:
        write_out(model, out)
        return {}
    text = ("--calibration", args.train, "--samples", SAMPLES, "--length", LENGTH)
    verb, *options = step
    return result_of(prunus(verb, model, out, *options, *(() if set(step) & set(READS_NO_TEXT) else text)))


def write_out(model: Path, out: Path) -> None:
    """The full-precision model that a quantized one stands for."""
    checkpoint = open_checkpoint(model)
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    for file in checkpoint.side_files:
        shutil.copyfile(file, out / file.name)
    config = json.loads((model / "config.json").read_text())
    del config["quantization_config"]
    (out / "config.json").write_text(json.dumps(config))
    tensors = {name: checkpoint.read(name) for name in checkpoint.tensors}
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    parser.add_argument("work", type=Path)
    parser.add_argument("--train", required=True)
    parser.add_argument("--test", required=True)
    parser.add_argument("--model", help="default: the demo's model")
    parser.add_argument("--only", help="groups or names of rows, separated by semicolons")
    args = parser.parse_args()
    args.model = args.model or demo_model()
    args.work.mkdir(parents=True, exist_ok=True)
    for name, steps in wanted(args.only).items():
        if name not in {row["row"] for row in rows_in(args.results)}:
            row = measured_or_refused(args, name, steps)
            add(args.results, row)
            print(f"{name:<32} {row.get('perplexity', 'refused')}", flush=True)


def measured_or_refused(args: argparse.Namespace, name: str, steps: list[Step]) -> dict[str, Any]:
    try:
        return measure(args, name, steps)
    except subprocess.CalledProcessError as error:
        if error.returncode != 2:  # no sentence to the user, but a bug
            raise
        return {"row": name, "refused": True}


def wanted(only: str | None) -> dict[str, list[Step]]:
    """The rows asked for, the dense model first."""
    found, known = {"dense": list[Step]()}, groups()
    rows = {name: steps for group in known.values() for name, steps in group.items()}
    for name in only.split(";") if only else known:
        if name not in {**known, **rows}:
            raise SystemExit(f"--only knows {', '.join([*known, *rows])}, not {name}")
        found |= known.get(name) or {name: rows[name]}
    return found


if __name__ == "__main__":
    main()
