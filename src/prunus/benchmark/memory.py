"""Peak memory of one model's generation, measured in a process of its own.

The peak is VmHWM of /proc/self/status and not `resource.ru_maxrss`: Linux hands the parent's maximum down to the
child there, so a parent that holds two models would be counted in.
"""

import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import torch

from prunus.benchmark.machine import peak_resident_bytes
from prunus.benchmark.transformers_engine import TransformersRunner, Work


def peak_memory(directory: Path, work: Work) -> dict[str, int | None]:
    """Peak resident bytes (torch and mapped weights included) and peak GPU bytes of loading and one generation.

    Raises RuntimeError with the child's last words when it fails. A peak this platform cannot tell is None.
    """
    code = "from prunus.benchmark.memory import child; child()"
    command = [sys.executable, "-c", code, str(directory), json.dumps(asdict(work))]
    process = subprocess.run(command, capture_output=True, text=True)
    if process.returncode != 0:
        raise RuntimeError(f"measuring the memory of {directory} failed: {process.stderr.strip()[-500:]}")
    peaks: dict[str, int | None] = json.loads(process.stdout.splitlines()[-1])
    return peaks


def child() -> None:
    """The measured process: argv is the directory and the work as JSON; prints the peaks as one JSON line."""
    directory, work = Path(sys.argv[1]), Work(**json.loads(sys.argv[2]))
    torch.set_num_threads(work.threads)
    runner = TransformersRunner(directory, work)
    runner.generate([token % runner.vocabulary for token in range(work.prompt_tokens)], work.new_tokens)
    gpu = torch.cuda.max_memory_allocated() if work.device.startswith("cuda") else None
    print(json.dumps({"peak_memory_bytes": peak_resident_bytes(), "peak_gpu_memory_bytes": gpu}))
