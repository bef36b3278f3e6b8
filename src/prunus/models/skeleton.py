"""A transformers model with its architecture and no weights: parameters on the meta device, buffers real."""

import copy
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from prunus.errors import UserError
from prunus.models.experts import IMPLEMENTATION
from prunus.models.per_layer import give_own_blocks


def check_config(config: PretrainedConfig, *, trust_remote_code: bool = False) -> None:
    """Refuse what is not a plain causal language model, before anything is built. Raises UserError."""
    family = config.model_type
    architecture = (config.architectures or ["(none stated)"])[0]
    if getattr(config, "is_encoder_decoder", False):
        raise UserError(f"{architecture} is an encoder-decoder model; prunus takes decoder-only language models.")
    remote = trust_remote_code and getattr(config, "auto_map", None)
    if not remote and family not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise UserError(f"architecture {family!r} has no causal language model in transformers; see `prunus models`.")
    if not remote and architecture not in _causal_classes():
        raise UserError(
            f"{architecture} is not a causal language model of transformers; give a checkpoint of "
            f"{_expected_class(family)} instead."
        )


def _causal_classes() -> set[str]:
    names = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
    return {name for entry in names for name in ((entry,) if isinstance(entry, str) else entry)}


def _expected_class(family: str) -> str:
    expected = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[family]
    return expected if isinstance(expected, str) else expected[0]


def build_skeleton(config: PretrainedConfig, *, trust_remote_code: bool = False) -> Any:
    """Build the model on the meta device, in evaluation mode, its experts observable. Takes no memory."""
    check_config(config, trust_remote_code=trust_remote_code)
    model = build_on_meta(config, dtype=torch.float32, trust_remote_code=trust_remote_code)
    for module in model.modules():
        if hasattr(module, "config"):
            module.config._experts_implementation = IMPLEMENTATION
    return model


def build_on_meta(config: PretrainedConfig, *, dtype: torch.dtype, trust_remote_code: bool = False) -> Any:
    """The model as transformers builds it, layers of other widths included, without memory, in evaluation mode."""

    def build(wanted: PretrainedConfig) -> Any:
        own = copy.deepcopy(wanted)  # transformers notes things in it: the caller's stays as it was
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(own, dtype=dtype, trust_remote_code=trust_remote_code).eval()

    model = build(config)
    give_own_blocks(model, config, build)
    return model


def restore_buffers(model: Any, device: torch.device | str = "cpu") -> None:
    """Give the buffers that no checkpoint holds (rotary frequencies, embedding scales) their values again.

    A model's own `_init_weights` computes them, as it does when transformers loads a checkpoint.
    """
    owners: dict[str, nn.Module] = {}  # by name, so that each is asked once
    for name, buffer in model.named_non_persistent_buffers():
        owner, _, leaf = name.rpartition(".")
        owners[owner] = model.get_submodule(owner)
        owners[owner]._buffers[leaf] = torch.empty_like(buffer, device=device)
    with torch.no_grad():
        for name, module in owners.items():
            _innermost_model(model, name)._init_weights(module)


def _innermost_model(model: Any, name: str) -> Any:
    """The model within the model that a module belongs to: the one that transformers asks too."""
    parts = name.split(".")
    above = (model.get_submodule(".".join(parts[:depth])) for depth in range(len(parts) + 1))
    return [module for module in above if isinstance(module, PreTrainedModel)][-1]
