"""Inputs of quantized matrices rounded token by token, as an engine that multiplies in 8 bits does.

It is what compressed-tensors does when transformers runs such a model: the scale of a token is its largest value over
half the grid's range. Banks of experts are left alone there, and here. One difference: inputs without a batch dimension
(OPT flattens them) get one scale for all tokens there (compressed-tensors 0.20), and one for each here.

Shapes: T = tokens, I = in_features.
"""

from typing import Any

import torch
from torch import Tensor, nn

from prunus.quantizing.grid import Grid


def round_inputs(module: nn.Module, grid: Grid) -> None:
    """From now on the module sees its inputs as multiples, on the grid, of one scale for each token."""

    def rounded(_module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (rounded_tokens(args[0], grid), *args[1:])

    module.register_forward_pre_hook(rounded)


def rounded_tokens(x_TI: Tensor, grid: Grid) -> Tensor:
    """The inputs on the grid, in their own dtype; a token of zeros stays one."""
    scale_T1 = x_TI.abs().amax(-1, keepdim=True) / grid.half_range
    scale_T1 = scale_T1.where(scale_T1 > 0, torch.ones_like(scale_T1))
    return grid.nearest(x_TI / scale_T1) * scale_T1
