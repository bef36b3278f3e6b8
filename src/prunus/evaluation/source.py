"""What an evaluation needs of a model: final hidden states of many windows, and logits of a few positions.

The split keeps memory bounded: a streamed model reads each decoder block once for all windows, while the logits, wide
as the vocabulary, exist only for a slice of one window.

Shapes: N = windows, T = tokens, H = hidden width, V = vocabulary.
"""

import math
from collections.abc import Iterator, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from prunus.errors import UserError

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

    @property
    def conditions(self) -> dict[str, Any]:
        """How the forward pass is run: engine, dtype, threads, versions."""
        ...

    def final_hidden(self, tokens_NT: Tensor, progress_text: str) -> Tensor:
        """Return the hidden states (N, T, H) that `logits` understands; possibly memory-mapped."""
        ...

    def logits(self, tokens_1T: Tensor, hidden_1TH: Tensor) -> Tensor:
        """Return float32 logits (1, T, V) of one window, or of some of its positions."""
        ...


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


def name_of(source: LogitSource) -> str:
    """The path of the model, as it was loaded."""
    return str(getattr(source.config, "name_or_path", "") or "the model")


def check_finite(numbers: Mapping[str, Any], model: str, text: str) -> None:
    """Raise UserError when one of a model's figures on a text is NaN or infinite: no such figure is ever recorded."""
    for name, value in numbers.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(
                f"{name.replace('_', ' ')} of {model} on {text} is {value}: its weights are damaged, or its forward "
                "pass overflows; try --dtype float32, or make the model again."
            )
