"""Run by peers.py inside the peer's own environment: llm-compressor on given tokens, saved as a plain directory.

usage: peer_llmcompressor.py MODEL TOKENS.safetensors METHOD PATTERN OUT
"""

import sys

import torch
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.pruning import SparseGPTModifier, WandaPruningModifier
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

MODIFIERS = {"wanda": WandaPruningModifier, "sparsegpt": SparseGPTModifier}
PROJECTIONS = "re:.*layers.*_proj$"  # with targets=["Linear"], ignore=["lm_head"] does not keep it off a tied head
STRUCTURES = {"0.5": "0:0", "2:4": "2:4"}


def main(model_path: str, tokens_path: str, method: str, pattern: str, out: str) -> None:
    tokens_NT = load_file(tokens_path)["tokens_NT"]
    rows = {"input_ids": tokens_NT.tolist(), "attention_mask": torch.ones_like(tokens_NT).tolist()}
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    recipe = MODIFIERS[method](sparsity=0.5, mask_structure=STRUCTURES[pattern], targets=[PROJECTIONS])
    oneshot(
        model=model,
        tokenizer=tokenizer,
        dataset=Dataset.from_dict(rows),
        recipe=recipe,
        num_calibration_samples=len(tokens_NT),
        max_seq_length=tokens_NT.shape[1],
        shuffle_calibration_samples=False,
        pipeline="sequential",
    )
    model.save_pretrained(out, save_compressed=False)
    tokenizer.save_pretrained(out)


if __name__ == "__main__":
    main(*sys.argv[1:])
