"""From text to windows of tokens, for calibration (seeded choice) and for evaluation (the first windows).

The joined text is tokenised once and cut into windows, the convention of the pruning papers: nothing is added between
windows; only what the tokenizer itself puts before a text (a BOS, in some families) stands once, at the very start.

Shapes: N = windows, T = tokens in a window.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from prunus.errors import UserError
from prunus.text.sources import TextSource, read_text, text_sha256

Generate = Callable[[int, int, int], Tensor]
"""(samples, length, seed) -> tokens_NT: the model's own samples, see self_generated.py."""

_CHARACTERS_PER_TOKEN = 4
_HUB_SURPLUS = 10  # a hub dataset is read until it holds about this many times the tokens asked for


@dataclass(frozen=True, slots=True)
class TokenBatch:
    """Windows of tokens: `tokens_NT` int64, `real_NT` bool (False = padding, kept out of every statistic).

    `description` says of each source its name, the SHA-256 of its text, its tokens and how many windows came from it.
    """

    tokens_NT: Tensor
    real_NT: Tensor
    description: list[dict[str, Any]]


def calibration_tokens(
    sources: Sequence[TextSource],
    tokenizer: Any,
    *,
    samples: int,
    length: int,
    seed: int,
    max_length: int | None = None,
    generate: Generate | None = None,
) -> TokenBatch:
    """Return `samples` disjoint windows of `length` tokens, mixed by the sources' weights.

    Windows are drawn without replacement by a seeded generator; the same arguments give the same tokens.
    `generate` serves the source `self`. UserError when a source holds too little text or its share is no window at all.
    """
    check_length(length, max_length)
    if samples < 1:
        raise UserError(f"samples={samples}: calibration needs at least 1 window.")
    parts, description = [], []
    for index, (source, count) in enumerate(zip(sources, shares(sources, samples), strict=True)):
        tokens_NT, facts = _draw(source, tokenizer, count, length, (seed, index), generate)
        parts.append(tokens_NT)
        description.append({"source": str(source), "weight": source.weight, **facts, "windows": count})
    return whole_windows(torch.cat(parts), description)


def evaluation_windows(
    source: TextSource, tokenizer: Any, *, length: int, windows: int | None = None, max_length: int | None = None
) -> TokenBatch:
    """Return the first `windows` consecutive windows of the joined text (None: as many whole ones as there are).

    The description also carries `scored_bytes`, for bits per byte: the UTF-8 bytes behind all tokens that a model
    predicts (each window's first token is given); None when the tokenizer does not say where its tokens lie.
    """
    check_length(length, max_length)
    if source.kind == "self":
        raise UserError("A model cannot be evaluated on its own samples: give a text file, hf:... or builtin.")
    limit = None if windows is None else windows * length * _CHARACTERS_PER_TOKEN * _HUB_SURPLUS
    text = read_text(source, tokenizer, max_characters=limit)
    ids, spans = tokenise(text, tokenizer)
    wanted = max(len(ids) // length, 1) if windows is None else windows
    tokens_NT = cut(ids, source, wanted, length)[:wanted]
    facts = {"sha256": text_sha256(text), "tokens": len(ids), "windows": wanted}
    bytes_scored = None if spans is None else sum(_window_bytes(text, spans, n, length) for n in range(wanted))
    return whole_windows(tokens_NT, [{"source": str(source), **facts, "scored_bytes": bytes_scored}])


def whole_windows(tokens_NT: Tensor, description: list[dict[str, Any]]) -> TokenBatch:
    """A batch without padding."""
    return TokenBatch(tokens_NT, torch.ones_like(tokens_NT, dtype=torch.bool), description)


def check_length(length: int, max_length: int | None) -> None:
    """Raise UserError for a window that no model, or not this one, can take."""
    if length < 2:
        raise UserError(f"length={length}: a window needs at least 2 tokens.")
    if max_length is not None and length > max_length:
        raise UserError(f"length={length} is over the model's maximum of {max_length}: ask for at most {max_length}.")


def shares(sources: Sequence[TextSource], samples: int) -> list[int]:
    """Split `samples` by weight with exact counts (largest remainder; ties go to the earlier source)."""
    if not sources:
        raise UserError("No calibration text was given: name at least one source.")
    total = math.fsum(source.weight for source in sources)
    exact = [samples * source.weight / total for source in sources]
    counts = [math.floor(share) for share in exact]
    by_remainder = sorted(range(len(sources)), key=lambda i: counts[i] - exact[i])
    for i in by_remainder[: samples - sum(counts)]:
        counts[i] += 1
    for source, count in zip(sources, counts, strict=True):
        if count == 0:
            raise UserError(
                f"{source} (weight {source.weight:g}) gets none of {samples} windows: raise one of the two."
            )
    return counts


def _draw(
    source: TextSource, tokenizer: Any, count: int, length: int, seed: tuple[int, int], generate: Generate | None
) -> tuple[Tensor, dict[str, Any]]:
    if source.kind == "self":
        if generate is None:
            raise UserError("The source 'self' needs a model to sample from: give a text file here.")
        tokens_NT = generate(count, length, seed[0])
        assert tokens_NT.shape == (count, length)
        return tokens_NT, {"sha256": text_sha256(str(tokens_NT.tolist())), "tokens": tokens_NT.numel()}
    limit = count * length * _CHARACTERS_PER_TOKEN * _HUB_SURPLUS
    text = read_text(source, tokenizer, max_characters=limit)
    ids, _ = tokenise(text, tokenizer)
    windows_NT = cut(ids, source, count, length)
    chosen = np.random.default_rng(seed).choice(len(windows_NT), size=count, replace=False)
    return windows_NT[torch.from_numpy(chosen)], {"sha256": text_sha256(text), "tokens": len(ids)}


def tokenise(text: str, tokenizer: Any) -> tuple[list[int], list[tuple[int, int]] | None]:
    """Return token ids and, where a fast tokenizer knows them, the characters (start, end) behind each."""
    fast = bool(getattr(tokenizer, "is_fast", False))
    encoded = tokenizer(text, return_offsets_mapping=fast, return_attention_mask=False, verbose=False)
    return encoded["input_ids"], encoded["offset_mapping"] if fast else None


def cut(ids: list[int], source: TextSource, wanted: int, length: int) -> Tensor:
    """Return all whole windows (N, length) of `ids`; UserError when fewer than `wanted` fit."""
    available = len(ids) // length
    if available < wanted:
        raise UserError(
            f"{source} holds {len(ids)} tokens, but {wanted} x {length} = {wanted * length} were asked for: "
            "give more text, fewer windows or a shorter length."
        )
    return torch.tensor(ids[: available * length], dtype=torch.int64).view(available, length)


def _window_bytes(text: str, spans: list[tuple[int, int]], window: int, length: int) -> int:
    first, last = window * length, (window + 1) * length - 1
    return len(text[spans[first][1] : spans[last][1]].encode())
