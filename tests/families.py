"""Tiny random checkpoints of every tested family, saved the way transformers saves them."""

from pathlib import Path

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PretrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from prunus.models.families import FAMILIES, Family

TINY = {family.family: family for family in FAMILIES}


def tiny_config(family: Family) -> PretrainedConfig:
    return CONFIG_MAPPING[family.family](**family.tiny_sizes)


def save_tiny(family: Family, directory: Path, dtype: torch.dtype = torch.float32, shard: str = "60KB") -> Path:
    """A random model in several shards; biases and norms are random too, so that nothing hides behind zeros."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_config(family), dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
            else:
                parameter.mul_(5)
    model.to(dtype).save_pretrained(directory, max_shard_size=shard)
    return directory


def class_name(family: str) -> str:
    name = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[family]
    return name if isinstance(name, str) else name[0]
