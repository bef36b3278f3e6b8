"""Score windows and write greedily with any decoder that gives its logits: what these two mean, in one place.

A decoder has `window(tokens)`, the logits (T, V) of every position of a text read from the start; `prompt(tokens)`,
which reads it too and gives those of the last position, (V,); and `step(token)`, (V,), which reads one token more.

Shapes: T = tokens of a window, V = vocabulary. Times are seconds.
"""

import time
from itertools import pairwise
from typing import Any, Protocol

import numpy as np


class Decoder(Protocol):
    """What an engine's model has to offer."""

    def window(self, tokens: list[int]) -> Any: ...
    def prompt(self, tokens: list[int]) -> Any: ...
    def step(self, token: int) -> Any: ...


def score(model: Decoder | None, request: dict[str, Any]) -> dict[str, Any]:
    """NLL in nats of each window's tokens after the first; the first `keep` rows of logits go to the file `logits`."""
    assert model is not None
    nll = []
    for number, window in enumerate(request["windows"]):
        logits_TV = model.window(window)
        if number == 0:
            np.save(request["logits"], logits_TV[: request["keep"]], allow_pickle=False)
        nll.append([_nll(logits_V, token) for logits_V, token in zip(logits_TV, window[1:], strict=False)])
    return {"nll": nll}


def _nll(logits_V: Any, token: int) -> float:
    x_V = logits_V.astype(np.float64)
    top = x_V.max()
    return float(top + np.log(np.exp(x_V - top).sum()) - x_V[token])


def generate(model: Decoder | None, request: dict[str, Any]) -> dict[str, Any]:
    """Exactly `new_tokens` greedy tokens after the prompt, end-of-sequence or not, and the time each part took."""
    assert model is not None
    start = time.perf_counter()
    logits_V = model.prompt(request["prompt"])
    prefilled = time.perf_counter()
    tokens = [int(logits_V.argmax())]
    ends = [time.perf_counter()]
    for _ in range(request["new_tokens"] - 1):
        tokens.append(int(model.step(tokens[-1]).argmax()))
        ends.append(time.perf_counter())
    steps = [end - begin for begin, end in pairwise(ends)]
    return {"tokens": tokens, "prefill": prefilled - start, "first_token": ends[0] - start, "steps": steps}
