"""Evaluate a model without loading it: final hidden states by the block pass, logits by its own head.

Shapes: N = windows, T = tokens, H = hidden, V = vocabulary.
"""

import torch
from torch import Tensor

from prunus.calibration.block_pass import BlockPass
from prunus.calibration.hidden_states import HiddenStates
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
        self._max_memory = max_memory

    def final_hidden(self, tokens_NT: Tensor, progress_text: str) -> Tensor:
        """Return the last block's output (N, T, H); each block is read once and applied to all windows."""
        shape = hidden_shape(self.model, tokens_NT)
        hidden = HiddenStates.scratch(shape, self.dtype, self._max_memory)
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


def hidden_shape(model: StreamedModel, tokens_NT: Tensor) -> tuple[int, int, int]:
    """(N, T, H) of the hidden states of these tokens; also teaches the model how its blocks are called."""
    return tokens_NT.shape[0], tokens_NT.shape[1], model.embed(tokens_NT[:1]).shape[2]


def embed_all(model: StreamedModel, tokens_NT: Tensor, hidden: HiddenStates) -> None:
    """Write what enters the first block."""
    for n in range(len(tokens_NT)):
        hidden[n] = model.embed(tokens_NT[n : n + 1])
