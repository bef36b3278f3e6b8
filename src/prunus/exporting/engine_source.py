"""Evaluate an exported model in its own engine: one window at a time, its logits through a file.

Shapes: N = windows, T = tokens, V = vocabulary.
"""

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from prunus.engines.worker import Worker, bytes_of
from prunus.exporting.exported import Exported
from prunus.models.limits import max_length
from prunus.progress import progress

ROOM = 1024  # tokens of a context at least: choices come in growing lengths, and each load reads the file


class EngineSource:
    """What `evaluation` asks of a model, answered by an engine; use as a context manager around a fresh `worker`.

    `tokenizer` and `config` are those of the model that was exported. What stands for hidden states are numbers of
    windows and positions: logits, wide as the vocabulary, are computed when a window is asked for and kept until the
    next is.
    """

    dtype = torch.float32  # of the logits; what the engine computes in is its own affair

    def __init__(self, worker: Worker, exported: Exported, tokenizer: Any, config: Any) -> None:
        self.worker, self.exported = worker, exported
        self.tokenizer, self.config = tokenizer, config
        self.threads = torch.get_num_threads()
        self._windows: list[list[int]] = []
        self._kept: tuple[int, Tensor] | None = None
        self._context = 0

    def __enter__(self) -> "EngineSource":
        self.worker.__enter__()
        self._folder = tempfile.TemporaryDirectory()
        return self

    def __exit__(self, *error: Any) -> None:
        self._kept = None
        self._folder.cleanup()
        self.worker.__exit__(*error)

    @property
    def conditions(self) -> dict[str, Any]:
        """How the forward pass was run."""
        engine = self.exported.step["engine"]
        return {
            "engine": engine["name"],
            "engine_versions": engine["versions"],
            "dtype": self.exported.step["type"],
            "batch": 1,
            "threads": self.threads,
        }

    def final_hidden(self, tokens_NT: Tensor, progress_text: str) -> Tensor:
        """Return (N, T, 2): the number of each window, and the position in it. The engine has room for T tokens."""
        first, (windows, length) = len(self._windows), tokens_NT.shape
        self._windows += tokens_NT.tolist()
        if length > self._context:
            self._context = max(length, min(ROOM, max_length(self.config) or ROOM))
            with progress(f"{progress_text}: loading", total=1) as advance:
                self.worker.load(self.exported.load, context=self._context, threads=self.threads)
                advance(1)
        numbers = torch.arange(first, first + windows)[:, None].expand(windows, length)
        return torch.stack([numbers, torch.arange(length).expand(windows, length)], dim=-1)

    def logits(self, tokens_1T: Tensor, hidden_1TH: Tensor) -> Tensor:
        """Return float32 logits (1, T, V) of some positions of one window."""
        number = int(hidden_1TH[0, 0, 0])
        if self._kept is None or self._kept[0] != number:
            self._kept = number, self._ask(self._windows[number])
        return self._kept[1][None, hidden_1TH[0, :, 1]].float()

    def _ask(self, window: list[int]) -> Tensor:
        file = Path(self._folder.name) / "logits.npy"
        request = {"do": "score", "windows": [window], "keep": len(window), "logits": str(file)}
        self.worker.ask(request, timeout=self.worker.patience(bytes_of(self.exported.load) * (1 + len(window) // 256)))
        return torch.from_numpy(np.load(file, allow_pickle=False))
