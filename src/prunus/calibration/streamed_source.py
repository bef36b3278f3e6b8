"""Evaluate a model without loading it: final hidden states by the block pass, logits by its own head.

Shapes: N = windows, T = tokens, H = hidden, V = vocabulary.
"""

from collections.abc import Iterator
from typing import Any

from torch import Tensor

from prunus.calibration.block_pass import BlockPass, Edit
from prunus.calibration.hidden_states import HiddenStates
from prunus.machine_choice import in_transformers
from prunus.models import StreamedModel
from prunus.progress import progress
from prunus.text.batches import TokenBatch, whole_windows


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

    @property
    def conditions(self) -> dict[str, Any]:
        """How the forward pass is run."""
        return in_transformers(self.dtype)

    def final_hidden(self, tokens_NT: Tensor, progress_text: str) -> Tensor:
        """Return the last block's output (N, T, H); each block is read once and applied to all windows."""
        *_, hidden = walk(self.model, whole_windows(tokens_NT, []), progress_text, max_memory=self._max_memory)
        return hidden.states_NTH

    def logits(self, tokens_1T: Tensor, hidden_1TH: Tensor) -> Tensor:
        """Return fp32 logits (1, T, V) on the CPU; both arguments may be a slice of positions."""
        return self.model.logits(tokens_1T, hidden_1TH).cpu()


def walk(
    model: StreamedModel,
    batch: TokenBatch,
    title: str,
    *,
    edit: Edit | None = None,
    max_memory: int | None = None,
) -> Iterator[HiddenStates]:
    """Walk over the blocks of a model that stays as it is; `edit` looks at what it asks for and changes nothing.

    Yields the hidden states of all sequences in front of the first block, then behind each: the same object, which the
    next block overwrites. More than `max_memory` bytes of it (None: half of free memory) lie in a temporary file.
    """
    hidden = HiddenStates.scratch(hidden_shape(model, batch.tokens_NT), model.dtype, max_memory)
    embed_all(model, batch.tokens_NT, hidden)
    model.free_outer()
    num_blocks = len(model.spec.blocks)
    with progress(title, num_blocks * len(batch.tokens_NT)) as advance:
        run = BlockPass(model=model, real_NT=batch.real_NT, edit=edit, propagate="dense", advance=advance)
        yield hidden
        for index in range(num_blocks):
            run.run_block(index, hidden, hidden)
            yield hidden


def hidden_shape(model: StreamedModel, tokens_NT: Tensor) -> tuple[int, int, int]:
    """(N, T, H) of the hidden states of these tokens; also teaches the model how its blocks are called."""
    return tokens_NT.shape[0], tokens_NT.shape[1], model.embed(tokens_NT[:1]).shape[2]


def embed_all(model: StreamedModel, tokens_NT: Tensor, hidden: HiddenStates) -> None:
    """Write what enters the first block."""
    for n in range(len(tokens_NT)):
        hidden[n] = model.embed(tokens_NT[n : n + 1])
