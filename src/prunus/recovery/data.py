"""Text to train on and text that is never trained on: packed windows of tokens from the sources of calibration.

Documents are joined and cut into windows without padding, as everywhere in prunus. The held-out windows are the last
ones of each source, so that no document but the one at the border is in both parts. Where a source has fewer windows
than the budget of tokens asks for, they are gone through again, in another order each time.

Shapes: N = windows, T = tokens in a window.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from prunus.errors import UserError
from prunus.text.batches import Generate, check_length, shares, tokenise
from prunus.text.sources import TextSource, read_text, text_sha256

CHARACTERS_PER_TOKEN = 5  # a hub dataset is read until it holds so many times the tokens asked for


@dataclass(frozen=True, slots=True)
class TrainingText:
    """`train_NT` to learn from, `held_out_NT` to measure on, and of each source its name, hash and counts."""

    train_NT: Tensor
    held_out_NT: Tensor
    description: list[dict[str, Any]]


def training_text(
    sources: Sequence[TextSource],
    tokenizer: Any,
    *,
    windows: int,
    held_out: int,
    length: int,
    seed: int,
    max_length: int | None = None,
    generate: Generate | None = None,
) -> TrainingText:
    """Return up to `windows` windows to train on and `held_out` others, mixed by the sources' weights.

    UserError for a source that does not hold its share of the held-out windows and at least one more.
    """
    check_length(length, max_length)
    train, apart, description = [], [], []
    counts = zip(sources, shares(sources, windows), shares(sources, held_out), strict=True)
    for index, (source, wanted, kept) in enumerate(counts):
        windows_NT, sha256 = _windows(source, tokenizer, wanted + kept, length, seed, generate)
        _check_enough(source, windows_NT, kept, length)
        own_NT, kept_NT = windows_NT[: len(windows_NT) - kept], windows_NT[len(windows_NT) - kept :]
        chosen = np.random.default_rng((seed, index)).permutation(len(own_NT))[:wanted]
        train.append(_repeated(own_NT[torch.from_numpy(chosen)], wanted, len(sources)))
        apart.append(kept_NT)
        facts = {"sha256": sha256, "tokens": windows_NT.numel(), "windows": len(chosen), "held_out": kept}
        description.append({"source": str(source), "weight": source.weight, **facts, "passes": wanted / len(chosen)})
    return TrainingText(torch.cat(train), torch.cat(apart), description)


def _windows(
    source: TextSource, tokenizer: Any, wanted: int, length: int, seed: int, generate: Generate | None
) -> tuple[Tensor, str]:
    """All whole windows of a source, or as many of the model's own samples as are wanted."""
    if source.kind == "self":
        assert generate is not None
        tokens_NT = generate(wanted, length, seed)
        return tokens_NT, text_sha256(str(tokens_NT.tolist()))
    text = read_text(source, tokenizer, max_characters=wanted * length * CHARACTERS_PER_TOKEN)
    ids, _ = tokenise(text, tokenizer)
    available = len(ids) // length
    return torch.tensor(ids[: available * length], dtype=torch.int64).view(available, length), text_sha256(text)


def _check_enough(source: TextSource, windows_NT: Tensor, kept: int, length: int) -> None:
    if len(windows_NT) <= kept:
        raise UserError(
            f"{source} holds {windows_NT.numel()} tokens in whole windows of {length}, and {kept} windows of it are "
            "held out, so none is left to train on: give more text, a shorter --length or fewer --held-out."
        )


def _repeated(windows_NT: Tensor, wanted: int, num_sources: int) -> Tensor:
    """With several sources a short one is repeated up to its share; a single one repeats by itself, see `order`."""
    if num_sources == 1 or len(windows_NT) == wanted:
        return windows_NT
    return windows_NT.repeat(-(-wanted // len(windows_NT)), 1)[:wanted]


def order(num_windows: int, first: int, count: int, seed: int) -> list[int]:
    """Return the windows number `first` .. `first + count` of an endless walk: every pass in an order of its own."""
    chosen: list[int] = []
    while len(chosen) < count:
        position = first + len(chosen)
        round_number, offset = divmod(position, num_windows)
        walk = np.random.default_rng((seed, round_number)).permutation(num_windows)
        chosen += walk[offset : offset + count - len(chosen)].tolist()
    return chosen
