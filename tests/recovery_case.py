"""A tiny dense model, its sparse child and a text to train on, for the tests of `prunus recover`."""

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import prunus
from families import save_tiny
from prunus.models.families import Family

WORDS = 128
# 20 steps of 4 sequences of 32 tokens
SETTINGS: dict[str, Any] = {
    "tokens": 20 * 4 * 32,
    "length": 32,
    "batch_tokens": 4 * 32,
    "held_out": 4,
    "evaluate_every": 5,
    "lr": 1e-3,
    "dtype": "float32",
    "device": "cpu",
}


@dataclass(frozen=True, slots=True)
class Case:
    dense: Path
    sparse: Path
    text: Path

    def recover(self, out: Path, **settings: Any) -> prunus.Run:
        return prunus.recover(self.sparse, out, **{**SETTINGS, "data": (str(self.text),), **settings})


def add_tokenizer(directory: Path, words: int = WORDS) -> Path:
    """One token for each word w0 .. wN."""
    tokenizer = Tokenizer(models.WordLevel(vocab={f"w{i}": i for i in range(words)}, unk_token="w3"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w3", bos_token="w1").save_pretrained(directory)
    return directory


def make_case(family: Family, root: Path, *, pattern: str = "0.5", dtype: torch.dtype = torch.float32) -> Case:
    dense = add_tokenizer(save_tiny(family, root / "dense", dtype))
    sparse = prunus.sparsify(dense, root / "sparse", method="magnitude", pattern=pattern, device="cpu").path
    numbers, text = random.Random(0), root / "words.txt"
    text.write_text(" ".join(f"w{numbers.randrange(WORDS)}" for _ in range(4000)))
    return Case(dense, sparse, text)


def weights(directory: Path) -> dict[str, torch.Tensor]:
    """All tensors of a model directory."""
    return {name: t for file in directory.glob("*.safetensors") for name, t in load_file(file).items()}
