"""Attention of one new token, which torch takes several times as long for on a CPU (docs/log.md).

A packed model attends by a kernel of ours when it decodes, one query over keys and values that are read once for all
heads of a group, and by torch otherwise. transformers has a hook for that; a model that was asked for another one,
or whose class knows no hook, keeps its own.

Letters: B = batch, H = heads, G = groups of heads that share keys and values, T = positions, W = width of a head.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from prunus.runtime.native import RUNS_IN, kernels

NAME, REPLACES = "prunus", "sdpa"
WIDEST = 256  # kMaxWidth of native/attention.h
OTHERS = ("position_bias", "cache", "softcap")  # what sdpa reads or refuses beside the tensors


def attend_natively(model: Any) -> None:
    """For a whole model; one that cannot stays as it is."""
    if getattr(model, "_supports_attention_backend", False) and model.config._attn_implementation == REPLACES:
        model.set_attn_implementation(NAME)


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **others: Any,
) -> tuple[Tensor, Tensor | None]:
    """transformers' attention of query (B, H, Q, W), key and value (B, G, T, W): (B, Q, H, W), and no weights."""
    more = others.get("output_attentions") or any(others.get(name) is not None for name in OTHERS)
    if dropout or more or not _is_decoding(query, key, value, attention_mask):
        told: tuple[Tensor, Tensor | None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **others
        )
        return told
    native = kernels()
    assert native is not None
    mask_BT = None if attention_mask is None else attention_mask[:, 0, 0].expand(len(query), -1)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return native.attend(query[:, :, 0], key, value, mask_BT, scale).unsqueeze(1), None


def _is_decoding(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> bool:
    """Whether the kernel takes it: one new token, nothing to differentiate or to compile, tensors as it reads them.

    It looks at no shape again: what does not fit is torch's to refuse.
    """
    tensors = (query, key, value)
    if torch.compiler.is_compiling() or query.shape[2] != 1 or any(one.requires_grad for one in tensors):
        return False
    if any(one.device.type != "cpu" or one.dtype != query.dtype or one.stride(-1) != 1 for one in tensors):
        return False
    if query.dtype not in RUNS_IN or key.shape != value.shape or key.shape[-1] > WIDEST:
        return False
    batch, groups, positions, width = key.shape
    if (query.shape[0], query.shape[-1]) != (batch, width) or query.shape[1] % groups:
        return False
    if mask is not None and (
        mask.dtype != torch.bool
        or mask.stride(-1) != 1
        or mask.shape not in ((1, 1, 1, positions), (batch, 1, 1, positions))
    ):
        return False
    return kernels() is not None


AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, sdpa_mask)
