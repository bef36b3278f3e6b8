"""The loss's derivative by a factor of 1 on every unit, or by every weight of it: what first-order scores look at.

The whole model is loaded in the forward dtype, and one sequence at a time goes forward and back. For factors no weight
gets a gradient, so memory is the weights, the activations of one sequence and its logits; else that, and the gradients
in fp32 of the weights that belong to units, each added up and dropped as soon as the way back has passed it.

Letters: N = sequences, T = tokens, I = inputs of a reader, U = units, V = vocabulary.
"""

from collections.abc import Callable, Collection, Mapping
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
from prunus.steps.shrink_width_edit import FromTheLoss, axis_read, input_dim
from prunus.text.batches import TokenBatch

Axes = Mapping[str, Axis]


def from_the_loss(model: StreamedModel, axes: Axes, batch: TokenBatch, needs: Collection[str]) -> FromTheLoss:
    """What scores with these needs want of the loss; nothing where they do not look at it."""
    return FromTheLoss(
        gate_gradients(model, axes, batch) if "gate_gradient" in needs else {},
        weight_taylor(model, axes, batch) if "weight_gradient" in needs else {},
    )


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
    _back_from_the_loss(whole, batch, model.device)
    for handle in handles:
        handle.remove()
    return {name: torch.stack(rows) for name, rows in found.items()}


def weight_taylor(model: StreamedModel, axes: Axes, batch: TokenBatch) -> dict[str, Tensor]:
    """Name of each matrix that reads units of these axes -> (U), fp32: what `taylor-element` sums up."""
    members = _members(model, axes)
    whole = whole_model(model).requires_grad_(False)
    weights = {name: whole.get_parameter(name).requires_grad_() for of in members.values() for name, _, _ in of}
    sums = {name: torch.zeros_like(weight, dtype=torch.float32) for name, weight in weights.items()}
    for name, weight in weights.items():
        weight.register_post_accumulate_grad_hook(partial(_add_up, sums[name]))
    _back_from_the_loss(whole, batch, model.device)
    for name, weight in weights.items():
        sums[name].mul_(weight.detach()).abs_()
    return {
        reader: sum((_by_unit(sums[name], dim, positions_UW) for name, dim, positions_UW in of), torch.zeros(()))
        for reader, of in members.items()
    }


def _back_from_the_loss(whole: Any, batch: TokenBatch, device: torch.device) -> None:
    with torch.enable_grad(), progress("Gradients", len(batch.tokens_NT), 0) as advance:
        for tokens_T in batch.tokens_NT:
            tokens_1T = tokens_T[None].to(device)
            whole(input_ids=tokens_1T, labels=tokens_1T, use_cache=False).loss.backward()
            advance(1)


def _members(model: StreamedModel, axes: Axes) -> dict[str, list[tuple[str, int, Tensor]]]:
    """Name of the reader -> (parameter, dimension, where each unit is along it (U, W)) of all that goes with a unit."""
    found = {}
    for block, linear in model.spec.matrices:
        if axis := axis_read(axes, block, linear):
            own = [(name, dim) for name, dim in axis.segments if name.startswith(f"{block.name}.")]
            found[block.full_name(linear)] = [(name, dim, axis.positions(name, dim)) for name, dim in own]
    return found


def _add_up(total: Tensor, weight: Tensor) -> None:
    assert weight.grad is not None
    total += weight.grad
    weight.grad = None


def _by_unit(values: Tensor, dim: int, positions_UW: Tensor) -> Tensor:
    """(U): the sum over all elements of each unit."""
    rows = values.movedim(dim, 0)[positions_UW.flatten().to(values.device)]
    return rows.reshape(len(positions_UW), -1).sum(1)


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


def check_gradients(
    model: StreamedModel, axes: Axes, length: int, max_memory: int | None, *, by_weights: bool = False
) -> None:
    """Raise UserError where gradients cannot be had, or would not fit into memory, before weights are read."""
    for block, linear in model.spec.matrices:
        if linear.expert is not None and axis_read(axes, block, linear):
            raise UserError(
                f"{model.spec.family} keeps its experts in fused tensors, whose units give no gradient here; take a "
                "score without gradients, such as second-order."
            )
    needed, free = _bytes(model, length), max_memory or int(psutil.virtual_memory().available)
    if by_weights:
        names = {name for of in _members(model, axes).values() for name, _, _ in of}
        needed += 4 * sum(model.checkpoint.tensors[key].num_elements for key in model.names.keys_of(names))
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
