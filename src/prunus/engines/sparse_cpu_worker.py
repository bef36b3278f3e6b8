"""What runs a packed model, and answers as inside/worker_loop.py says: what it can `do` stands below.

The engine is prunus itself, so this script, unlike those of other engines, imports it: the one that it lies in. Times
are seconds.

Shapes: T = tokens of a window, V = vocabulary.
"""

import sys
import time
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import torch
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
    def read(self, window: list[int]) -> torch.Tensor:
        """Logits (T, V) in fp32. The first tokens are read one by one: a proof has to meet the kernels of decoding."""
        cache, logits = None, []
        for piece in filter(None, [*([token] for token in window[:ONE_BY_ONE]), window[ONE_BY_ONE:]]):
            output = self.module(input_ids=torch.tensor([piece]), past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            logits.append(output.logits[0].float())
        return torch.cat(logits)


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


def score(model: Model | None, request: dict[str, Any]) -> dict[str, Any]:
    """NLL in nats of each window's tokens after the first; the first `keep` rows of logits go to the file `logits`."""
    assert model is not None
    answers = []
    for number, window in enumerate(request["windows"]):
        logits_TV = model.read(window)
        answers.append(torch.nn.functional.cross_entropy(logits_TV[:-1], torch.tensor(window[1:]), reduction="none"))
        if number == 0:
            np.save(request["logits"], logits_TV[: request["keep"]].numpy(), allow_pickle=False)
    return {"nll": [nll.tolist() for nll in answers]}


@torch.inference_mode()
def generate(model: Model | None, request: dict[str, Any]) -> dict[str, Any]:
    """Exactly `new_tokens` greedy tokens after the prompt, end-of-sequence or not, and the time each part took."""
    assert model is not None
    start = time.perf_counter()
    output = model.module(input_ids=torch.tensor([request["prompt"]]), use_cache=True, logits_to_keep=1)
    prefilled = time.perf_counter()
    tokens, ends = [output.logits[:, -1:].argmax(-1)], [time.perf_counter()]
    for _ in range(request["new_tokens"] - 1):
        output = model.module(input_ids=tokens[-1], past_key_values=output.past_key_values, use_cache=True)
        tokens.append(output.logits[:, -1:].argmax(-1))
        ends.append(time.perf_counter())
    steps = [end - begin for begin, end in pairwise(ends)]
    written = torch.cat(tokens, 1)[0].tolist()
    return {"tokens": written, "prefill": prefilled - start, "first_token": ends[0] - start, "steps": steps}


def load(asked: dict[str, Any]) -> Model:
    """The directory of a request, loaded."""
    return Model(asked["path"], asked["threads"])


if __name__ == "__main__":
    serve(load, {f.__name__: f for f in (facts, tokenize, score, generate, memory)})
