"""The proof of an export: the engine, in a fresh process, has loaded the file and computes what transformers does.

Compared on the same token windows: next-token logits of the first positions (KL and the likeliest token), NLL of all
positions, a greedy continuation up to its first difference, and tokenization. transformers is run block by block in
float32, so a model of any size can be proved.

Shapes: N = windows, T = tokens of a window, P = positions whose logits are compared, V = vocabulary.
"""

import math
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor

from prunus.calibration import StreamedSource
from prunus.engines.worker import Worker, bytes_of
from prunus.evaluation.divergence import token_agreement, token_kl
from prunus.evaluation.perplexity import token_nll
from prunus.evaluation.source import logit_slices
from prunus.exporting.tokenization import compare_text
from prunus.exporting.types import FileType
from prunus.models import StreamedModel
from prunus.models.limits import max_length
from prunus.text.batches import TokenBatch, evaluation_windows
from prunus.text.sources import TextSource

WINDOWS, LENGTH = 4, 128
POSITIONS = 64
PROMPT, NEW_TOKENS = 32, 32  # of the greedy continuation


@dataclass(frozen=True, slots=True)
class Figures:
    """What one side computed: NLL (N, T - 1) in nats, and the logits (P, V) of the first positions."""

    nll_NT: Tensor
    logits_PV: Tensor


def proof_text(model: StreamedModel) -> TokenBatch:
    """The windows that the proof is made on. UserError, before the export, when the model cannot read them."""
    longest = max_length(model.config) or LENGTH
    length = min(LENGTH, longest)
    return evaluation_windows(TextSource("builtin"), model.tokenizer, length=length, windows=WINDOWS)


def prove(
    worker: Worker, file: Path, model: StreamedModel, batch: TokenBatch, kind: FileType, *, timeout: float | None
) -> dict[str, Any]:
    """Everything that was compared, and under `failures` a sentence for each bound that is not kept.

    `worker` is a fresh process of the engine; it has ended when this returns.
    """
    tokens_NT = batch.tokens_NT
    source = StreamedSource(model, max_memory=None)
    prompt, new = _greedy_lengths(tokens_NT.shape[1])
    wait = timeout or worker.patience(bytes_of(file))
    with worker:
        loaded = worker.load(file, context=tokens_NT.shape[1] + 8, threads=torch.get_num_threads(), timeout=timeout)
        text = compare_text(worker, model.checkpoint, source.tokenizer, loaded)
        theirs = _score(worker, tokens_NT, wait)
        request = {"do": "generate", "prompt": tokens_NT[0, :prompt].tolist(), "new_tokens": new}
        written = worker.ask(request, timeout=wait)["tokens"]
    ours = _reference(source, tokens_NT, theirs.logits_PV.shape[0])
    logits, nll = _logits(ours, theirs, kind), _nll(ours, theirs, kind)
    equal = _equal_tokens(source, tokens_NT[0, :prompt].tolist(), written)
    failures = [sentence for part in (text, logits, nll) for sentence in part.pop("failures")]
    greedy = {"prompt_tokens": prompt, "new_tokens": new, "equal": equal}
    conditions = _conditions(worker.name, batch, loaded)
    return {**conditions, **logits, **nll, "greedy": greedy, "tokenization": text, "failures": failures}


def _greedy_lengths(length: int) -> tuple[int, int]:
    """Tokens of the prompt and of the continuation, that fit a window together."""
    prompt = min(PROMPT, length // 2)
    return prompt, min(NEW_TOKENS, length - prompt)


def _score(worker: Worker, tokens_NT: Tensor, timeout: float) -> Figures:
    """Let the engine read the windows. Logits are many, so they come in a file, which is plain numbers."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "logits.npy"
        request = {"do": "score", "windows": tokens_NT.tolist(), "keep": POSITIONS, "logits": str(file)}
        nll = worker.ask(request, timeout=timeout)["nll"]
        logits_PV = torch.from_numpy(np.load(file, allow_pickle=False)).float()
    return Figures(torch.tensor(nll, dtype=torch.float64), logits_PV)


def _reference(source: StreamedSource, tokens_NT: Tensor, positions: int) -> Figures:
    """The same by transformers, in float32."""
    hidden_NTH = source.final_hidden(tokens_NT, "Proof, transformers")
    nll, first = [], []
    for n in range(len(tokens_NT)):
        rows = [
            (token_nll(logits_tV, targets_t), logits_tV[:positions] if n == 0 else None)
            for (logits_tV,), targets_t in logit_slices([source], tokens_NT[n : n + 1], [hidden_NTH[n : n + 1]])
        ]
        nll.append(torch.cat([row for row, _ in rows]).double())
        first += [logits_tV for _, logits_tV in rows if logits_tV is not None]
    return Figures(torch.stack(nll), torch.cat(first)[:positions])


def _logits(ours: Figures, theirs: Figures, kind: FileType) -> dict[str, Any]:
    """KL(transformers || engine) over the compared positions, the likeliest tokens, and the largest difference."""
    if ours.logits_PV.shape[1] != theirs.logits_PV.shape[1]:
        return {"failures": ["the engine's vocabulary has another size, so that no logits can be compared"]}
    theirs_PV = theirs.logits_PV[: len(ours.logits_PV)]  # after the last token of a short window, nothing is predicted
    kl = token_kl(ours.logits_PV, theirs_PV).double().mean().item()
    apart = (ours.logits_PV.log_softmax(-1) - theirs_PV.log_softmax(-1)).abs().max().item()
    return {
        "positions": len(ours.logits_PV),
        "kl": kl,
        "kl_allowed": kind.kl,
        "top1_agreement": token_agreement(ours.logits_PV, theirs_PV).double().mean().item(),
        "largest_log_probability_difference": apart,
        "failures": []
        if kl <= kind.kl
        else [f"KL to transformers is {kl:.4g} nats, over the {kind.kl:g} of {kind.name}"],
    }


def _nll(ours: Figures, theirs: Figures, kind: FileType) -> dict[str, Any]:
    """Perplexity of both on all windows."""
    dense, engine = ours.nll_NT.mean().item(), theirs.nll_NT.mean().item()
    apart = abs(engine - dense)
    said = (
        f"NLL is {engine:.4f} nats a token, {dense:.4f} in transformers, over the {kind.nll:g} allowed to {kind.name}"
    )
    return {
        "perplexity": {"engine": math.exp(min(engine, 700)), "transformers": math.exp(min(dense, 700))},
        "nll_difference": engine - dense,
        "nll_allowed": kind.nll,
        "failures": [] if apart <= kind.nll else [said],
    }


def _equal_tokens(source: StreamedSource, prompt: list[int], written: list[int]) -> int:
    """How many of the engine's greedy tokens transformers would have written, up to the first difference.

    Until then both have read the same tokens, so one pass over the engine's text tells it.
    """
    tokens_1T = torch.tensor([[*prompt, *written]])
    hidden_1TH = source.final_hidden(tokens_1T, "Proof, continuation")
    slices = logit_slices([source], tokens_1T, [hidden_1TH], first=len(prompt) - 1)
    equal = torch.cat([logits_tV.argmax(-1) == targets_t for (logits_tV,), targets_t in slices])
    return int(equal.long().cumprod(0).sum())


def _conditions(engine: str, batch: TokenBatch, loaded: dict[str, Any]) -> dict[str, Any]:
    facts = batch.description[0]
    return {
        "engine": engine,
        "loaded": loaded["description"],
        "reference": f"transformers {transformers.__version__}, float32",
        "dataset": facts["source"],
        "dataset_sha256": facts["sha256"],
        "windows": batch.tokens_NT.shape[0],
        "window": batch.tokens_NT.shape[1],
        "threads": torch.get_num_threads(),
    }
