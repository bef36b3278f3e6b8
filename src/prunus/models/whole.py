"""A model loaded whole, from any directory that prunus opens: by transformers or, where its layers differ, by this."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, GenerationConfig
from transformers.utils import GENERATION_CONFIG_NAME
from transformers.utils.import_utils import is_compressed_tensors_available

from prunus.checkpoint import Checkpoint, open_checkpoint
from prunus.checkpoint.per_layer import layer_fields
from prunus.errors import UserError
from prunus.machine_choice import DTYPES, choose_device
from prunus.models.skeleton import build_on_meta, check_config, restore_buffers
from prunus.models.tensor_names import TensorNames
from prunus.progress import quiet_libraries

CHECKPOINTS_OWN = "auto"


def load(
    model: str | Path, *, dtype: str = CHECKPOINTS_OWN, device: str = "auto", trust_remote_code: bool = False
) -> Any:
    """Open any model directory or hub name as a plain module that generates; alone to open one of per-layer widths.

    `dtype` is auto (the checkpoint's own), float32 or bfloat16. An ordinary directory gives what
    AutoModelForCausalLM.from_pretrained gives. Raises UserError for what is not a readable model.
    """
    if dtype not in (CHECKPOINTS_OWN, *DTYPES):
        raise UserError(f"dtype={dtype!r} is not known; allowed are {CHECKPOINTS_OWN}, {', '.join(DTYPES)}.")
    checkpoint = open_checkpoint(model, trust_remote_code=trust_remote_code)
    check_config(checkpoint.config, trust_remote_code=trust_remote_code)
    return load_whole(checkpoint, DTYPES.get(dtype), choose_device(device))


def load_whole(checkpoint: Checkpoint, dtype: torch.dtype | None, device: str | torch.device) -> Any:
    """The model with its weights, in evaluation mode; never from the network, never pickle. `dtype` None: its own.

    Raises UserError for a quantized one where transformers lacks the package that reads it.
    """
    if checkpoint.scheme is not None and not is_compressed_tensors_available():
        raise UserError(
            f"{checkpoint.path} is quantized ({checkpoint.scheme.name}), and transformers loads that with "
            "compressed-tensors; install it with `pip install 'prunus[quantize]'`."
        )
    if checkpoint.packed:  # refused in a sentence here, and by transformers in a table
        TensorNames(build_on_meta(checkpoint.config, dtype=torch.float32), checkpoint.tensors)
    if layer_fields(checkpoint.config) is not None:
        return _assembled(checkpoint, dtype).to(device).eval()
    with quiet_libraries():
        model = AutoModelForCausalLM.from_pretrained(
            checkpoint.path,
            dtype=dtype or CHECKPOINTS_OWN,
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=checkpoint.trust_remote_code,
        )
    return model.to(device).eval()


def _assembled(checkpoint: Checkpoint, dtype: torch.dtype | None) -> Any:
    """The module tree with its own blocks, filled tensor by tensor. Raises UserError for a tensor of another shape."""
    dtype = dtype or getattr(checkpoint.config, "dtype", None) or next(iter(checkpoint.tensors.values())).dtype
    model = build_on_meta(checkpoint.config, dtype=dtype)
    restore_buffers(model)
    names = TensorNames(model, checkpoint.tensors)
    state = {
        name: tensor.to(dtype) if tensor.is_floating_point() else tensor
        for name, tensor in names.load(model.state_dict(), checkpoint.read).items()
    }
    model.load_state_dict(state, strict=False, assign=True)  # what is missing is tied: TensorNames has looked
    model.tie_weights()
    if (checkpoint.path / GENERATION_CONFIG_NAME).is_file():
        model.generation_config = GenerationConfig.from_pretrained(checkpoint.path)
    model.save_pretrained = _not_saved
    return model


def _not_saved(*_args: Any, **_options: Any) -> None:
    """What transformers would write, it would read back with random weights where a layer lacks something."""
    raise UserError(
        "transformers cannot write a model whose layers differ; keep the directory it came from, or its state_dict."
    )
