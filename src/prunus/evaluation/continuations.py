"""Greedy continuations of a few prompts by two models, side by side: what a number cannot show."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from prunus.checkpoint import open_checkpoint
from prunus.models.streamed import load_tokenizer
from prunus.models.whole import load_whole
from prunus.progress import progress


def continuations(
    dense: Path,
    sparse: Path,
    *,
    prompts: Sequence[str],
    new_tokens: int = 40,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """Return {"kind": "continuations", "items": [{"prompt", "dense", "sparse"}], ...conditions}.

    The two model directories are loaded one after the other, so that only one model is in memory.
    """
    dense_texts, sparse_texts = (
        continue_greedily(
            path, prompts, new_tokens=new_tokens, dtype=dtype, device=device, trust_remote_code=trust_remote_code
        )
        for path in (dense, sparse)
    )
    return {
        "kind": "continuations",
        "decoding": "greedy",
        "new_tokens": new_tokens,
        "dtype": str(dtype).removeprefix("torch."),
        "device": device,
        "engine": "transformers",
        "items": [
            {"prompt": prompt, "dense": dense_text, "sparse": sparse_text}
            for prompt, dense_text, sparse_text in zip(prompts, dense_texts, sparse_texts, strict=True)
        ],
    }


def continue_greedily(
    path: Path, prompts: Sequence[str], *, new_tokens: int, dtype: torch.dtype, device: str, trust_remote_code: bool
) -> list[str]:
    """Return the new text that one model writes after each prompt, at most `new_tokens` tokens."""
    checkpoint = open_checkpoint(path, trust_remote_code=trust_remote_code)
    tokenizer = load_tokenizer(checkpoint)
    texts = []
    with progress(f"Continuations of {path.name}", total=1 + len(prompts)) as advance:
        model = load_whole(checkpoint, dtype, device)
        advance(1)
        for prompt in prompts:
            texts.append(_continue(model, tokenizer, prompt, new_tokens))
            advance(1)
    return texts


def _continue(model: Any, tokenizer: Any, prompt: str, new_tokens: int) -> str:
    encoded = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False).to(model.device)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    with torch.inference_mode():
        written = model.generate(**encoded, max_new_tokens=new_tokens, do_sample=False, pad_token_id=pad)
    return str(tokenizer.decode(written[0, encoded["input_ids"].shape[1] :], skip_special_tokens=True))
