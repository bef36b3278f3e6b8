"""The driver: every metric of one model, and of its dense parent beside it, with all conditions in each result.

Final hidden states are computed once per model; perplexity and KL share them, and only a slice of one window's logits
lives at a time.

Shapes: N = windows, T = tokens in a window, H = hidden width.
"""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from prunus.errors import UserError
from prunus.evaluation.choices import read_tasks, score_choices
from prunus.evaluation.divergence import summarise_divergence, token_agreement, token_kl
from prunus.evaluation.perplexity import summarise_nll, token_nll
from prunus.evaluation.source import LogitSource, logit_slices
from prunus.progress import progress
from prunus.text.batches import TokenBatch, evaluation_windows
from prunus.text.sources import TextSource

Result = dict[str, Any]

ROLES = ("this model", "dense model")


def evaluate_model(
    source: LogitSource,
    dense: LogitSource | None = None,
    *,
    texts: tuple[TextSource, ...] = (),
    length: int = 2048,
    windows: int | None = None,
    choices: Path | None = None,
    limit: int | None = None,
    against: str | None = None,
) -> list[Result]:
    """Return one JSON-able result per text (perplexity) and for the file of choices, each with its conditions.

    With `dense`, each result carries the same metric of the dense model under `against`, with `against` as its path,
    and, for texts, KL(dense || sparse) in nats per token and top-1 agreement. UserError for text that is too short.
    """
    config = source.config.get_text_config(decoder=True)
    maximum = getattr(config, "max_position_embeddings", None)
    if dense is not None:
        _check_same_vocabulary(config.vocab_size, dense.config.get_text_config(decoder=True).vocab_size)
    results = []
    for text in texts:
        batch = evaluation_windows(text, source.tokenizer, length=length, windows=windows, max_length=maximum)
        results.append(evaluate_text(source, dense, batch, against=against))
    if choices is not None:
        results.append(evaluate_choices(source, dense, choices, limit=limit, against=against))
    return results


def evaluate_text(source: LogitSource, dense: LogitSource | None, batch: TokenBatch, *, against: str | None) -> Result:
    """Return perplexity of one batch of windows, against the dense model when there is one."""
    facts = batch.description[0]
    sources = [source] if dense is None else [source, dense]
    hidden = [s.final_hidden(batch.tokens_NT, f"Perplexity, {who}") for s, who in zip(sources, ROLES, strict=False)]
    nll_NT, *beside = _measure(sources, batch.tokens_NT, hidden)
    result = {
        "kind": "perplexity",
        "dataset": facts["source"],
        "dataset_sha256": facts["sha256"],
        "window": batch.tokens_NT.shape[1],
        "stride": batch.tokens_NT.shape[1],
        "windows": batch.tokens_NT.shape[0],
        **conditions(source),
        **asdict(summarise_nll(nll_NT, facts["scored_bytes"])),
    }
    if beside:
        dense_nll_NT, kl_NT, agree_NT = beside
        parent = asdict(summarise_nll(dense_nll_NT, facts["scored_bytes"]))
        result["against"] = {"path": against, **parent, **asdict(summarise_divergence(kl_NT, agree_NT))}
    return result


def mean_kl(source: LogitSource, dense: LogitSource, tokens_NT: Tensor) -> float:
    """Return KL(dense || sparse), mean nats per token, on given windows."""
    hidden = [s.final_hidden(tokens_NT, f"KL, {who}") for s, who in zip((source, dense), ROLES, strict=True)]
    kl_NT = _measure([source, dense], tokens_NT, hidden)[2]
    return kl_NT.double().mean().item()


def evaluate_choices(
    source: LogitSource, dense: LogitSource | None, path: Path, *, limit: int | None, against: str | None
) -> Result:
    """Return multiple-choice accuracy on a local file, with the dense model's beside it."""
    tasks, sha256 = read_tasks(path, limit)
    result = {
        "kind": "choices",
        "dataset": str(path),
        "dataset_sha256": sha256,
        "normalised_by": "UTF-8 bytes of the ending",
        **conditions(source),
        **asdict(score_choices(source, tasks, f"Choices, {ROLES[0]}")),
    }
    if dense is not None:
        result["against"] = {"path": against, **asdict(score_choices(dense, tasks, f"Choices, {ROLES[1]}"))}
    return result


def _check_same_vocabulary(size: int, dense_size: int) -> None:
    if size != dense_size:
        raise UserError(
            f"The models' vocabularies differ ({size} and {dense_size} tokens), so KL has no meaning: "
            "compare with the dense model that this one was made from."
        )


def conditions(source: LogitSource) -> Result:
    """Return how the forward pass was run: engine, dtype, threads, versions."""
    return {
        "engine": "transformers",
        "dtype": str(source.dtype).removeprefix("torch."),
        "batch": 1,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def _measure(sources: list[LogitSource], tokens_NT: Tensor, hidden: list[Tensor]) -> list[Tensor]:
    """Return [nll_NT], with a dense model [nll_NT, dense_nll_NT, kl_NT, agree_NT], over the T - 1 scored positions."""
    columns: list[list[Tensor]] = []
    with progress("Scoring windows", total=len(tokens_NT)) as advance:
        for n in range(len(tokens_NT)):
            slices = logit_slices(sources, tokens_NT[n : n + 1], [h_NTH[n : n + 1] for h_NTH in hidden])
            pieces = zip(*(_metrics(*piece) for piece in slices), strict=True)
            columns.append([torch.cat(parts).cpu() for parts in pieces])
            advance(1)
    return [torch.stack(column) for column in zip(*columns, strict=True)]


def _metrics(logits: list[Tensor], targets_t: Tensor) -> list[Tensor]:
    nll = [token_nll(logits_tV, targets_t) for logits_tV in logits]
    if len(logits) == 1:
        return nll
    sparse_tV, dense_tV = logits
    return [*nll, token_kl(dense_tV, sparse_tV), token_agreement(dense_tV, sparse_tV)]
