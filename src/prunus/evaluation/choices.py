"""Multiple choice by log-likelihood, from a local .jsonl file with `ctx`, `endings` and `label`.

The score of an ending is the summed log-likelihood of its tokens after `ctx` and one space, as in HellaSwag.
    acc       the ending with the highest sum is the right one
    acc_norm  the same, each sum divided by the ending's length in UTF-8 bytes: short endings lose their advantage
Standard errors are those of a share: sqrt(p (1 - p) / (tasks - 1)).

Rows are padded on the right: in a causal model later tokens cannot change earlier ones, so no attention mask is needed.

Shapes: N = rows (one per ending), T = padded tokens, V = vocabulary.
"""

import math
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from prunus.errors import UserError
from prunus.evaluation.perplexity import token_nll
from prunus.evaluation.source import LogitSource, check_finite, logit_slices, name_of
from prunus.models.limits import max_length
from prunus.progress import progress
from prunus.text.sources import decode_file, json_rows, text_sha256

PAD_TO = 32  # rows of one padded length go through the model together: few passes, little padding


@dataclass(frozen=True, slots=True)
class ChoiceTask:
    """One question: the start of a text, its possible endings, the index of the right one, and its line in the file."""

    context: str
    endings: tuple[str, ...]
    label: int
    line: int = 0


@dataclass(frozen=True, slots=True)
class Questions:
    """The tasks of one file, and the SHA-256 of its text."""

    path: Path
    sha256: str
    tasks: list[ChoiceTask]


@dataclass(frozen=True, slots=True)
class _Row:
    tokens: list[int]
    given: int  # tokens of the context; the others are scored


@dataclass(frozen=True, slots=True, kw_only=True)
class Choices:
    """Accuracy over `tasks` questions, plain and normalised, each with its standard error (None for one task)."""

    acc: float
    acc_standard_error: float | None
    acc_norm: float
    acc_norm_standard_error: float | None
    tasks: int


def read_questions(path: Path, limit: int | None = None) -> Questions:
    """Return the first `limit` tasks of a file; UserError names a bad line."""
    content = decode_file(path)
    tasks = [_task(row, path, number) for number, row in json_rows(content, path)][:limit]
    if not tasks:
        raise UserError(f"'{path}' holds no tasks: write lines with 'ctx', 'endings' and 'label'.")
    return Questions(path, text_sha256(content), tasks)


def score_choices(source: LogitSource, tasks: list[ChoiceTask], progress_text: str) -> Choices:
    """Answer every task with the model; raises UserError as `token_rows` does, and when the model gives NaN."""
    found = _log_likelihoods(source, token_rows(source, tasks), progress_text)
    check_finite({"log-likelihood": sum(found)}, name_of(source), "the choices")
    sums = iter(found)
    right, right_norm = [], []
    for task in tasks:
        scores = [next(sums) for _ in task.endings]
        per_byte = [score / len(ending.encode()) for score, ending in zip(scores, task.endings, strict=True)]
        right.append(_best(scores) == task.label)
        right_norm.append(_best(per_byte) == task.label)
    acc, acc_norm = sum(right) / len(tasks), sum(right_norm) / len(tasks)
    return Choices(
        acc=acc,
        acc_standard_error=_share_error(acc, len(tasks)),
        acc_norm=acc_norm,
        acc_norm_standard_error=_share_error(acc_norm, len(tasks)),
        tasks=len(tasks),
    )


def _task(row: dict[str, Any], path: Path, number: int) -> ChoiceTask:
    context, endings, label = row.get("ctx"), row.get("endings"), row.get("label")
    texts = isinstance(context, str) and isinstance(endings, list) and all(isinstance(e, str) and e for e in endings)
    if not (texts and isinstance(label, int) and 0 <= label < len(endings or [])):
        raise UserError(f"Line {number} of '{path}' is no task: it needs 'ctx', 'endings' and a 'label'.")
    return ChoiceTask(str(context), tuple(endings or ()), label, number)


def token_rows(source: LogitSource, tasks: list[ChoiceTask]) -> list[_Row]:
    """Return one row per ending; UserError names the line of a task that is too long or leaves nothing."""
    tokenizer, maximum = source.tokenizer, max_length(source.config)
    return [_row(task, ending, tokenizer, maximum) for task in tasks for ending in task.endings]


def _row(task: ChoiceTask, ending: str, tokenizer: Any, maximum: int | None) -> _Row:
    """Tokenise context and ending together, so that the tokens are those of running text."""
    given = len(tokenizer(task.context, verbose=False)["input_ids"])
    tokens = tokenizer(f"{task.context} {ending}", verbose=False)["input_ids"]
    if not 0 < given < len(tokens):
        raise UserError(f"The task on line {task.line} leaves no tokens to score: give a longer context and endings.")
    if maximum is not None and len(tokens) > maximum:
        raise UserError(
            f"The task on line {task.line} takes {len(tokens)} tokens, over the model's maximum of {maximum}: shorten "
            "it or leave it out."
        )
    return _Row(tokens, given)


def _log_likelihoods(source: LogitSource, rows: list[_Row], progress_text: str) -> list[float]:
    """Return the summed log-likelihood of each row's ending, in the order of the rows."""
    sums = [0.0] * len(rows)
    buckets: dict[int, list[int]] = defaultdict(list)
    for index, row in enumerate(rows):
        width = math.ceil(len(row.tokens) / PAD_TO) * PAD_TO
        buckets[min(width, max_length(source.config) or width)].append(index)
    for width, indices in sorted(buckets.items()):
        tokens_NT = torch.tensor([rows[i].tokens + [0] * (width - len(rows[i].tokens)) for i in indices])
        hidden_NTH = source.final_hidden(tokens_NT, f"{progress_text}, {width} tokens")
        with progress(f"Scoring {width} tokens", total=len(indices)) as advance:
            for i, hidden_TH in zip(indices, hidden_NTH, strict=True):
                sums[i] = _ending_log_likelihood(source, rows[i], hidden_TH)
                advance(1)
    return sums


def _ending_log_likelihood(source: LogitSource, row: _Row, hidden_TH: Tensor) -> float:
    tokens_1T, hidden_1TH = torch.tensor([row.tokens]), hidden_TH[None, : len(row.tokens)]
    slices = logit_slices([source], tokens_1T, [hidden_1TH], first=row.given - 1)
    return -sum(token_nll(logits[0], targets_t).double().sum().item() for logits, targets_t in slices)


def _best(scores: list[float]) -> int:
    return scores.index(max(scores))


def _share_error(share: float, tasks: int) -> float | None:
    return None if tasks < 2 else math.sqrt(share * (1 - share) / (tasks - 1))
