"""What runs a packed model, and answers as inside/worker_loop.py says: what it can `do` stands below.

The engine is prunus itself, so this script, unlike those of other engines, imports it: the one that it lies in.

Shapes: T = tokens of a window, V = vocabulary.
"""

import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import torch
from decoder import generate, score
from transformers import AutoModelForCausalLM, AutoTokenizer
from worker_loop import memory, serve

import prunus  # noqa: F401 it lets transformers open packed models

ONE_BY_ONE = 16  # tokens of a window; the rest of it is read at once


class Model:
    """One packed directory, as a user of transformers gets it."""

    def __init__(self, directory: str, threads: int) -> None:
        torch.set_num_threads(threads)
        self.module: Any = AutoModelForCausalLM.from_pretrained(directory, local_files_only=True, use_safetensors=True)
        self.tokenizer: Any = AutoTokenizer.from_pretrained(directory, local_files_only=True)

    @torch.inference_mode()
    def _forward(self, tokens: list[int], cache: Any = None, **options: Any) -> Any:
        """Logits (T, V) in fp32 of tokens that follow what the cache holds; the cache is kept."""
        output = self.module(input_ids=torch.tensor([tokens]), past_key_values=cache, use_cache=True, **options)
        self.cache = output.past_key_values
        return output.logits[0].float().numpy()

    def window(self, tokens: list[int]) -> Any:
        """The first tokens are read one by one: a proof has to meet the kernels of decoding."""
        self.cache = None
        pieces = filter(None, [*([token] for token in tokens[:ONE_BY_ONE]), tokens[ONE_BY_ONE:]])
        return np.concatenate([self._forward(piece, self.cache) for piece in pieces])

    def prompt(self, tokens: list[int]) -> Any:
        return self._forward(tokens, logits_to_keep=1)[-1]

    def step(self, token: int) -> Any:
        return self._forward([token], self.cache)[-1]


def facts(model: Model | None, _request: dict[str, Any]) -> dict[str, Any]:
    """What was loaded."""
    assert model is not None
    config, tokenizer = model.module.config, model.tokenizer
    stated = model.module.generation_config.eos_token_id
    ends = stated if isinstance(stated, list) else [stated]
    dtype = str(model.module.dtype).removeprefix("torch.")
    return {
        "description": f"{type(model.module).__name__}, {dtype}",
        "architecture": type(model.module).__name__,
        "dtype": dtype,
        "vocabulary": int(config.get_text_config(decoder=True).vocab_size),
        "bos": tokenizer.bos_token_id,
        "eos": tokenizer.eos_token_id,
        "ends": sorted({end for end in (*ends, tokenizer.eos_token_id) if end is not None}),
        "chat_template": tokenizer.chat_template,
        "versions": {name: version(name) for name in ("torch", "transformers")},
    }


def tokenize(model: Model | None, request: dict[str, Any]) -> dict[str, Any]:
    """Token ids of each text: `bos` lets the tokenizer add what it puts around a text."""
    assert model is not None
    return {
        "tokens": [model.tokenizer(one["text"], add_special_tokens=one["bos"])["input_ids"] for one in request["texts"]]
    }


def load(asked: dict[str, Any]) -> Model:
    """The directory of a request, loaded."""
    return Model(asked["path"], asked["threads"])


if __name__ == "__main__":
    serve(load, {f.__name__: f for f in (facts, tokenize, score, generate, memory)})
