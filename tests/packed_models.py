"""Packed models for tests: written as `prunus export --to sparse` writes them, without its proof."""

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from families import TINY, save_tiny
from prunus.checkpoint import open_checkpoint
from prunus.exporting import Conversion, parse_target


def write_packed(model: Path, folder: Path, to: str = "sparse") -> Path:
    """A model directory, packed."""
    target = parse_target(to)
    folder.mkdir()
    job = Conversion(
        checkpoint=open_checkpoint(model), kind=target.kind, installed=None, folder=folder, stem="out", timeout=1.0
    )
    return target.format.write(job)


def save_sparse(family: str, folder: Path, sparsity: float = 0.6) -> Path:
    """A tiny random model of a family, in one file, with that share of zeros in every matrix of its blocks."""
    save_tiny(TINY[family], folder, shard="1GB")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2 and any(part.isdigit() for part in name.split(".")):
                parameter.mul_(torch.rand_like(parameter) > sparsity)
    model.save_pretrained(folder)
    return folder
