"""Calibration text from the model itself, when no other text is at hand or none is like its training data.

Self-calibration after Ji et al. 2024, "Beware of Calibration Data for Pruning Large Language Models", arXiv:2410.17711,
and Williams et al. 2024, "Self-calibration for Language Model Quantization and Pruning", arXiv:2410.17170. Every sample
begins with the model's own start token. The first tokens are drawn at a higher temperature, which falls linearly to 1,
so that samples begin differently and then follow the model's distribution. Our own choices: the two constants below,
no filter by perplexity, and no stop at an end-of-text token (the next document follows, as in packed training data), so
that every window is full and nothing is padding.

Cost: one decoding step per token with a key-value cache, up to TOKENS_AT_ONCE tokens side by side. The samples are
cached on disk, because they are slow to make and depend only on the model and the settings.

Shapes: N = samples, T = tokens in a sample, V = vocabulary.
"""

import hashlib
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from prunus.cache import cache_dir
from prunus.errors import UserError
from prunus.progress import progress
from prunus.text.batches import Generate

FIRST_TEMPERATURE = 1.5
COOLING_TOKENS = 10
TOKENS_AT_ONCE = 32_768  # bounds the key-value cache, which holds every token of the samples that grow together


def self_generator(load_model: Callable[[], Any], tokenizer: Any, *, identity: str) -> Generate:
    """Return `generate(samples, length, seed) -> tokens_NT` for `calibration_tokens`.

    `load_model` gives the transformers model and is called only when the cache lacks the samples; `identity` is all of
    the model that they depend on: the hash of its weights and the dtype it runs in.
    """

    def generate(samples: int, length: int, seed: int) -> Tensor:
        settings = {
            "identity": identity,
            "samples": samples,
            "length": length,
            "seed": seed,
            "temperature": [FIRST_TEMPERATURE, COOLING_TOKENS],
        }
        key = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
        path = cache_dir() / "self_generated" / f"{key}.safetensors"
        if not path.exists():
            tokens_NT = sample_tokens(load_model(), start_token(tokenizer), samples=samples, length=length, seed=seed)
            _save(path, tokens_NT, settings)
        return load_file(path)["tokens_NT"]

    return generate


def start_token(tokenizer: Any) -> int:
    """Return the id that begins a text: BOS, or the end-of-text token of families that have no BOS."""
    for token in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    raise UserError("The model's tokenizer has no BOS or EOS token to start its own samples from: give a text file.")


def sample_tokens(model: Any, start: int, *, samples: int, length: int, seed: int) -> Tensor:
    """Return (N, T) int64 samples on the CPU, each beginning with `start`; seeded, so repeatable on one machine."""
    generator = torch.Generator().manual_seed(seed)
    at_once = sequences_at_once(samples, length)
    sizes = [min(at_once, samples - done) for done in range(0, samples, at_once)]
    with progress("Sampling the model's own text", total=len(sizes) * (length - 1)) as advance:
        return torch.cat([_sample_together(model, start, size, length, generator, advance) for size in sizes])


def sequences_at_once(samples: int, length: int) -> int:
    """How many samples grow side by side."""
    return min(max(TOKENS_AT_ONCE // length, 1), samples)


@torch.inference_mode()
def _sample_together(
    model: Any, start: int, samples: int, length: int, generator: torch.Generator, advance: Callable[[int], None]
) -> Tensor:
    tokens_NT = torch.full((samples, length), start, dtype=torch.int64)
    cache = None
    for position in range(1, length):
        last_N1 = tokens_NT[:, position - 1 : position].to(model.device)
        output = model(input_ids=last_N1, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        logits_NV = output.logits[:, -1].float().cpu() / temperature(position)
        tokens_NT[:, position] = torch.multinomial(logits_NV.softmax(dim=-1), 1, generator=generator)[:, 0]
        advance(1)
    return tokens_NT


def temperature(position: int) -> float:
    """Return the sampling temperature of the token at `position` (1 = the first one sampled)."""
    cooled = min((position - 1) / COOLING_TOKENS, 1.0)
    return FIRST_TEMPERATURE + (1.0 - FIRST_TEMPERATURE) * cooled


def _save(path: Path, tokens_NT: Tensor, settings: dict[str, Any]) -> None:
    """Write complete or not at all: a run that dies here leaves no half-written samples behind."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        unfinished = Path(folder) / path.name
        save_file({"tokens_NT": tokens_NT}, unfinished, metadata={"settings": json.dumps(settings)})
        unfinished.replace(path)
