"""Prunus against llm-compressor: the same work, in turn, in one run.

SmolLM2-135M, fp32 weights, the same calibration tokens, all attention and MLP projections; perplexity of every result
on the first windows of the same test text, measured by one program in fp32. The peer runs the forward pass in the dtype
of the weights; ours runs in float32 and in what `--dtype auto` takes on the machine, a row each. Times and peaks are of
whole processes, loading and saving included. The machine must be quiet, and only ratios taken in one run count.

usage: peers.py --calibration TRAIN.txt --test TEST.txt [--model DIR] [--rounds N] [--only wanda:0.5,...]
                [--dtypes auto,float32]

This script needs nothing but Python: prunus runs in the environment that runs it, the peer in one that it makes under
the cache folder (about 2 GB).
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

TORCH = "torch==2.13.0"
PEER = "llmcompressor==0.14.0.1"
HERE = Path(__file__).resolve().parent
WORK = ("wanda:0.5", "sparsegpt:0.5", "sparsegpt:2:4")
BESIDE = {"sparsegpt:0.5": ("admm:0.5",), "sparsegpt:2:4": ("admm:2:4",)}  # what the peer lacks, beside its best
SAMPLES, LENGTH, WINDOWS = 64, 1024, 32


def peer_python(peer: str, *beside: str) -> Path:
    """The interpreter of the environment of a peer and of what it needs beside it, made on first use."""
    root = Path(os.environ.get("PRUNUS_CACHE", Path.home() / ".cache" / "prunus")) / "peers" / peer.replace("==", "-")
    python = root / "bin" / "python"
    if not (root / "ready").exists():
        subprocess.run([sys.executable, "-m", "venv", root], check=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", TORCH, peer, *beside], check=True)
        (root / "ready").touch()
    return python


def timed(command: list[object]) -> tuple[float, int]:
    """(wall seconds, peak resident bytes) of a whole process."""
    start = time.perf_counter()
    process = subprocess.Popen([str(part) for part in command], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"failed: {' '.join(map(str, command))}")
    return time.perf_counter() - start, usage.ru_maxrss * 1024


def demo_model() -> str:
    code = "from prunus.demo_model import fetch_demo_model; print(fetch_demo_model())"
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.strip()


def prunus(*arguments: object) -> list[object]:
    return [sys.executable, "-m", "prunus.cli", *arguments]


def result_of(command: list[object]) -> dict[str, Any]:
    """The last line that a command of prunus prints."""
    output = subprocess.run([str(part) for part in command], check=True, stdout=subprocess.PIPE, text=True).stdout
    result: dict[str, Any] = json.loads(output.splitlines()[-1])
    return result


def ours(args: argparse.Namespace, work: str, dtype: str, out: Path) -> list[object]:
    method, _, pattern = work.partition(":")
    calibration = ("--calibration", args.calibration, "--samples", SAMPLES, "--length", LENGTH)
    return prunus("sparsify", args.model, out, "--method", method, "--pattern", pattern, *calibration, "--dtype", dtype)


def theirs(args: argparse.Namespace, work: str, tokens: Path, out: Path) -> list[object]:
    method, _, pattern = work.partition(":")
    return [peer_python(PEER), HERE / "peer_llmcompressor.py", args.model, tokens, method, pattern, out]


def save_tokens(args: argparse.Namespace, file: Path) -> None:
    """The very windows that prunus calibrates on, for the peer."""
    code = (
        "import sys; from safetensors.torch import save_file; from transformers import AutoTokenizer;"
        "from prunus.text.batches import calibration_tokens; from prunus.text.sources import parse_source;"
        "t = AutoTokenizer.from_pretrained(sys.argv[1]); s = [parse_source(sys.argv[2])];"
        f"b = calibration_tokens(s, t, samples={SAMPLES}, length={LENGTH}, seed=0);"
        "save_file({'tokens_NT': b.tokens_NT.contiguous()}, sys.argv[3])"
    )
    subprocess.run([sys.executable, "-c", code, args.model, args.calibration, file], check=True)


def perplexity(args: argparse.Namespace, directory: Path, windows: int = WINDOWS) -> float:
    options = ("--text", args.test, "--length", LENGTH, "--windows", windows, "--dtype", "float32")
    return float(result_of(prunus("evaluate", directory, *options))["results"][0]["perplexity"])


def compare(args: argparse.Namespace, work: str, scratch: Path) -> list[dict[str, object]]:
    """A row for each of our methods and forward dtypes beside the peer's work; ratios are paired within a round."""
    mine = [(w, dtype) for w in (work, *BESIDE.get(work, ())) for dtype in args.dtypes.split(",")]
    commands = {f"{w}-{dtype}": ours(args, w, dtype, scratch / f"{w}-{dtype}") for w, dtype in mine}
    commands["peer"] = theirs(args, work, scratch / "tokens.safetensors", scratch / "peer")
    seconds, peak = in_turn(commands, scratch, args.rounds)
    peer_perplexity = perplexity(args, scratch / "peer")
    return [
        {
            "work": w,
            "dtype": dtype,
            "seconds": seconds[name],
            "peak_gib": peak[name] / 2**30,
            "perplexity": perplexity(args, scratch / name),
            "peer": work,
            "peer_seconds": seconds["peer"],
            "peer_peak_gib": peak["peer"] / 2**30,
            "peer_perplexity": peer_perplexity,
            "time_ratio": statistics.median(a / b for a, b in zip(seconds[name], seconds["peer"], strict=True)),
            "memory_ratio": peak[name] / peak["peer"],
        }
        for (w, dtype), name in zip(mine, commands, strict=False)
    ]


def in_turn(
    commands: dict[str, list[object]], scratch: Path, rounds: int
) -> tuple[dict[str, list[float]], dict[str, int]]:
    """(seconds of every round, highest peak in bytes) of each command, which writes to a directory of its name."""
    seconds: dict[str, list[float]] = {name: [] for name in commands}
    peak = dict.fromkeys(commands, 0)
    for _ in range(rounds):
        for name, command in commands.items():
            shutil.rmtree(scratch / name, ignore_errors=True)
            elapsed, resident = timed(command)
            seconds[name].append(round(elapsed, 1))
            peak[name] = max(peak[name], resident)
    return seconds, peak


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--test", required=True)
    parser.add_argument("--model", help="default: the demo's model")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--only", default=",".join(WORK))
    parser.add_argument("--dtypes", default="auto,float32", help="of our forward pass; the peer's is float32")
    args = parser.parse_args()
    args.model = args.model or demo_model()
    with TemporaryDirectory() as folder:
        save_tokens(args, Path(folder) / "tokens.safetensors")
        for work in args.only.split(","):
            for row in compare(args, work, Path(folder)):
                print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
