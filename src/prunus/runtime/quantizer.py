"""What transformers asks of a way to store weights, answered for packed models. `prunus.registration` hands it over.

transformers builds the model without memory, lets `replace_linears` put packed modules in, fills their buffers like any
tensor, and then has them prepared. Saving again writes the same buffers.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from prunus.errors import UserError
from prunus.runtime.entry import QUANT_METHOD, Entry, read_packing
from prunus.runtime.linear import PackedLinear, gather, optimize_decoding
from prunus.runtime.native import RUNS_IN


class PackedConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """`quantization_config` of a packed model, as it stands in config.json. Raises UserError when it is damaged."""

    def __init__(self, **stated: Any) -> None:
        read_packing(stated)
        self.__dict__.update(stated)
        self.quant_method = QUANT_METHOD


class PackedQuantizer(HfQuantizer):  # type: ignore[misc]
    """Opens and saves packed models."""

    requires_calibration = True  # a dense model becomes packed by `prunus export`, and not while it is loaded

    def validate_environment(self, *_args: Any, device_map: Any = None, **_options: Any) -> None:
        """Raises UserError for any other device than the CPU."""
        devices = device_map.values() if isinstance(device_map, dict) else [device_map]
        elsewhere = [str(one) for one in devices if one not in (None, "auto") and str(one).partition(":")[0] != "cpu"]
        if elsewhere:
            raise UserError(f"packed models run on the CPU, and device_map names {elsewhere[0]}; leave it out.")

    def update_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """The dtype of everything but the packed matrices."""
        if dtype not in RUNS_IN:
            raise UserError(f"packed models run in bfloat16 or float32, and {dtype} was asked for; give one of these.")
        return dtype

    def _process_model_before_weight_loading(self, model: Any, **_options: Any) -> None:
        replace_linears(model, read_packing(self.quantization_config.to_dict()))

    def _process_model_after_weight_loading(self, model: Any, **_options: Any) -> None:
        packed = {name: module for name, module in model.named_modules() if isinstance(module, PackedLinear)}
        for name, module in packed.items():
            _check_filled(name, module)
        gather(model)
        for name, module in packed.items():
            _prepare(name, module)
        optimize_decoding(model)

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False

    @property
    def is_compileable(self) -> bool:
        return True


def replace_linears(model: Any, entries: Mapping[str, Entry]) -> None:
    """Put a packed module, without memory yet, where each entry names a linear one. Raises UserError for misfits."""
    tied = set(getattr(model, "all_tied_weights_keys", ()))
    for name, entry in entries.items():
        try:
            module = model.get_submodule(name)
        except AttributeError:
            module = None
        shape = tuple(module.weight.shape) if isinstance(module, nn.Linear | Conv1D) else None
        transposed = isinstance(module, Conv1D)
        if module is None or shape != entry.shape or transposed != entry.transposed or f"{name}.weight" in tied:
            is_there = "is tied to another" if f"{name}.weight" in tied else f"has {shape or 'no such matrix'}"
            raise UserError(
                f"config.json of the packed model says that {name} is a matrix {entry.shape}, and "
                f"{type(model).__name__} {is_there}; open it with AutoModelForCausalLM, or pack the model again."
            )
        model.set_submodule(name, PackedLinear(entry))


def _check_filled(name: str, module: PackedLinear) -> None:
    """Raises UserError where a tensor was not in the files: transformers fills it with anything."""
    for part, buffer in module.named_buffers():
        if not getattr(buffer, "_is_hf_initialized", False):  # what transformers has read from a file, it marks
            raise UserError(
                f"tensor {name}.{part} of the packed model is missing; restore it, or pack the model again."
            )


def _prepare(name: str, module: PackedLinear) -> None:
    """Raises UserError where a matrix is damaged."""
    try:
        module.prepare()
    except UserError as error:
        raise UserError(f"{name}: {error}") from error


register_quantization_config(QUANT_METHOD)(PackedConfig)
register_quantizer(QUANT_METHOD)(PackedQuantizer)
