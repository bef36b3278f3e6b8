"""Is the speed of smaller shapes real? Decode in transformers or another engine, shrunk and dense in turn.

A decoded token reads every weight once, so a model that reads half the bytes can be at most twice as fast. For each
shrunk directory, one line of JSON:

    bytes_ratio   dense / shrunk, weight bytes that one decoded token reads, without the KV cache
    speedup       dense / shrunk decode time, the median of the pairs, and low and high of its 95% interval
                  (`prunus bench SHRUNK --against DENSE`, which interleaves the two)
    kept          speedup / bytes_ratio: what of the bytes saved arrives as speed. The aim is at least 0.85
    file_ratio    shrunk / dense, bytes on disk

With --to, all of them are exported first (`prunus export`, beside each directory) and run in that engine.

The machine must be quiet. `--make` writes a Llama-shaped model of random bf16 weights to FOLDER/dense (1.1 billion
parameters) and what it becomes when 20, 35 and 50% of the parameters outside the embedding are removed, by width (KV
groups, and the FFN in multiples of 64) and by depth; and, for small machines, what recipes/edge.yaml leaves of SmolLM2
(edge): two thirds of the layers, narrower by 21% of their parameters: 13 GB in all, 2.2 GB for the dense one. Of two
shapes: hidden 1920, 24 layers, 30 heads on 10, tied embeddings, whose KV groups can be cut finely; or that of
decode.py, hidden 2048, 22 layers, 32 heads on 4, not tied (--shape decode). Speed does not depend on the values of
dense weights, so these random siblings are as fast as shrunk models of the same shapes.

usage: shrink_speed.py DENSE SHRUNK ... [--prompt-tokens 128] [--new-tokens 64] [--repetitions 9] [--threads N]
                       [--to gguf:q4_0]
       shrink_speed.py --make FOLDER --tokenizer DIR [--shape decode] [--only width-20,depth-50] [the same]
"""

import argparse
import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from decode import shape as decode_shape
from memory import write_random_weights
from peers import prunus, result_of
from transformers import AutoTokenizer, LlamaConfig

PERCENT_REMOVED = (20, 35, 50)
MULTIPLE = 64
CONDITIONS = ("engine", "dtype", "threads", "prompt_tokens", "new_tokens", "repetitions")


def many_groups(vocabulary: int) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=1920,
        intermediate_size=5632,
        num_hidden_layers=24,
        num_attention_heads=30,
        num_key_value_heads=10,
        head_dim=64,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        architectures=["LlamaForCausalLM"],
        dtype="bfloat16",
    )


SHAPES: dict[str, Callable[[int], LlamaConfig]] = {"groups": many_groups, "decode": partial(decode_shape, 22)}


def narrower(dense: LlamaConfig, removed: float) -> LlamaConfig:
    """KV groups in proportion, as near as can be; the FFN takes what is left of the parameters, in multiples of 64."""
    changed = fewer_groups(dense, removed)
    spared = block_parameters(changed) - block_parameters(dense) * (1 - removed)
    inner = dense.intermediate_size - spared / (3 * dense.hidden_size)
    return changed_config(changed, intermediate_size=MULTIPLE * round(inner / MULTIPLE))


def fewer_groups(dense: LlamaConfig, removed: float) -> LlamaConfig:
    """Of the numbers that LlamaConfig takes, whose heads divide the hidden width, the nearest."""
    per_group, width = dense.num_attention_heads // dense.num_key_value_heads, dense.hidden_size
    possible = [n for n in range(1, dense.num_key_value_heads + 1) if width % (n * per_group) == 0]
    groups = min(possible, key=lambda n: abs(n - dense.num_key_value_heads * (1 - removed)))
    return changed_config(dense, num_key_value_heads=groups, num_attention_heads=groups * per_group)


def shallower(dense: LlamaConfig, removed: float) -> LlamaConfig:
    return changed_config(dense, num_hidden_layers=round(dense.num_hidden_layers * (1 - removed)))


def edge(dense: LlamaConfig, removed: float) -> LlamaConfig:
    """The fewer layers, and a fifth of the parameters of those that stay, by width."""
    return narrower(shallower(dense, removed), 0.21)


SIBLINGS: dict[str, tuple[Callable[[LlamaConfig, float], LlamaConfig], float]] = {
    f"{name}-{percent}": (make, percent / 100)
    for name, make in (("width", narrower), ("depth", shallower))
    for percent in PERCENT_REMOVED
} | {"edge": (edge, 1 / 3)}


def changed_config(config: LlamaConfig, **changes: int) -> LlamaConfig:
    return LlamaConfig(**config.to_dict() | changes)


def block_parameters(config: LlamaConfig) -> int:
    """Parameters of one decoder block, its two norms left out."""
    attention = 2 * (config.num_attention_heads + config.num_key_value_heads) * config.head_dim
    return int(config.hidden_size * (attention + 3 * config.intermediate_size))


def make_models(folder: Path, shape: str, tokenizer: Path, only: list[str]) -> list[Path]:
    """The directories of the dense model and, after it, its siblings; what is not there yet is made."""
    dense = SHAPES[shape](len(AutoTokenizer.from_pretrained(tokenizer)))
    configs = {"dense": dense} | {
        name: make(dense, removed) for name, (make, removed) in SIBLINGS.items() if name in only
    }
    for name, config in configs.items():
        if not (folder / name).exists():
            shutil.rmtree(folder / "unfinished", ignore_errors=True)
            write_random_weights(folder / "unfinished", config)
            shutil.copytree(tokenizer, folder / "unfinished", ignore=not_tokenizer, dirs_exist_ok=True)
            (folder / "unfinished").rename(folder / name)
    return [folder / name for name in configs]


def not_tokenizer(_folder: str, names: list[str]) -> list[str]:
    return [name for name in names if not name.startswith(("tokenizer", "special_tokens", "chat_template"))]


def exported(directory: Path, to: str | None) -> Path:
    """The directory itself, or beside it what an engine loads."""
    out = directory.with_name(f"{directory.name}-{to.replace(':', '-')}") if to else directory
    if to:
        result_of(prunus("export", directory, out, "--to", to))
    return out


def compare(dense: Path, shrunk: Path, options: list[object]) -> dict[str, Any]:
    """The row of one shrunk directory."""
    measured = result_of(prunus("bench", shrunk, "--against", dense, *options))
    before, after, speedup = measured["dense"], measured["model"], measured["speedup"]["decode"]
    bytes_ratio = before["decode_bytes_per_token"] / after["decode_bytes_per_token"]
    return {
        "shrunk": shrunk.name,
        "parameters": after["parameters"],
        "dense_parameters": before["parameters"],
        "file_ratio": round(after["bytes_on_disk"] / before["bytes_on_disk"], 4),
        "tokens_per_second": [round(side["decode_tokens_per_second"], 2) for side in (before, after)],
        "bytes_ratio": round(bytes_ratio, 4),
        "speedup": {name: speedup[name] for name in ("median", "low", "high", "claim")},
        "kept": round(speedup["median"] / bytes_ratio, 4),
        "prefill_speedup": measured["speedup"]["prefill"]["median"],
        **{
            name: measured[name]
            for name in ("engine", "dtype", "threads", "prompt_tokens", "new_tokens", "repetitions")
        },
        "environment": measured["environment"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directories", type=Path, nargs="*", metavar="DENSE SHRUNK")
    parser.add_argument("--make", type=Path, metavar="FOLDER")
    parser.add_argument("--tokenizer", type=Path, metavar="DIR")
    parser.add_argument("--shape", choices=list(SHAPES), default="groups")
    parser.add_argument("--only", default=",".join(SIBLINGS))
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--repetitions", type=int, default=9)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--to", help="as `prunus export` takes it")
    args = parser.parse_args()
    if bool(args.make) == bool(args.directories) or bool(args.make) != bool(args.tokenizer):
        parser.error("give either DENSE and what was shrunk from it, or --make with --tokenizer")
    only = args.only.split(",")
    if unknown := set(only) - set(SIBLINGS):
        parser.error(f"--only knows {', '.join(SIBLINGS)}, not {', '.join(sorted(unknown))}")
    directories = make_models(args.make, args.shape, args.tokenizer, only) if args.make else args.directories
    options: list[object] = ["--prompt-tokens", args.prompt_tokens, "--new-tokens", args.new_tokens]
    options += ["--repetitions", args.repetitions, *(["--threads", args.threads] if args.threads else [])]
    dense, *shrunk = (exported(directory, args.to) for directory in directories)
    for directory in shrunk:
        print(json.dumps(compare(dense, directory, options)), flush=True)


if __name__ == "__main__":
    main()
