"""What a model directory gives in a process of its own, by plain transformers; and streamed, in this one."""

import json
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from prunus.models import open_model

LOGITS = """
import json, sys, torch
from transformers import AutoModelForCausalLM
tokens = torch.tensor(json.loads(sys.argv[1]))
for directory in sys.argv[2:]:
    model, info = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    with torch.no_grad():
        torch.save(model.eval()(tokens, use_cache=True).logits, directory + ".logits")
assert "prunus" not in sys.modules
"""


def run_fresh(code: str, *arguments: object, timeout: float | None = None) -> str:
    """Run Python code in a process of its own; returns what it printed. One that takes too long (s) is ended."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    found = subprocess.run(command, check=False, capture_output=True, text=True, timeout=timeout)
    assert found.returncode == 0, found.stderr
    return found.stdout


def save_logits(directories: Iterable[Path], tokens_NT: Tensor) -> None:
    """Write the logits of each directory beside it, as DIRECTORY.logits; every tensor must have found its place."""
    run_fresh(LOGITS, json.dumps(tokens_NT.tolist()), *directories)


def fresh_logits(directory: Path) -> Tensor:
    """What `save_logits` wrote (N, T, V)."""
    logits: Tensor = torch.load(f"{directory}.logits", weights_only=True)
    return logits


def streamed_logits(directory: Path, tokens_NT: Tensor) -> Tensor:
    """The same, block by block."""
    model = open_model(directory)
    hidden = [model.embed(tokens_T[None]) for tokens_T in tokens_NT]
    for index in range(len(model.spec.blocks)):
        model.load_block(index)
        hidden = [model.run_block(index, hidden_1TH) for hidden_1TH in hidden]
    return torch.cat([model.logits(t_T[None], h_1TH) for t_T, h_1TH in zip(tokens_NT, hidden, strict=True)])
