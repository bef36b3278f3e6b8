"""The format compressed-tensors, as transformers and vLLM read it: names of tensors, and what config.json says.

A quantized matrix `X.weight` is stored as codes, as `X.weight_scale` and, where several codes share a word, as
`X.weight_packed` with `X.weight_shape`. Only what the schemes of `prunus.quantizing` need is read and written.

Shapes: O = out_features, I = in_features, G = scales in a row.
"""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from prunus.errors import UserError
from prunus.quantizing import SCHEMES, Scheme, pack, unpack

QUANT_METHOD = "compressed-tensors"
WEIGHT = ".weight"
PACKED, SCALE, SHAPE = ".weight_packed", ".weight_scale", ".weight_shape"

Read = Callable[[str], Tensor]


def quantization_config(scheme: Scheme, ignore: Iterable[str]) -> dict[str, Any]:
    """What config.json has to say of a model of this scheme; `ignore` are the modules that are left dense."""
    group = {
        "targets": ["Linear"],
        "weights": _weights(scheme),
        "input_activations": _inputs(scheme),
        "output_activations": None,
    }
    return {
        "quant_method": QUANT_METHOD,
        "format": scheme.storage,
        "quantization_status": "compressed",
        "global_compression_ratio": None,
        "kv_cache_scheme": None,
        "config_groups": {"group_0": group},
        "ignore": list(ignore),
    }


def _weights(scheme: Scheme) -> dict[str, Any]:
    return {
        "num_bits": scheme.bits,
        "type": "int" if scheme.grid.dtype == torch.int8 else "float",
        "symmetric": True,
        "strategy": "channel" if scheme.group is None else "group",
        "group_size": scheme.group,
        "dynamic": False,
    }


def _inputs(scheme: Scheme) -> dict[str, Any] | None:
    if not scheme.rounds_inputs:
        return None
    return {**_weights(scheme), "strategy": "token", "dynamic": True}


def scheme_of(config: Any, path: Path) -> Scheme:
    """The scheme that a `quantization_config` describes. Raises UserError for every other way of quantizing."""
    for scheme in SCHEMES.values():
        if isinstance(config, dict) and _says(config, quantization_config(scheme, ())):
            return scheme
    kind = config.get("quant_method") if isinstance(config, dict) else config
    raise UserError(
        f"{path} is already quantized ({kind}), in a way that prunus neither reads nor prunes; take the original "
        "full-precision weights, prune them, and quantize afterwards."
    )


def _says(config: dict[str, Any], ours: dict[str, Any]) -> bool:
    """Whether a config means the same weights and inputs; what it leaves out is None."""
    groups = config.get("config_groups")
    if config.get("quant_method") != QUANT_METHOD or config.get("format") != ours["format"]:
        return False
    if not isinstance(groups, dict) or len(groups) != 1 or config.get("quantization_status") != "compressed":
        return False
    found, wanted = next(iter(groups.values())), ours["config_groups"]["group_0"]
    return isinstance(found, dict) and all(
        _is_same(found.get(part), wanted[part]) for part in ("weights", "input_activations", "output_activations")
    )


def _is_same(found: Any, wanted: dict[str, Any] | None) -> bool:
    if wanted is None or not isinstance(found, dict):
        return found is wanted
    return all(found.get(name) == value for name, value in wanted.items())


def encoded(name: str, values_OI: Tensor, scale_OG: Tensor, scheme: Scheme) -> dict[str, Tensor]:
    """The tensors to write for the matrix `name` ("X.weight"), which is on the scheme's grid."""
    base, codes_OI = name.removesuffix(WEIGHT), scheme.codes(values_OI, scale_OG)
    if not scheme.packs:
        return {name: codes_OI, base + SCALE: scale_OG}
    shape = torch.tensor(values_OI.shape, dtype=torch.int64)
    return {base + PACKED: pack(codes_OI, scheme.bits), base + SCALE: scale_OG, base + SHAPE: shape}


def quantized_names(names: Iterable[str]) -> list[str]:
    """The matrices ("X.weight") that have a scale among these tensors."""
    return [name.removesuffix(SCALE) + WEIGHT for name in names if name.endswith(SCALE)]


def parts_of(name: str, scheme: Scheme) -> list[str]:
    """The tensors that one matrix is stored in."""
    base = name.removesuffix(WEIGHT)
    return [base + PACKED, base + SCALE, base + SHAPE] if scheme.packs else [name, base + SCALE]


def shape_of(name: str, scheme: Scheme, shapes: dict[str, tuple[int, ...]], read: Read) -> tuple[int, ...]:
    """The shape of the matrix behind `name`; packed words tell the number of columns no closer than a word."""
    if not scheme.packs:
        return shapes[name]
    return tuple(int(size) for size in read(name.removesuffix(WEIGHT) + SHAPE))


def decoded(name: str, shape: tuple[int, ...], scheme: Scheme, read: Read) -> Tensor:
    """The matrix behind `name`, in fp32: whoever runs it in another dtype rounds it to that, as transformers does."""
    base = name.removesuffix(WEIGHT)
    codes_OI = unpack(read(base + PACKED), scheme.bits, shape[1]) if scheme.packs else read(name)
    return scheme.dequantized(codes_OI, read(base + SCALE))
