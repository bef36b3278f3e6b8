"""What runs in llama.cpp's environment, and answers as inside/worker_loop.py says: what it can `do` stands below.

Started by prunus with the engine's own Python, so it imports nothing of prunus. Times are seconds.

Shapes: T = tokens of a window, V = vocabulary.
"""

import ctypes
import sys
import time
from itertools import pairwise
from typing import Any

import llama_cpp.llama_cpp as library
import numpy as np
from decoder import generate, score
from worker_loop import memory, serve

WARNING = 3  # ggml's log levels: debug, info, warning, error, continuation of the last
CONTINUATION = 5


class Model:
    """One GGUF file, loaded, with a context that keeps keys and values as the engine does by default.

    It has room for so many sequences of `context` tokens.
    """

    def __init__(self, file: str, context: int, sequences: int, threads: int) -> None:
        parameters = library.llama_model_default_params()
        parameters.n_gpu_layers = 0  # what is measured and proved is the CPU
        parameters.use_extra_bufts = not has_amx()
        self.model = library.llama_model_load_from_file(file.encode(), parameters)
        if not self.model:
            raise ValueError(f"llama.cpp cannot load {file}")
        self.vocabulary = library.llama_model_get_vocab(self.model)
        self.size = library.llama_vocab_n_tokens(self.vocabulary)
        options = library.llama_context_default_params()
        options.n_ctx, options.n_seq_max = context * sequences, sequences
        options.n_threads, options.n_threads_batch = threads, threads
        self.context = library.llama_init_from_model(self.model, options)
        if not self.context:
            raise ValueError(f"llama.cpp cannot make a context of {context} tokens for {file}")
        self.batch_size = min(int(library.llama_n_batch(self.context)), context)
        self.length = 0  # of the text that `prompt` and `step` have read

    def window(self, tokens: list[int]) -> Any:
        self.forget()
        return self.forward(tokens, 0, every=True)

    def prompt(self, tokens: list[int]) -> Any:
        self.forget()
        self.length = len(tokens)
        return self.read(tokens)

    def step(self, token: int) -> Any:
        self.length += 1
        return self.forward([token], self.length - 1, every=False)[0]

    def forget(self) -> None:
        """Empty the cache of keys and values."""
        library.llama_memory_clear(library.llama_get_memory(self.context), True)

    def forward(self, tokens: list[int], first: int, *, every: bool, sequence: int = 0) -> Any:
        """Read tokens at positions `first`...; returns the logits (T, V) of `every` position, or (1, V)."""
        wanted = [every or i == len(tokens) - 1 for i in range(len(tokens))]
        return self._decode([(token, first + i, sequence) for i, token in enumerate(tokens)], wanted)

    def step_together(self, tokens: list[int], position: int) -> Any:
        """Read one token of each sequence, all at one position; returns their logits (N, V)."""
        places = [(token, position, sequence) for sequence, token in enumerate(tokens)]
        return self._decode(places, [True] * len(tokens))

    def _decode(self, places: list[tuple[int, int, int]], wanted: list[bool]) -> Any:
        """Read (token, position, sequence) in one batch; returns the logits of those that are wanted."""
        batch = library.llama_batch_init(len(places), 0, 1)
        batch.n_tokens = len(places)
        for i, (token, position, sequence) in enumerate(places):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0] = token, position, 1, sequence
            batch.logits[i] = wanted[i]
        code = library.llama_decode(self.context, batch)
        library.llama_batch_free(batch)
        if code != 0:
            raise ValueError(f"llama_decode returned {code}")
        return np.ctypeslib.as_array(library.llama_get_logits(self.context), (sum(wanted), self.size))

    def read(self, tokens: list[int], sequence: int = 0) -> Any:
        """Read a prompt from the start, in the engine's own batches; returns the logits (V,) of its last position."""
        logits_1V = None
        for start in range(0, len(tokens), self.batch_size):
            logits_1V = self.forward(tokens[start : start + self.batch_size], start, every=False, sequence=sequence)
        assert logits_1V is not None
        return logits_1V[-1]


def has_amx() -> bool:
    """Whether the library would repack weights for AMX, where it dies at the first product (llama.cpp issue 20824)."""
    return b"AMX_INT8 = 1" in library.llama_print_system_info()


def describe(_model: Model | None, _request: dict[str, Any]) -> dict[str, Any]:
    """The library's own version and which instructions of the processor it was built to use."""
    told = library.llama_print_system_info().decode()
    return {"library": library.llama_version().decode(), "instructions": " ".join(told.split())}


def quantize(_model: Model | None, request: dict[str, Any]) -> dict[str, Any]:
    """Write `target` with the matrices of `source` in the file type of number `type`, by llama.cpp's own quantizer."""
    parameters = library.llama_model_quantize_default_params()
    parameters.ftype, parameters.nthread = request["type"], request["threads"]
    code = library.llama_model_quantize(
        request["source"].encode(), request["target"].encode(), ctypes.byref(parameters)
    )
    if code != 0:
        raise ValueError(f"llama_model_quantize returned {code}")
    return {}


def facts(model: Model | None, _request: dict[str, Any]) -> dict[str, Any]:
    """What the engine made of the loaded file."""
    assert model is not None
    text = ctypes.create_string_buffer(256)
    library.llama_model_desc(model.model, text, len(text))
    template = library.llama_model_chat_template(model.model, None)
    return {
        "description": text.value.decode(),
        "parameters": library.llama_model_n_params(model.model),
        "vocabulary": model.size,
        "layers": library.llama_model_n_layer(model.model),
        "bos": library.llama_vocab_bos(model.vocabulary),
        "eos": library.llama_vocab_eos(model.vocabulary),
        "ends": [t for t in range(model.size) if library.llama_vocab_is_eog(model.vocabulary, t)],
        "chat_template": template.decode() if template else None,
    }


def tokenize(model: Model | None, request: dict[str, Any]) -> dict[str, Any]:
    """Token ids of each text: `bos` lets the model add what it puts before a text, `special` reads control tokens."""
    assert model is not None
    tokens = []
    for one in request["texts"]:
        text = one["text"].encode()
        room = (library.llama_token * (len(text) + 16))()
        count = library.llama_tokenize(model.vocabulary, text, len(text), room, len(room), one["bos"], one["special"])
        if count < 0:
            raise ValueError(f"llama_tokenize returned {count}")
        tokens.append(list(room[:count]))
    return {"tokens": tokens}


def generate_together(model: Model | None, request: dict[str, Any]) -> dict[str, Any]:
    """`new_tokens` greedy tokens for each of several requests that come at once, with prompts of one length.

    Prompts are read one after the other, then all sequences step together. Of each request its tokens, the seconds
    until the first of them, and those of every later one: the second waits until all prompts are read.
    """
    assert model is not None
    prompts, start = request["prompts"], time.perf_counter()
    model.forget()
    tokens, ends = [], []
    for sequence, prompt in enumerate(prompts):
        tokens.append([int(model.read(prompt, sequence).argmax())])
        ends.append([time.perf_counter()])
    for number in range(request["new_tokens"] - 1):
        logits_NV = model.step_together([own[-1] for own in tokens], len(prompts[0]) + number)
        for own, chosen in zip(tokens, logits_NV.argmax(-1), strict=True):
            own.append(int(chosen))
        now = time.perf_counter()
        for own_ends in ends:
            own_ends.append(now)
    steps = [[end - begin for begin, end in pairwise(own)] for own in ends]
    told = zip(tokens, ends, steps, strict=True)
    return {"requests": [{"tokens": t, "first_token": e[0] - start, "steps": s} for t, e, s in told]}


DO = {f.__name__: f for f in (describe, quantize, facts, tokenize, score, generate, generate_together, memory)}


def main() -> None:
    """Answer until the input ends."""
    library.llama_log_set(_LOG, ctypes.c_void_p(0))
    library.llama_backend_init()
    serve(lambda asked: Model(asked["path"], asked["context"], asked.get("sequences", 1), asked["threads"]), DO)


_shown = False


def _log(level: int, text: bytes, _data: Any) -> None:
    """Warnings and errors of the library, on stderr."""
    global _shown
    _shown = level >= WARNING if level != CONTINUATION else _shown
    if _shown:
        sys.stderr.write(text.decode(errors="replace"))
        sys.stderr.flush()


_LOG = library.llama_log_callback(_log)  # outlives main: the library calls it until the end


if __name__ == "__main__":
    main()
