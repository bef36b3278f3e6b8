"""The driver: every metric of one model, and of its dense parent beside it, with all conditions in each result.

Final hidden states are computed once per model; perplexity and KL share them, and only a slice of one window's logits
lives at a time.

Shapes: N = windows, T = tokens in a window, H = hidden width.
"""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from prunus.errors import UserError
from prunus.evaluation.choices import Questions, read_questions, score_choices, token_rows
from prunus.evaluation.divergence import summarise_divergence, token_agreement, token_kl
from prunus.evaluation.perplexity import summarise_nll, token_nll
from prunus.evaluation.source import LogitSource, check_finite, logit_slices, name_of
from prunus.models.limits import max_length
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
    and, for texts, KL(dense || sparse) in nats per token and top-1 agreement. UserError, before anything is measured,
    for texts and choices that do not serve; later for figures that are NaN or infinite.
    """
    sources = [source] if dense is None else [source, dense]
    _check_same_vocabulary(sources)
    longest = min((maximum for one in sources if (maximum := max_length(one.config))), default=None)
    batches = [
        evaluation_windows(text, source.tokenizer, length=length, windows=windows, max_length=longest) for text in texts
    ]
    questions = None if choices is None else _questions(choices, limit, sources)
    results = [evaluate_text(source, dense, batch, against=against) for batch in batches]
    if questions is not None:
        results.append(evaluate_choices(source, dense, questions, against=against))
    return results


def _questions(path: Path, limit: int | None, sources: list[LogitSource]) -> Questions:
    """Return the questions of a file, all of which every model can read."""
    questions = read_questions(path, limit)
    for source in sources:
        token_rows(source, questions.tasks)
    return questions


def evaluate_text(source: LogitSource, dense: LogitSource | None, batch: TokenBatch, *, against: str | None) -> Result:
    """Return perplexity of one batch of windows, against the dense model when there is one. UserError for NaN."""
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
        **source.conditions,
        **_perplexity(source, nll_NT, facts),
    }
    if beside:
        dense_nll_NT, kl_NT, agree_NT = beside
        parent = _perplexity(sources[1], dense_nll_NT, facts)
        apart = asdict(summarise_divergence(kl_NT, agree_NT))
        check_finite(apart, name_of(source), facts["source"])
        result["against"] = {"path": against, **parent, **apart}
    return result


def _perplexity(source: LogitSource, nll_NT: Tensor, facts: dict[str, Any]) -> dict[str, Any]:
    numbers = asdict(summarise_nll(nll_NT, facts["scored_bytes"]))
    check_finite(numbers, name_of(source), facts["source"])
    return numbers


def mean_kl(source: LogitSource, dense: LogitSource, tokens_NT: Tensor) -> float:
    """Return KL(dense || sparse), mean nats per token, on given windows. UserError when it is NaN or infinite."""
    hidden = [s.final_hidden(tokens_NT, f"KL, {who}") for s, who in zip((source, dense), ROLES, strict=True)]
    kl_NT = _measure([source, dense], tokens_NT, hidden)[2]
    kl = kl_NT.double().mean().item()
    check_finite({"KL": kl}, name_of(source), "held-out text")
    return kl


def evaluate_choices(
    source: LogitSource, dense: LogitSource | None, questions: Questions, *, against: str | None
) -> Result:
    """Return multiple-choice accuracy on the questions of a file, with the dense model's beside it."""
    result = {
        "kind": "choices",
        "dataset": str(questions.path),
        "dataset_sha256": questions.sha256,
        "normalised_by": "UTF-8 bytes of the ending",
        **source.conditions,
        **asdict(score_choices(source, questions.tasks, f"Choices, {ROLES[0]}")),
    }
    if dense is not None:
        beside = score_choices(dense, questions.tasks, f"Choices, {ROLES[1]}")
        result["against"] = {"path": against, **asdict(beside)}
    return result


def _check_same_vocabulary(sources: list[LogitSource]) -> None:
    sizes = [source.config.get_text_config(decoder=True).vocab_size for source in sources]
    if len(set(sizes)) > 1:
        raise UserError(
            f"The models' vocabularies differ ({sizes[0]} and {sizes[1]} tokens), so KL has no meaning: "
            "compare with the dense model that this one was made from."
        )


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
