"""Evaluate a model without loading it: final hidden states by the block pass, logits by its own head.

Shapes: N = windows, T = tokens, H = hidden, V = vocabulary.
"""

import tempfile
from pathlib import Path

import torch
from torch import Tensor

from prunus.calibration.block_pass import BlockPass
from prunus.calibration.hidden_states import HiddenStates
from prunus.machine_choice import half_of_free_memory
from prunus.models import StreamedModel
from prunus.progress import progress


class StreamedSource:
    """What `evaluation` asks of a model, for one of any size.

    Hidden states past `max_memory` bytes (None: half of free memory) live in a temporary memory-mapped file.
    """

    def __init__(self, model: StreamedModel, *, max_memory: int | None) -> None:
        self.model = model
        self.config = model.config
        self.tokenizer = model.tokenizer
        self.dtype = model.dtype
        self._max_memory = max_memory or half_of_free_memory()

    def final_hidden(self, tokens_NT: Tensor, progress_text: str) -> Tensor:
        """Return the last block's output (N, T, H); each block is read once and applied to all windows."""
        shape = hidden_shape(self.model, tokens_NT)
        fits = shape[0] * shape[1] * shape[2] * self.dtype.itemsize <= self._max_memory
        hidden = HiddenStates(shape, self.dtype) if fits else _temporary(shape, self.dtype)
        embed_all(self.model, tokens_NT, hidden)
        num_blocks = len(self.model.spec.blocks)
        with progress(progress_text, num_blocks * len(tokens_NT)) as advance:
            real_NT = torch.ones_like(tokens_NT, dtype=torch.bool)
            run = BlockPass(model=self.model, real_NT=real_NT, edit=None, advance=advance)
            for index in range(num_blocks):
                run.run_block(index, hidden, hidden)
        return hidden.states_NTH

    def logits(self, tokens_1T: Tensor, hidden_1TH: Tensor) -> Tensor:
        """Return fp32 logits (1, T, V) on the CPU; both arguments may be a slice of positions."""
        return self.model.logits(tokens_1T, hidden_1TH).cpu()


def _temporary(shape: tuple[int, int, int], dtype: torch.dtype) -> HiddenStates:
    with tempfile.NamedTemporaryFile(prefix="prunus-hidden-") as file:  # unlinked at once, mapped until let go
        return HiddenStates(shape, dtype, Path(file.name))


def hidden_shape(model: StreamedModel, tokens_NT: Tensor) -> tuple[int, int, int]:
    """(N, T, H) of the hidden states of these tokens; also teaches the model how its blocks are called."""
    return tokens_NT.shape[0], tokens_NT.shape[1], model.embed(tokens_NT[:1]).shape[2]


def embed_all(model: StreamedModel, tokens_NT: Tensor, hidden: HiddenStates) -> None:
    """Write what enters the first block."""
    for n in range(len(tokens_NT)):
        hidden[n] = model.embed(tokens_NT[n : n + 1])
