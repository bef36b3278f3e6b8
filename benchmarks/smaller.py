"""Smaller shapes and recovery on SmolLM2-135M: which units, which layers, what training brings back, how many rounds.

Every row is a chain of steps, each one process of prunus; rows that begin alike share the beginning, which is kept in
WORK. The groups of rows, for --only:

    width      408 of 1536 FFN channels of every layer by every score, with and without the refit; and one of three KV
               groups with 240 channels
    depth      6 of 30 layers by every layer score, with and without the fold
    recovery   after one cut or 50% zeros: the dense model's distribution (distil, --loss logits), the next token of
               the text (fine-tune, --loss ce), or both (--loss logits,ce=0.2), on the same number of tokens; or the
               first on as many tokens of all of --train and --more-train
    rounds     816 of 1536 channels (40% of the parameters outside the embedding), or 11 of 30 layers (37%), at once
               and in rounds, each round followed by its share of the same number of tokens

Perplexity on the first 16 windows of 1024 tokens of the test text, KL to the dense model on the same windows, both in
fp32; with --other, one more perplexity on as much text of another kind. `recovered` is the share of the lost
log-perplexity that came back. Seconds and peaks are what each step's own record says. One line of JSON per row goes to
RESULTS; a row that is there is skipped. docs/measured/smaller.jsonl is such a file, and `make docs` makes the tables in
docs/results.md from it.

usage: smaller.py RESULTS.jsonl WORK --train TRAIN.txt --test TEST.txt [--other OTHER.jsonl] [--more-train TEXT ...]
                  [--model DIR] [--only width,"zeros-50 distil"] [--tokens 147456] [--lr 1e-4] [--batch-tokens 2048]
                  [--length 512] [--warm-up 0.15]
"""

import argparse
import json
import math
import re
from pathlib import Path
from typing import Any

from lines import add, rows_in
from peers import demo_model, prunus, result_of

SAMPLES, LENGTH, WINDOWS = 64, 1024, 16
SCORES = ("second-order", "flap", "activation", "taylor", "fisher", "magnitude")
LAYER_SCORES = ("angular", "block-influence", "greedy-kl", "greedy-kl-folded")
LOSSES = {"distil": "logits", "distil and text": "logits,ce=0.2", "fine-tune": "ce"}
ROUNDS: dict[str, tuple[str, dict[str, tuple[int, ...]]]] = {
    "width-40": ("--ffn", {"at once": (720,), "2 rounds": (1128, 720), "4 rounds": (1332, 1128, 924, 720)}),
    "depth-37": ("--layers", {"at once": (19,), "2 rounds": (24, 19), "4 rounds": (27, 24, 21, 19)}),
}

MORE = "--more-train"  # stands for the --data of that text

Step = tuple[object, ...]  # verb and options


def groups(tokens: int) -> dict[str, dict[str, list[Step]]]:
    """Group -> name of each row -> its steps."""
    return {"width": widths(), "depth": depths(), "recovery": recoveries(tokens), "rounds": rounds(tokens)}


def widths() -> dict[str, list[Step]]:
    rows: dict[str, list[Step]] = {"dense": []}
    for cut, sizes in {"ffn": ("--ffn", 1128), "kv": ("--kv-groups", 2, "--ffn", 1296)}.items():
        for score in SCORES:
            rows[f"{cut} {score}"] = [("shrink", *sizes, "--score", score)]
            rows[f"{cut} {score} no refit"] = [("shrink", *sizes, "--score", score, "--no-refit")]
    return rows


def depths() -> dict[str, list[Step]]:
    rows: dict[str, list[Step]] = {"dense": []}
    for score in LAYER_SCORES:
        step = ("shrink", "--layers", 24, "--layer-score", score)
        rows |= {f"layers {score}": [step]}
        rows |= {f"layers {score} no fold": [(*step, "--no-fold")]} if "folded" not in score else {}
    return rows


def recoveries(tokens: int) -> dict[str, list[Step]]:
    cuts: dict[str, Step] = {
        "width-20": ("shrink", "--ffn", 1128),
        "zeros-50": ("sparsify", "--pattern", "0.5"),
        "depth-20": ("shrink", "--layers", 24),
    }
    rows: dict[str, list[Step]] = {"dense": []}
    for cut, step in cuts.items():
        rows[cut] = [step]
        rows |= {f"{cut} {name}": [step, recover(loss, tokens)] for name, loss in LOSSES.items()}
        rows[f"{cut} distil on more text"] = [step, ("recover", MORE, *recover("logits", tokens)[1:])]
    return rows


def rounds(tokens: int) -> dict[str, list[Step]]:
    rows: dict[str, list[Step]] = {"dense": []}
    for cut, (axis, schedules) in ROUNDS.items():
        rows[cut] = [("shrink", axis, schedules["at once"][-1])]
        for name, sizes in schedules.items():
            share = recover("logits", tokens // len(sizes))
            rows[f"{cut} {name}"] = [step for size in sizes for step in (("shrink", axis, size), share)]
    return rows


def recover(loss: str, tokens: int) -> Step:
    return ("recover", "--loss", loss, "--tokens", tokens)


def run_chain(args: argparse.Namespace, steps: list[Step]) -> tuple[Path, list[dict[str, Any]]]:
    """(the last model, the result of each step); what lies in WORK already is used again."""
    model, results, name = Path(args.model), [], ""
    for verb, *options in steps:
        name += re.sub(r"[^a-z0-9.]+", "-", f"+{' '.join(map(str, (verb, *options)))}")
        out = args.work / name.strip("-")
        given = [part for option in options for part in (more_text(args) if option == MORE else (option,))]
        results.append(result_of(prunus(verb, model, out, *given, *extra_options(args, str(verb)))))
        model = out
    return model, results


def more_text(args: argparse.Namespace) -> list[object]:
    if not args.more_train:
        raise SystemExit("rows that train on more text need --more-train")
    return [part for text in args.more_train for part in ("--data", text)]


def extra_options(args: argparse.Namespace, verb: str) -> tuple[object, ...]:
    """What all rows have in common."""
    if verb != "recover":
        return ("--calibration", args.train, "--samples", SAMPLES, "--length", LENGTH)
    batch = ("--batch-tokens", args.batch_tokens, "--length", args.length, "--warm-up", args.warm_up)
    return ("--teacher", args.model, "--data", args.train, "--lr", args.lr, *batch)


def measure(args: argparse.Namespace, name: str, steps: list[Step]) -> dict[str, Any]:
    model, results = run_chain(args, steps)
    texts = [part for text in (args.test, args.other) if text for part in ("--text", text)]
    window = ("--length", LENGTH, "--windows", WINDOWS, "--dtype", "float32")
    against = ("--against", args.model) if steps else ()
    quality, *other = result_of(prunus("evaluate", model, *texts, *window, *against))["results"]
    last = json.loads((model / "prunus.json").read_text())["history"][-1] if steps else {}
    return {
        "row": name,
        "perplexity": round(quality["perplexity"], 4),
        "kl": round(quality["against"]["kl"], 5) if steps else 0.0,
        **({"perplexity_other": round(other[0]["perplexity"], 4)} if other else {}),
        "tokens": sum(int(str(step[-1])) for step in steps if step[0] == "recover"),
        "seconds": [round(result["seconds"], 1) for result in results],
        "peak_gib": [round(result["peak_memory_bytes"] / 2**30, 2) for result in results],
        **{key: last[key] for key in ("lr", "dtype", "tokens_per_second", "stopped") if key in last},
        **({"batch_tokens": args.batch_tokens, "length": args.length} if "lr" in last else {}),
        **zeros(last),
        "environment": last.get("environment"),
    }


def zeros(step: dict[str, Any]) -> dict[str, int]:
    """Zeros of all pruned matrices before and after training."""
    counted = step.get("zeros") or []
    return {f"zeros_{when}": sum(row[when] for row in counted) for when in ("before", "after") if counted}


def with_recovered(rows: list[dict[str, Any]], row: dict[str, Any]) -> dict[str, Any]:
    """The row with the share of lost log-perplexity that its training brought back."""
    known = {one["row"]: one["perplexity"] for one in rows}
    cut = known.get(str(row["row"]).split(" ")[0])
    if not row["tokens"] or cut is None or "dense" not in known:
        return row
    lost = math.log(cut / known["dense"])
    return row | {"recovered": round(math.log(cut / row["perplexity"]) / lost, 4)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    parser.add_argument("work", type=Path)
    parser.add_argument("--train", required=True)
    parser.add_argument("--more-train", action="append", default=[], help="repeatable")
    parser.add_argument("--test", required=True)
    parser.add_argument("--other", help="text of another kind than that trained on, for one more perplexity")
    parser.add_argument("--model", help="default: the demo's model")
    parser.add_argument("--only", help="groups or names of rows, comma separated")
    parser.add_argument("--tokens", type=int, default=147_456)
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--batch-tokens", type=int, default=2048)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--warm-up", type=float, default=0.15)
    args = parser.parse_args()
    args.model = args.model or demo_model()
    args.work.mkdir(parents=True, exist_ok=True)
    for name, steps in wanted(args).items():
        rows = rows_in(args.results)
        if name not in {row["row"] for row in rows}:
            row = with_recovered(rows, measure(args, name, steps))
            add(args.results, row)
            print(f"{name:<32} {row['perplexity']:.2f} {row.get('recovered', '')}", flush=True)


def wanted(args: argparse.Namespace) -> dict[str, list[Step]]:
    """The rows asked for, the dense model first."""
    found, known = {"dense": list[Step]()}, groups(args.tokens)
    rows = {name: steps for group in known.values() for name, steps in group.items()}
    for name in args.only.split(",") if args.only else known:
        if name not in {**known, **rows}:
            raise SystemExit(f"--only knows {', '.join([*known, *rows])}, not {name}")
        found |= known.get(name) or {name: rows[name]}
    return found


if __name__ == "__main__":
    main()
