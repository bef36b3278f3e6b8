"""The loss's derivative by a factor of 1 on every unit: what first-order scores look at.

The whole model is loaded in the forward dtype, and one sequence at a time goes forward and back; no weight gets a
gradient, so memory is the weights, the activations of one sequence and its logits.

Letters: N = sequences, T = tokens, I = inputs of a reader, U = units, V = vocabulary.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import psutil
import torch
from torch import Tensor, nn

from prunus.errors import UserError
from prunus.models import StreamedModel
from prunus.models.axes import Axis
from prunus.models.limits import kv_cache_values
from prunus.progress import progress
from prunus.steps.calibration_text import whole_model
from prunus.steps.shrink_width_edit import axis_read, input_dim
from prunus.text.batches import TokenBatch

Axes = Mapping[str, Axis]


def gate_gradients(model: StreamedModel, axes: Axes, batch: TokenBatch) -> dict[str, Tensor]:
    """Name of each matrix that reads units of these axes -> (N, U), fp32."""
    readers = _readers(model, axes)
    whole = whole_model(model).requires_grad_(False)
    whole.enable_input_require_grads()  # otherwise nothing would ask for the derivatives in between
    found: dict[str, list[Tensor]] = {name: [] for name in readers}
    handles = [
        whole.get_submodule(name).register_forward_pre_hook(_watch(partial(_keep, found[name], columns_UW)))
        for name, columns_UW in readers.items()
    ]
    with torch.enable_grad(), progress("Gradients", len(batch.tokens_NT), 0) as advance:
        for tokens_T in batch.tokens_NT:
            tokens_1T = tokens_T[None].to(model.device)
            whole(input_ids=tokens_1T, labels=tokens_1T, use_cache=False).loss.backward()
            advance(1)
    for handle in handles:
        handle.remove()
    return {name: torch.stack(rows) for name, rows in found.items()}


def _readers(model: StreamedModel, axes: Axes) -> dict[str, Tensor]:
    """Name of the matrix -> which of its inputs belong to each unit (U, W)."""
    return {
        block.full_name(linear): axis.positions(block.full_parameter(linear), input_dim(linear)).to(model.device)
        for block, linear in model.spec.matrices
        if (axis := axis_read(axes, block, linear))
    }


def _watch(keep: Callable[[Tensor, Tensor], None]) -> Callable[[nn.Module, tuple[Any, ...]], None]:
    def before_forward(_module: nn.Module, args: tuple[Any, ...]) -> None:
        x = args[0].detach()  # a hook that held the tensor it hangs on would never be freed, nor would the tensor
        args[0].register_hook(lambda gradient: keep(x, gradient))

    return before_forward


def _keep(rows: list[Tensor], columns_UW: Tensor, x: Tensor, gradient: Tensor) -> None:
    by_input_I = (x.float() * gradient.float()).flatten(0, -2).sum(0)
    rows.append(by_input_I[columns_UW].sum(1))


def check_gradients(model: StreamedModel, axes: Axes, length: int, max_memory: int | None) -> None:
    """Raise UserError where gradients cannot be had, or would not fit into memory, before weights are read."""
    for block, linear in model.spec.matrices:
        if linear.expert is not None and axis_read(axes, block, linear):
            raise UserError(
                f"{model.spec.family} keeps its experts in fused tensors, whose units give no gradient here; take a "
                "score without gradients, such as second-order."
            )
    needed, free = _bytes(model, length), max_memory or int(psutil.virtual_memory().available)
    if needed > free:
        raise UserError(
            f"this score loads the whole model and needs about {needed / 2**30:.1f} GiB; {free / 2**30:.1f} GiB are "
            "there. Take a smaller --length, or a score without gradients, such as second-order."
        )


def _bytes(model: StreamedModel, length: int) -> int:
    """Weights, what every block keeps of one sequence for the way back, and logits with their derivative in fp32."""
    config = model.config.get_text_config(decoder=True)
    widths = sum(4 * linear.shape[1] for _, linear in model.spec.matrices if linear.expert is None)
    kept = length * (widths + kv_cache_values(model.config)) * model.dtype.itemsize
    return int(model.checkpoint.num_parameters * model.dtype.itemsize + kept + 3 * 4 * length * config.vocab_size)
