"""The engine "transformers": plain AutoModelForCausalLM, batch 1, greedy, with its KV cache."""

import inspect
import time
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from prunus.benchmark.runner import Times
from prunus.checkpoint import open_checkpoint
from prunus.machine_choice import DTYPES
from prunus.models.whole import load_whole
from prunus.runtime.linear import PackedLinear


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What is asked of every measured model. `dtype` "auto" is the checkpoint's own."""

    prompt_tokens: int
    new_tokens: int
    dtype: str
    device: str
    threads: int
    trust_remote_code: bool = False


class TransformersRunner:
    """A model directory, loaded as a user of transformers gets it."""

    def __init__(self, directory: Path, work: Work) -> None:
        self.directory, self.device = directory, work.device
        self.model = load(directory, work)
        self.vocabulary = int(self.model.get_input_embeddings().weight.shape[0])

    def generate(self, prompt: list[int], new_tokens: int) -> Times:
        """Exactly `new_tokens` greedy tokens after the prompt."""
        return generate(self.model, torch.tensor([prompt], device=self.device), new_tokens)

    def generate_together(self, prompts: list[list[int]], new_tokens: int) -> list[Times]:
        """One batch of prompts of one length: every request gets its token when all do."""
        times = generate(self.model, torch.tensor(prompts, device=self.device), new_tokens)
        return [times] * len(prompts)

    def sizes(self) -> dict[str, Any]:
        """Of the checkpoint and of the loaded weights."""
        return {
            "path": str(self.directory),
            "bytes_on_disk": sum(file.stat().st_size for file in self.directory.glob("*.safetensors")),
            "parameters": sum(p.numel() for p in self.model.parameters()) + sum(map(_weights, _packed(self.model))),
            "decode_bytes_per_token": decode_bytes(self.model),
        }


def load(directory: Path, work: Work) -> Any:
    """The model as a user of transformers gets it."""
    checkpoint = open_checkpoint(directory, trust_remote_code=work.trust_remote_code)
    return load_whole(checkpoint, DTYPES.get(work.dtype), work.device)


@torch.inference_mode()
def generate(model: Any, ids_NT: Tensor, new_tokens: int) -> Times:
    """Generate exactly `new_tokens` greedy tokens after each prompt, end-of-sequence or not, and time each part of it.

    Prefill is one forward over the prompt that fills the cache; TTFT adds the choice of the first token. Each decode
    step is one forward of one token and the choice of the next, so there are `new_tokens - 1` steps.
    """
    last_only = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
    start = _now(ids_NT.device)
    output = model(input_ids=ids_NT, use_cache=True, **last_only)
    prefilled = _now(ids_NT.device)
    token_N1 = output.logits[:, -1:].argmax(-1)
    step_ends = [_now(ids_NT.device)]
    for _ in range(new_tokens - 1):
        output = model(input_ids=token_N1, past_key_values=output.past_key_values, use_cache=True)
        token_N1 = output.logits[:, -1:].argmax(-1)
        step_ends.append(_now(ids_NT.device))
    steps = [end - begin for begin, end in pairwise(step_ends)]
    return Times(prefilled - start, step_ends[0] - start, steps)


def _now(device: torch.device) -> float:
    """Seconds on a monotonic clock, after everything queued on the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def decode_bytes(model: Any) -> int:
    """Weight bytes one decoded token reads: each weight once, of a lookup table one row. The KV cache is not in it.

    A tied embedding is read whole, as the output projection. For mixtures of experts this is an upper bound: a token
    reads only its own experts.
    """
    output = model.get_output_embeddings()
    output_weight = None if output is None else output.weight
    tables = {m.weight for m in model.modules() if isinstance(m, nn.Embedding) and m.weight is not output_weight}
    unread = sum((table.numel() - table.shape[1]) * table.element_size() for table in tables)
    buffers = [buffer for module in _packed(model) for buffer in module.buffers()]
    everything: int = sum(one.numel() * one.element_size() for one in [*model.parameters(), *buffers])
    return everything - unread


def _packed(model: Any) -> list[PackedLinear]:
    return [module for module in model.modules() if isinstance(module, PackedLinear)]


def _weights(module: PackedLinear) -> int:
    """As many as the layer that it stands for has, zeros and all."""
    return module.in_features * module.out_features + (0 if module.bias is None else module.out_features)
