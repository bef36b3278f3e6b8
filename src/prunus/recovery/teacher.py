"""The teacher: the dense model in memory, or its likeliest tokens on disk so that it runs once.

Files of the disk form are safetensors of WINDOWS_A_FILE windows each, written whole or not at all, in the user's cache:
a later run on the same text with the same teacher, with another learning rate say, needs no teacher at all.

Shapes: B = sequences, T = tokens, N = windows, V = vocabulary, K = likeliest tokens, H = hidden width.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import safe_open
from torch import Tensor

from prunus.cache import cache_dir
from prunus.checkpoint import Checkpoint
from prunus.checkpoint.output import write_tensors
from prunus.errors import UserError
from prunus.progress import progress
from prunus.recovery.losses import AllLogits, LikeliestLogits, TeacherLogits, top_k_log_p

WINDOWS_A_FILE = 16
TRAIN, HELD_OUT = "train", "held_out"  # the parts of the text; held-out KL is always taken at temperature 1


@dataclass(frozen=True, slots=True)
class Answer:
    """What the teacher says of a batch: logits of the positions that predict a token, hidden states when asked for."""

    logits: TeacherLogits
    hidden: tuple[Tensor, ...]  # embedding, then one (B, T, H) per block


class Teacher(Protocol):
    """Answers for windows of the training text or of the held-out text, by their number."""

    def answer(self, tokens_BT: Tensor, part: str, windows: Sequence[int], *, hidden: bool) -> Answer: ...


def predicting(logits_BTV: Tensor) -> Tensor:
    """The logits that predict a token of their own window, (B * (T - 1), V)."""
    return logits_BTV[:, :-1].flatten(0, 1)


class TeacherInMemory:
    """Runs beside the student, in its forward dtype."""

    def __init__(self, model: Any) -> None:
        self.model = model.requires_grad_(False)

    @torch.no_grad()
    def answer(self, tokens_BT: Tensor, part: str, windows: Sequence[int], *, hidden: bool) -> Answer:
        output = self.model(input_ids=tokens_BT, use_cache=False, output_hidden_states=hidden)
        return Answer(AllLogits(predicting(output.logits)), tuple(output.hidden_states) if hidden else ())


class TeacherOnDisk:
    """The k likeliest tokens of every window, read back file by file."""

    def __init__(self, folder: Path, device: str | torch.device) -> None:
        self.folder, self.device = folder, device

    def answer(self, tokens_BT: Tensor, part: str, windows: Sequence[int], *, hidden: bool) -> Answer:
        assert not hidden, "hidden states are not kept on disk; refused with the settings"
        rows = [self._window(part, window) for window in windows]
        index_tK, log_p_tK = (torch.cat(pieces).to(self.device) for pieces in zip(*rows, strict=True))
        return Answer(LikeliestLogits(index_tK.long(), log_p_tK), ())

    def _window(self, part: str, window: int) -> tuple[Tensor, Tensor]:
        row = window % WINDOWS_A_FILE
        with safe_open(_file(self.folder, part, window // WINDOWS_A_FILE), framework="pt") as file:
            return file.get_slice("index")[row], file.get_slice("log_p")[row]


def teacher_on_disk(
    parts: dict[str, Tensor],
    *,
    checkpoint: Checkpoint,
    load: Callable[[], Any],
    k: int,
    temperature: float,
    dtype: torch.dtype,
    device: str | torch.device,
) -> TeacherOnDisk:
    """Run the teacher over every window that is not on disk yet; `load` gives it and is called only then.

    `parts` are the windows (N, T) by name. Raises UserError when k is no number of tokens of this vocabulary.
    """
    vocabulary = int(checkpoint.config.get_text_config(decoder=True).vocab_size)
    if k >= vocabulary:
        raise UserError(f"top_k={k}: the teacher's vocabulary has {vocabulary} tokens; give fewer, such as 64.")
    settings = {"teacher": checkpoint.sha256, "k": k, "temperature": temperature, "dtype": str(dtype)}
    texts = {name: hashlib.sha256(tokens_NT.numpy().tobytes()).hexdigest() for name, tokens_NT in parts.items()}
    key = hashlib.sha256(json.dumps({**settings, **texts}, sort_keys=True).encode()).hexdigest()
    folder = cache_dir() / "teacher_logits" / key
    folder.mkdir(parents=True, exist_ok=True)
    missing = [
        (name, number)
        for name, tokens_NT in parts.items()
        for number in range(-(-len(tokens_NT) // WINDOWS_A_FILE))
        if not _file(folder, name, number).exists()
    ]
    if missing:
        _fill(folder, missing, parts, load(), k, temperature)
    return TeacherOnDisk(folder, device)


def _fill(
    folder: Path, missing: list[tuple[str, int]], parts: dict[str, Tensor], model: Any, k: int, temperature: float
) -> None:
    with progress("Teacher, once", len(missing)) as advance, torch.inference_mode():
        for name, number in missing:
            windows_NT = parts[name][number * WINDOWS_A_FILE : (number + 1) * WINDOWS_A_FILE]
            at = 1.0 if name == HELD_OUT else temperature
            rows = [_likeliest(model, tokens_T[None], k, at) for tokens_T in windows_NT]
            index, log_p = (torch.stack(column) for column in zip(*rows, strict=True))
            write_tensors(_file(folder, name, number), {"index": index, "log_p": log_p})
            advance(1)


def _likeliest(model: Any, tokens_1T: Tensor, k: int, temperature: float) -> tuple[Tensor, Tensor]:
    logits_tV = predicting(model(input_ids=tokens_1T.to(model.device), use_cache=False).logits)
    pieces = [top_k_log_p(piece_tV, k, temperature) for piece_tV in torch.split(logits_tV, 64)]
    index_tK, log_p_tK = (torch.cat(column) for column in zip(*pieces, strict=True))
    return index_tK.to(torch.int32), log_p_tK.to(torch.float16)


def _file(folder: Path, part: str, number: int) -> Path:
    return folder / f"{part}-{number:06d}.safetensors"
