"""What stands in for a block while it decodes: its tensors as the kernels are told of them, and the three calls.

Letters: B = batch, D = hidden width, H = heads, G = groups of heads that share keys and values, W = width of a head.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from prunus.runtime.attention import NAME, attention
from prunus.runtime.block_parts import Parts, are_watched, epsilon_of, weight_of
from prunus.runtime.native import TYPES, Completion, Kernels, Norm, Projection, kernels


class Plan:
    """`plan(hidden_BTD, cos, sin, cache, mask)` is what the block returns for one new token of each text."""

    def __init__(self, block: nn.Module, parts: Parts, dtype: torch.dtype) -> None:
        self.parts, self.dtype = parts, dtype
        self._links = [(owner._modules, name, one) for owner in block.modules() for name, one in _children(owner)]
        self._multipliers = [one.multiplier for one in parts.linears]
        self._norms = [weight_of(one).detach() for one in parts.norms]  # keeps their memory
        self._biases = [None if one.bias is None else one.bias.to(dtype) for one in parts.linears]
        self._projection, self._completion = self._told_projection(), self._told_completion()

    def __call__(self, hidden_BTD: Tensor, cos: Tensor, sin: Tensor, cache: Any, mask: Tensor | None) -> Tensor:
        hidden_BTD = hidden_BTD.contiguous()
        query, key, value = self._project(hidden_BTD, cos, sin)
        key, value = cache.update(key, value, self.parts.layer)
        attended_BTHW, _ = attention(self.parts.attention, query, key, value, mask, scaling=self.parts.scaling)
        return self._complete(hidden_BTD, attended_BTHW.contiguous())

    def holds(self) -> bool:
        """Whether the block's modules and tensors are those it was made of."""
        for modules, name, one in self._links:
            if modules.get(name) is not one:
                return False
        for linear, multiplier in zip(self.parts.linears, self._multipliers, strict=True):
            if linear.multiplier is not multiplier:  # made anew when any of its tensors is another
                return False
        for norm, weight in zip(self.parts.norms, self._norms, strict=True):
            if weight_of(norm).data_ptr() != weight.data_ptr():
                return False
        return True

    def takes(self, hidden_BTD: Tensor, cos: Tensor, sin: Tensor) -> bool:
        """Whether the tensors lie as the kernels read them, and nobody looks inside the block."""
        if are_watched(one for _, _, one in self._links):
            return False
        if not cos.dtype == sin.dtype == hidden_BTD.dtype == self.dtype or cos.stride() != sin.stride():
            return False
        texts, *rest = cos.shape
        if cos.shape != sin.shape or cos.stride(-1) != 1 or rest != [1, self.parts.head_width]:
            return False
        config: Any = self.parts.attention.config
        return texts in (1, len(hidden_BTD)) and config._attn_implementation == NAME

    def _project(self, hidden_BTD: Tensor, cos: Tensor, sin: Tensor) -> list[Tensor]:
        """Queries (B, H, 1, W), keys and values (B, G, 1, W)."""
        width, batch = self.parts.head_width, len(hidden_BTD)
        out = [hidden_BTD.new_empty(batch, one.out_features // width, 1, width) for one in self.parts.linears[:3]]
        told = Projection.from_buffer_copy(self._projection)
        told.batch, told.hidden = batch, hidden_BTD.data_ptr()
        told.cos, told.sin = cos.data_ptr(), sin.data_ptr()
        told.angles = cos.stride(0) if len(cos) > 1 else 0
        told.out[:] = [one.data_ptr() for one in out]
        _native().project(told)
        return out

    def _complete(self, hidden_BTD: Tensor, attended_BTHW: Tensor) -> Tensor:
        out_BTD = torch.empty_like(hidden_BTD)
        told = Completion.from_buffer_copy(self._completion)
        told.batch, told.hidden, told.attended = len(hidden_BTD), hidden_BTD.data_ptr(), attended_BTHW.data_ptr()
        told.out = out_BTD.data_ptr()
        _native().complete(told)
        return out_BTD

    def _told_projection(self) -> Projection:
        parts, linears = self.parts, self.parts.linears[:3]
        told = Projection(type=TYPES[self.dtype], width=linears[0].in_features, head_width=parts.head_width)
        told.norm, told.matrices[:] = _norm(parts.norms[0]), [one.matrix for one in self._multipliers[:3]]
        if of_heads := parts.norms[1:-1]:
            told.query_norm, told.key_norm = map(_norm, of_heads)
        told.bias[:] = _addresses(self._biases[:3])
        return told

    def _told_completion(self) -> Completion:
        told = Completion(type=TYPES[self.dtype], width=self.parts.linears[3].out_features)
        told.norm, told.matrices[:] = _norm(self.parts.norms[-1]), [one.matrix for one in self._multipliers[3:]]
        told.bias[:] = _addresses(self._biases[3:])
        return told


def _children(owner: nn.Module) -> Iterable[tuple[str, nn.Module]]:
    return [(name, one) for name, one in owner._modules.items() if one is not None]


def _native() -> Kernels:
    native = kernels()
    assert native is not None  # or nothing would stand in for a block
    return native


def _norm(module: nn.Module) -> Norm:
    return Norm(weight_of(module).data_ptr(), epsilon_of(module))


def _addresses(tensors: Iterable[Tensor | None]) -> list[int | None]:
    return [None if one is None else one.data_ptr() for one in tensors]
