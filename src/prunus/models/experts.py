"""Experts stored as fused 3-D tensors, run one expert at a time so that each one's inputs can be observed.

transformers 5 keeps all experts of a block in `gate_up_proj` (experts, 2 * F, H) and `down_proj` (experts, H, F) and
lets a library register its own forward for them. Ours computes what the eager one computes and, before each of the
two products, hands every expert's tokens to `module.observe_experts` when that is set.

Shapes: T = tokens, H = hidden, F = expert width, K = experts per token.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

IMPLEMENTATION = "prunus"

# (name of the fused tensor, [(inputs of expert e, their positions among the T tokens) for e in experts])
ExpertsObserver = Callable[[str, list[tuple[Tensor, Tensor]]], None]
# (expert, its outputs for the tokens routed to it, and the router's weight of each)
OutputsObserver = Callable[[int, Tensor, Tensor], None]


def fused_weights(module: nn.Module) -> list[str]:
    """Return the names of the fused tensors in execution order, or [] when the module is not a bank of experts."""
    if not hasattr(module, "is_transposed") or not hasattr(module, "has_gate"):
        return []
    return ["gate_up_proj" if module.has_gate else "up_proj", "down_proj"]


def _product(module: Any, name: str, expert: int, x_TI: Tensor) -> Tensor:
    weight = getattr(module, name)[expert]
    out_TO = x_TI @ weight if module.is_transposed else nn.functional.linear(x_TI, weight)
    return out_TO + getattr(module, f"{name}_bias")[expert] if module.has_bias else out_TO


def experts_forward(module: Any, hidden_TH: Tensor, top_k_index_TK: Tensor, top_k_weights_TK: Tensor) -> Tensor:
    """Drop-in for the eager experts forward of transformers; (T, H) -> (T, H)."""
    observe: ExpertsObserver = getattr(module, "observe_experts", lambda name, inputs: None)
    first, second = fused_weights(module)
    if hidden_TH.is_meta:  # routing depends on data, a trace has none: the order of the products is all it needs
        observe(first, [])
        observe(second, [])
        return torch.empty_like(hidden_TH)
    routes = [torch.where(top_k_index_TK == expert) for expert in range(module.num_experts)]
    inputs = [(hidden_TH[token], token) for token, _ in routes]
    observe(first, inputs)
    gate = module._apply_gate if module.has_gate else module.act_fn
    inner = [(gate(_product(module, first, e, x)), token) for e, (x, token) in enumerate(inputs)]
    observe(second, inner)
    out_TH = torch.zeros_like(hidden_TH)
    watch: OutputsObserver = getattr(module, "observe_outputs", lambda expert, outputs, weights: None)
    for expert, (x_TF, token) in enumerate(inner):
        scale_T = top_k_weights_TK[token, routes[expert][1]]
        of_expert_TH = _product(module, second, expert, x_TF)
        watch(expert, of_expert_TH, scale_T)
        out_TH.index_add_(0, token, (of_expert_TH * scale_T[:, None]).to(out_TH.dtype))
    return out_TH


ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, experts_forward)
