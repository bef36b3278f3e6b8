"""Peak memory on a checkpoint of 2.9 billion parameters that is never loaded whole.

Makes a Llama-shaped bf16 checkpoint of random weights (hidden 3072, FFN 8192, 28 layers, 24 heads on 8, vocabulary 32k:
5.8 GB in several shards) and sparsifies it 2:4. The peak is that of the whole process, torch included.

usage: memory.py FOLDER [--methods wanda,admm] [--samples 16] [--length 512]
"""

import argparse
import json
import random
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, PreTrainedTokenizerFast

CONFIG = LlamaConfig(
    vocab_size=32_000,
    hidden_size=3072,
    intermediate_size=8192,
    num_hidden_layers=28,
    num_attention_heads=24,
    num_key_value_heads=8,
    max_position_embeddings=4096,
    tie_word_embeddings=False,
    architectures=["LlamaForCausalLM"],
    dtype="bfloat16",
)
BLOCKS_PER_SHARD = 4


def make_checkpoint(folder: Path) -> None:
    """Write the checkpoint and a tokenizer of made-up words."""
    write_random_weights(folder, CONFIG)
    words = {f"w{i}": i for i in range(CONFIG.vocab_size)}
    tokenizer = Tokenizer(models.WordLevel(vocab=words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w0").save_pretrained(folder)


def write_random_weights(folder: Path, config: LlamaConfig) -> None:
    """Write config and weights shard by shard; one shard is in memory at a time."""
    folder.mkdir(parents=True)
    torch.manual_seed(0)
    weight_map: dict[str, str] = {}
    for number, names in enumerate(_shards(config)):
        file = f"model-{number + 1:05d}.safetensors"
        save_file({name: _random(shape) for name, shape in names.items()}, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    config.save_pretrained(folder)


def _shards(config: LlamaConfig) -> list[dict[str, tuple[int, ...]]]:
    hidden, inner, vocabulary = config.hidden_size, config.intermediate_size, config.vocab_size
    wide, narrow = (n * config.head_dim for n in (config.num_attention_heads, config.num_key_value_heads))
    block: dict[str, tuple[int, ...]] = {
        "self_attn.q_proj.weight": (wide, hidden),
        "self_attn.k_proj.weight": (narrow, hidden),
        "self_attn.v_proj.weight": (narrow, hidden),
        "self_attn.o_proj.weight": (hidden, wide),
        "mlp.gate_proj.weight": (inner, hidden),
        "mlp.up_proj.weight": (inner, hidden),
        "mlp.down_proj.weight": (hidden, inner),
        "input_layernorm.weight": (hidden,),
        "post_attention_layernorm.weight": (hidden,),
    }
    ends: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (vocabulary, hidden),
        "model.norm.weight": (hidden,),
    }
    if not config.tie_word_embeddings:
        ends["lm_head.weight"] = (vocabulary, hidden)
    layers = range(config.num_hidden_layers)
    groups = [layers[start : start + BLOCKS_PER_SHARD] for start in range(0, len(layers), BLOCKS_PER_SHARD)]
    return [ends, *({f"model.layers.{i}.{n}": s for i in group for n, s in block.items()} for group in groups)]


def _random(shape: tuple[int, ...]) -> torch.Tensor:
    return torch.ones(shape, dtype=torch.bfloat16) if len(shape) == 1 else torch.randn(shape).mul_(0.02).bfloat16()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--methods", default="wanda,admm")
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--length", type=int, default=512)
    args = parser.parse_args()
    model, text = args.folder / "model", args.folder / "text.txt"
    if not model.exists():
        make_checkpoint(model)
        numbers = random.Random(0)
        text.write_text(" ".join(f"w{numbers.randrange(32_000)}" for _ in range(2 * args.samples * args.length)))
    for method in args.methods.split(","):
        settings = ["--pattern", "2:4", "--calibration", text, "--samples", args.samples, "--length", args.length]
        command = ["-m", "prunus.cli", "sparsify", model, args.folder / method, "--method", method, *settings]
        done = subprocess.run([sys.executable, *map(str, command)], check=True, stdout=subprocess.PIPE, text=True)
        print(done.stdout.splitlines()[-1], flush=True)


if __name__ == "__main__":
    main()
