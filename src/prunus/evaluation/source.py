"""What an evaluation needs of a model: final hidden states of many windows, and logits of a few positions.

The split keeps memory bounded: a streamed model reads each decoder block once for all windows, while the logits, wide
as the vocabulary, exist only for a slice of one window.

Shapes: N = windows, T = tokens, H = hidden width, V = vocabulary.
"""

from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch import Tensor

POSITIONS_AT_ONCE = 256


class LogitSource(Protocol):
    """A model that can be evaluated.

    `logits` works position by position, so both its arguments may be a slice of positions.
    """

    dtype: torch.dtype

    @property
    def tokenizer(self) -> Any: ...

    @property
    def config(self) -> Any: ...

    def final_hidden(self, tokens_NT: Tensor, progress_text: str) -> Tensor:
        """Return the hidden states (N, T, H) that `logits` understands; possibly memory-mapped."""
        ...

    def logits(self, tokens_1T: Tensor, hidden_1TH: Tensor) -> Tensor:
        """Return float32 logits (1, T, V) of one window, or of some of its positions."""
        ...


class InMemory:
    """A `LogitSource` over a transformers model that is already loaded (small models, tests)."""

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self.model, self.tokenizer, self.config = model.eval(), tokenizer, model.config
        self.dtype: torch.dtype = model.dtype

    @torch.inference_mode()
    def final_hidden(self, tokens_NT: Tensor, progress_text: str) -> Tensor:
        """Return the last hidden states, one window at a time; `progress_text` is not shown."""
        base = self.model.base_model
        return torch.cat(
            [base(tokens_1T, use_cache=False).last_hidden_state for tokens_1T in torch.split(tokens_NT, 1)]
        )

    @torch.inference_mode()
    def logits(self, tokens_1T: Tensor, hidden_1TH: Tensor) -> Tensor:
        """Apply the output head; families that rescale their logits afterwards are not served here."""
        assert getattr(self.config, "final_logit_softcapping", None) is None
        logits_1TV: Tensor = self.model.get_output_embeddings()(hidden_1TH).float()
        return logits_1TV


def logit_slices(
    sources: list[LogitSource], tokens_1T: Tensor, hidden: list[Tensor], *, first: int = 0
) -> Iterator[tuple[list[Tensor], Tensor]]:
    """Yield ([logits_tV of each source], targets_t) over the positions `first` .. T-2 of one window.

    Position p predicts the token at p + 1; `hidden` holds one (1, T, H) per source. Only one slice lives at a time.
    """
    for start in range(first, tokens_1T.shape[1] - 1, POSITIONS_AT_ONCE):
        stop = min(start + POSITIONS_AT_ONCE, tokens_1T.shape[1] - 1)
        pairs = zip(sources, hidden, strict=True)
        logits = [source.logits(tokens_1T[:, start:stop], h_1TH[:, start:stop])[0] for source, h_1TH in pairs]
        yield logits, tokens_1T[0, start + 1 : stop + 1].to(logits[0].device)
