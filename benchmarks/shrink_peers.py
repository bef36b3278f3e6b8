"""`prunus shrink` against Torch-Pruning: the same channels and heads fewer, in turn, in one run.

SmolLM2-135M, fp32 weights, the same 64 x 1024 calibration tokens, nothing trained afterwards. Every layer loses:

    ffn        408 of 1536 channels of the feed-forward network
    kv_groups  1 of 3 KV groups with its query heads, and 240 channels: as many parameters, within 0.7%
    heads      3 of 9 query heads and 280 channels, exactly as many parameters as `ffn`: how the peer's own pruner deals
               with grouped queries. A row of the peer alone, beside `kv_groups`

The peer ranks by its magnitude and its Taylor importance (peer_torch_pruning.py) in fp32, ours by every score of
--scores, in the default forward dtype of `prunus shrink` or that of --options. Perplexity of every result on the first
16 x 1024 tokens of the test text, measured by one program in fp32. Times and peaks are of whole processes, loading and
saving included. The machine must be quiet, and only ratios taken in one run count.

usage: shrink_peers.py --calibration TRAIN.txt --test TEST.txt [--model DIR] [--rounds N] [--only ffn,kv_groups,heads]
                       [--scores second-order,flap,activation,magnitude,taylor] [--importances magnitude,taylor]
                       [--options "--dtype float32"]

`--scores ""` measures the peer alone. Prints one line of JSON per result; those of ours carry the ratios to each of the
peer's, paired within a round for time. This script needs nothing but Python: prunus runs in the environment that runs
it, the peer in one that it makes under the cache folder (about 1 GB).
"""

import argparse
import json
import shlex
import statistics
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from peers import HERE, LENGTH, SAMPLES, demo_model, in_turn, peer_python, perplexity, prunus, save_tokens

PEER, BESIDE_PEER = "torch-pruning==1.6.1", "transformers==5.24.0"
WINDOWS = 16
THEIR_CUTS = {"ffn": "ffn=408", "kv_groups": "kv_groups=1,ffn=240", "heads": "heads=3,ffn=280"}
OUR_SIZES = {"ffn": ("--ffn", 1128), "kv_groups": ("--kv-groups", 2, "--ffn", 1296)}
SCORES = "second-order,flap,activation,magnitude,taylor"


def ours(args: argparse.Namespace, work: str, score: str, out: Path) -> list[object]:
    calibration = ("--calibration", args.calibration, "--samples", SAMPLES, "--length", LENGTH)
    return prunus(
        "shrink", args.model, out, *OUR_SIZES[work], "--score", score, *calibration, *shlex.split(args.options)
    )


def theirs(args: argparse.Namespace, work: str, importance: str, tokens: Path, out: Path) -> list[object]:
    python = peer_python(PEER, BESIDE_PEER)
    return [python, HERE / "peer_torch_pruning.py", args.model, tokens, importance, THEIR_CUTS[work], out]


def commands_of(args: argparse.Namespace, work: str, scratch: Path) -> dict[str, list[object]]:
    """The command of every result, by side and score; ours only where we have the same cut."""
    commands = {
        f"peer-{importance}": theirs(
            args, work, importance, scratch / "tokens.safetensors", scratch / f"peer-{importance}"
        )
        for importance in _names(args.importances)
    }
    scores = _names(args.scores) if work in OUR_SIZES else []
    return commands | {f"prunus-{score}": ours(args, work, score, scratch / f"prunus-{score}") for score in scores}


def compare(args: argparse.Namespace, work: str, scratch: Path) -> list[dict[str, Any]]:
    """A row for each importance of the peer's and each score of ours."""
    commands = commands_of(args, work, scratch)
    seconds, peak = in_turn(commands, scratch, args.rounds)
    rows = {
        name: {
            "work": work,
            "side": name,
            "seconds": seconds[name],
            "peak_gib": peak[name] / 2**30,
            "perplexity": perplexity(args, scratch / name, WINDOWS),
        }
        for name in commands
    }
    peers = [row for name, row in rows.items() if name.startswith("peer-")]
    return [row | ({} if row in peers else {"beside": [_ratios(row, peer) for peer in peers]}) for row in rows.values()]


def _ratios(row: dict[str, Any], peer: dict[str, Any]) -> dict[str, Any]:
    """Ours over the peer's: below 1 is better."""
    return {
        "side": peer["side"],
        "time_ratio": statistics.median(a / b for a, b in zip(row["seconds"], peer["seconds"], strict=True)),
        "memory_ratio": row["peak_gib"] / peer["peak_gib"],
        "perplexity_ratio": row["perplexity"] / peer["perplexity"],
    }


def _names(text: str) -> list[str]:
    return [name for name in text.split(",") if name]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--test", required=True)
    parser.add_argument("--model", help="default: the demo's model")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--only", default=",".join(THEIR_CUTS))
    parser.add_argument("--scores", default=SCORES)
    parser.add_argument("--importances", default="magnitude,taylor")
    parser.add_argument("--options", default="", help="more options of `prunus shrink`, in one string")
    args = parser.parse_args()
    args.model = args.model or demo_model()
    with TemporaryDirectory() as folder:
        save_tokens(args, Path(folder) / "tokens.safetensors")
        for work in _names(args.only):
            for row in compare(args, work, Path(folder)):
                print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
