"""Decoding of a model of 1.1 billion random parameters: dense and packed in transformers, and in llama.cpp, in turn.

The shape: Llama, hidden 2048, FFN 5632, 22 layers, 32 heads on 4, the tokenizer's vocabulary, head not tied. Packed
models get their zeros at random (speed does not depend on the values); embedding and norms are those of the dense one.
Batch 1, a prompt of random tokens, greedy tokens after it. All models are loaded, then each generates once in every
round; every other round runs backwards. One line of JSON a model:

    tokens_per_second   1 / median of all decode steps
    over_dense          dense bf16 in transformers / this one, decode seconds, the median of the rounds
    bytes               of weights that a token reads; coverage: the share of them behind kernels of ours
    share               bytes a second / what the memory alone gave in the same round, the median
    outside             seconds of a token that are not products of packed matrices (packed models)
    over_NAME           the same as over_dense, for the models named by --against

The machine must be quiet, and have memory for all of them (18 GB). Only ratios of one run count.

usage: decode.py FOLDER --tokenizer DIR [--models dense,0.5-bf16,...] [--gguf f16,q8_0,q4_0] [--prompt-tokens 128]
                 [--new-tokens 128] [--rounds 5] [--layers 22] [--out ROWS.jsonl]
"""

import argparse
import random
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from statistics import median
from typing import Any

import torch
from lines import add
from memory import write_random_weights
from peers import prunus
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from prunus.benchmark.engine_process import EngineRunner
from prunus.benchmark.machine import machine
from prunus.benchmark.runner import Times
from prunus.benchmark.transformers_engine import generate
from prunus.engines import require
from prunus.exporting.exported import find_exported
from prunus.memory import release_freed_memory
from prunus.runtime import TYPES
from prunus.runtime.linear import PackedLinear, gather, optimize_decoding
from prunus.runtime.native import kernels
from prunus.runtime.timing import in_turn, packed_as, reading

MODELS = ["dense", *(f"{p}-{t}" for t in TYPES for p in ("0", "0.5", "0.6", "0.7", "0.8", "2:4", "tiles-0.8"))]
PROBE_BYTES = 1 << 30
PRODUCTS = 9  # times that all products of a token are timed alone, in each round


def shape(layers: int, vocabulary: int) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=4,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
        architectures=["LlamaForCausalLM"],
        dtype="bfloat16",
    )


@dataclass(frozen=True, slots=True)
class Model:
    """Something that generates, and the bytes of weights that one token of it reads."""

    generate: Callable[[list[int], int], Times]
    num_bytes: int
    coverage: float
    products: Callable[[], float] | None = None  # seconds of all products of one token, alone


def pack_model(dense: Any, pattern: str, kind: str) -> Any:
    """A model of packed matrices with the dense one's embedding and norms; the head keeps all its weights."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(dense.config, dtype=torch.bfloat16)
    linears = {name: module for name, module in dense.named_modules() if isinstance(module, nn.Linear)}
    packed = cache(lambda pattern, rows, columns: packed_as(pattern, TYPES[kind], rows, columns))
    for name, linear in linears.items():
        one = packed("0" if name == "lm_head" else pattern, *linear.weight.shape)
        model.set_submodule(name, PackedLinear.holding(one))
    others = {
        name: tensor for name, tensor in dense.state_dict().items() if name.removesuffix(".weight") not in linears
    }
    model.load_state_dict(others, strict=False, assign=True)
    model.model.rotary_emb = dense.model.rotary_emb
    gather(model)
    optimize_decoding(model)
    return model.eval()


def seconds_of(modules: Sequence[PackedLinear]) -> float:
    """Seconds of the products of one token, one after another and nothing between them."""
    inputs = {one.in_features: torch.zeros(1, one.in_features, dtype=torch.bfloat16) for one in modules}
    start = time.perf_counter()
    for one in modules:
        one.multiply(inputs[one.in_features])
    return time.perf_counter() - start


def in_transformers(model: Any) -> Model:
    packed = [module for module in model.modules() if isinstance(module, PackedLinear)]
    linears = [module.weight for module in model.modules() if type(module) is nn.Linear]
    ours = sum(module.packed.num_bytes for module in packed)
    theirs = sum(weight.numel() * weight.element_size() for weight in linears)
    run = lambda prompt, new: generate(model, torch.tensor([prompt]), new)  # noqa: E731
    return Model(run, ours + theirs, ours / (ours + theirs), (lambda: seconds_of(packed)) if packed else None)


def in_llama_cpp(folder: Path, kind: str, threads: int, stack: ExitStack, context: int) -> Model:
    """The dense model in llama.cpp, exported (and proved) on first use."""
    one = find_exported(exported(folder, kind))
    assert one is not None
    worker = stack.enter_context(one.engine.started(require(one.engine)))
    runner = EngineRunner(worker, one, context, 1, threads)
    return Model(runner.generate, int(one.step["decode_bytes_per_token"]), 1.0)


def exported(folder: Path, kind: str) -> Path:
    out = folder.with_name(f"{folder.name}-{kind}")
    command = [str(part) for part in prunus("export", folder, out, "--to", f"gguf:{kind}")]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return out


@dataclass
class Measured:
    """Of one model, in every round: its times, bytes a second of the memory alone before, its products alone after."""

    times: list[Times] = field(default_factory=list)
    probe: list[float] = field(default_factory=list)
    products: list[float] = field(default_factory=list)


def measure(models: dict[str, Model], args: argparse.Namespace) -> dict[str, Measured]:
    prompt = random.Random(0).choices(range(args.vocabulary), k=args.prompt_tokens)
    measured = {name: Measured() for name in models}
    memory = {"memory": reading(PROBE_BYTES)}
    for model in models.values():
        model.generate(prompt, 4)
    for each in range(args.rounds):
        for name in list(models)[:: 1 if each % 2 else -1]:
            one, products = measured[name], models[name].products
            one.probe.append(PROBE_BYTES / in_turn(memory, 1)["memory"][0])
            one.times.append(models[name].generate(prompt, args.new_tokens))
            if products:
                one.products.append(median(products() for _ in range(PRODUCTS)))
    return measured


def row(name: str, model: Model, measured: dict[str, Measured]) -> dict[str, Any]:
    seconds = {other: [sum(t.steps) for t in one.times] for other, one in measured.items()}
    times, probe, products = measured[name].times, measured[name].probe, measured[name].products
    steps = [step for one in times for step in one.steps]
    rates = [model.num_bytes * len(t.steps) / sum(t.steps) for t in times]
    told: dict[str, Any] = {
        "model": name,
        "tokens_per_second": round(1 / median(steps), 2),
        "bytes": model.num_bytes,
        "coverage": round(model.coverage, 3),
        "share": round(median(rate / p for rate, p in zip(rates, probe, strict=True)), 3),
        "probe": round(median(probe) / 1e9, 1),
        "prefill_seconds": round(median(one.prefill for one in times), 3),
    }
    for other in measured:
        told[f"over_{other}"] = round(median(d / s for d, s in zip(seconds[other], seconds[name], strict=True)), 3)
    if products:
        outside = [median(one.steps) - alone for one, alone in zip(times, products, strict=True)]
        told["outside"] = round(median(outside), 5)
    return told


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--gguf", default="bf16,q8_0,q4_0")
    parser.add_argument("--against", default="dense,q8_0,q4_0")
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--layers", type=int, default=22)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    native = kernels()
    assert native is not None, "the kernels were not built"
    tokenizer = AutoTokenizer.from_pretrained(args.tokenizer)
    args.vocabulary = len(tokenizer)
    if not args.folder.exists():
        write_random_weights(args.folder, shape(args.layers, args.vocabulary))
        tokenizer.save_pretrained(args.folder)
    kinds = [kind for kind in args.gguf.split(",") if kind]
    for kind in kinds:
        exported(args.folder, kind)  # which takes memory too: before everything is loaded
    dense = AutoModelForCausalLM.from_pretrained(args.folder, dtype=torch.bfloat16).eval()
    about = {"level": native.level, "threads": torch.get_num_threads(), "prompt_tokens": args.prompt_tokens}
    about |= {"new_tokens": args.new_tokens, "rounds": args.rounds, "layers": args.layers}
    about |= {key: machine()[key] for key in ("cpu", "torch", "transformers", "commit")}
    with ExitStack() as stack:
        models = {}
        for name in args.models.split(","):
            pattern, _, kind = name.rpartition("-")
            models[name] = in_transformers(dense if name == "dense" else pack_model(dense, pattern, kind))
            release_freed_memory()
            print(f"{name} is loaded", file=sys.stderr, flush=True)
        context = args.prompt_tokens + args.new_tokens + 8
        for kind in kinds:
            models[kind] = in_llama_cpp(args.folder, kind, torch.get_num_threads(), stack, context)
        print(f"timing {args.rounds} rounds of {len(models)} models", file=sys.stderr, flush=True)
        measured = measure(models, args)
        for name, model in models.items():
            beside = {one: measured[one] for one in (name, *args.against.split(",")) if one in measured}
            add(args.out, row(name, model, beside) | about, show=True)


if __name__ == "__main__":
    main()
