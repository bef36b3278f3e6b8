"""What a model takes on disk and in memory: each opened by transformers in a process of its own.

One line of JSON for each folder:

    disk      bytes of its safetensors
    opened    the most resident memory until `from_pretrained` is back, files that are mapped among it
    decoded   the same after some tokens, when every weight was read
    own       resident memory at the end that is not a mapped file
    idle      resident memory before, with torch, transformers and prunus imported

usage: loading.py FOLDER ... [--tokens 8] [--out ROWS.jsonl]
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import psutil
import torch
from lines import add
from transformers import AutoModelForCausalLM

from prunus.benchmark.machine import machine, peak_resident_bytes, reset_peak_resident


@torch.inference_mode()
def measure(folder: Path, tokens: int) -> dict[str, object]:
    """In this process, which has opened nothing before."""
    process = psutil.Process()
    idle = process.memory_info().rss
    reset_peak_resident()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    opened = peak_resident_bytes()
    model.generate(torch.ones(1, 8, dtype=torch.int64), max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False)
    disk = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    now = process.memory_info()
    return {"disk": disk, "opened": opened, "decoded": peak_resident_bytes(), "own": now.rss - now.shared, "idle": idle}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path, metavar="FOLDER")
    parser.add_argument("--tokens", type=int, default=8)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)  # the process of one folder
    args = parser.parse_args()
    if args.here:
        print(json.dumps(measure(args.folders[0], args.tokens)))
        return
    for folder in args.folders:
        command = [sys.executable, __file__, str(folder), "--here", "--tokens", str(args.tokens)]
        told = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1]
        about = {key: machine()[key] for key in ("cpu", "torch", "transformers", "commit")}
        add(args.out, {"model": folder.name, **json.loads(told), **about}, show=True)


if __name__ == "__main__":
    main()
