"""Scores of layers that look at the loss's gradients by weights, one layer in memory at a time.

Forwards, the hidden states in front of every layer are kept. Backwards, each layer runs again, takes the gradient by
its output to that by its input, and gives the gradients of its own weights, which are summed over all sequences, scored
and dropped: never are there more than one layer's.

Shapes: N = sequences, T = tokens, t = positions, H = hidden, V = vocabulary.
"""

import math
from pathlib import Path

import psutil
import torch
from torch import Tensor, nn

from prunus.calibration.dense_stream import DenseStream
from prunus.calibration.hidden_states import HiddenStates
from prunus.errors import UserError
from prunus.evaluation.source import POSITIONS_AT_ONCE
from prunus.memory import release_freed_memory
from prunus.models import StreamedModel
from prunus.progress import progress
from prunus.shrinking.taylor_layers import taylor_sum
from prunus.text.batches import TokenBatch


def taylor_sums(model: StreamedModel, batch: TokenBatch, folder: Path) -> list[float]:
    """Of each layer, the sum of `taylor_sum` over its matrices. Hidden states live in files of `folder`.

    Raises UserError where a sum is no number.
    """
    depth, (num, length) = len(model.spec.blocks), batch.tokens_NT.shape
    sums = []
    with progress("Gradients", 2 * depth * num) as advance:
        dense = DenseStream(model, batch, folder, advance)
        hidden = [dense.at(boundary) for boundary in range(depth + 1)]
        gradient = HiddenStates((num, length, hidden[0].states_NTH.shape[2]), torch.float32, folder / "hidden-gradient")
        _start_at_the_loss(model, batch, hidden.pop(), gradient)
        for layer in reversed(range(depth)):
            sums.append(_through_layer(model, layer, hidden.pop(), gradient))
            advance(num)
    if not all(map(math.isfinite, sums)):
        raise UserError(
            f"the gradients of {model.checkpoint.path} became NaN or Inf in {_name(model.dtype)} on the calibration "
            "text; try --dtype float32."
        )
    return sums[::-1]


def _start_at_the_loss(model: StreamedModel, batch: TokenBatch, hidden: HiddenStates, gradient: HiddenStates) -> None:
    """Fill `gradient` with that of the mean loss of all next tokens by what leaves the last layer."""
    num_targets = int(batch.real_NT[:, 1:].sum())
    for n, real_T in enumerate(batch.real_NT):
        tokens_1T = batch.tokens_NT[n : n + 1].to(model.device)
        gradient.states_NTH[n].zero_()
        for start in range(0, tokens_1T.shape[1] - 1, POSITIONS_AT_ONCE):
            at = slice(start, min(start + POSITIONS_AT_ONCE, tokens_1T.shape[1] - 1))
            weight_t = real_T[1:][at].to(model.device) / num_targets
            found_1tH = _by_hidden(model, tokens_1T, at, hidden[n][:, at], weight_t)
            gradient.states_NTH[n, at] = found_1tH[0].to(gradient.states_NTH)
    model.free_outer()


@torch.enable_grad()
def _by_hidden(model: StreamedModel, tokens_1T: Tensor, at: slice, hidden_1tH: Tensor, weight_t: Tensor) -> Tensor:
    """(1, t, H): the gradient of the weighted losses of the tokens that follow the positions `at`."""
    hidden_1tH = hidden_1tH.to(model.device).requires_grad_()
    logits_tV = model.logits(tokens_1T[:, at], hidden_1tH)[0]
    targets_t = tokens_1T[0, at.start + 1 : at.stop + 1]
    losses_t = nn.functional.cross_entropy(logits_tV, targets_t, reduction="none")
    return torch.autograd.grad((weight_t * losses_t).sum(), hidden_1tH)[0]


@torch.enable_grad()
def _through_layer(model: StreamedModel, layer: int, hidden_in: HiddenStates, gradient: HiddenStates) -> float:
    """The layer's sum; `gradient`, by its output, becomes that by its input."""
    model.load_block(layer)
    weights = [parameter.requires_grad_() for parameter in model.blocks[layer].parameters() if parameter.ndim > 1]
    sums = [torch.zeros_like(weight, dtype=torch.float32) for weight in weights]
    for n in range(len(gradient.states_NTH)):
        x_1TH = hidden_in[n].to(model.device).requires_grad_()
        out_1TH = model.run_block(layer, x_1TH)
        by_input, *by_weights = torch.autograd.grad(out_1TH, [x_1TH, *weights], gradient[n].to(out_1TH))
        gradient[n] = by_input.float()
        for total, found in zip(sums, by_weights, strict=True):
            total += found
    score = sum(taylor_sum(weight.detach(), total) for weight, total in zip(weights, sums, strict=True))
    model.free_block(layer)
    for states in (hidden_in, gradient):
        states.release()
    release_freed_memory()
    return score


def check_memory(model: StreamedModel, length: int, max_memory: int | None) -> None:
    """Raise UserError when one layer with its gradients would not fit into memory, before weights are read."""
    needed, free = _bytes(model, length), max_memory or int(psutil.virtual_memory().available)
    if needed > free:
        raise UserError(
            f"this score needs about {needed / 2**30:.1f} GiB for one layer with its gradients and a sequence of "
            f"{length} tokens; {free / 2**30:.1f} GiB are there. Take a smaller --length, or a score without "
            "gradients, such as angular."
        )


def _bytes(model: StreamedModel, length: int) -> int:
    """What the process has, and the larger of two: a layer on its way back, or the head with a piece of its logits.

    The layer: as stored and as it runs, its gradients in that dtype and their fp32 sums, and what it keeps of a
    sequence for the way back, about four times the inputs of its matrices. The head: its weights, and logits with their
    derivatives in fp32.
    """
    size, tensors = model.dtype.itemsize, model.checkpoint.tensors
    layers: list[int] = []
    for block, keys in zip(model.spec.blocks, model.block_keys(), strict=True):
        stored, elements = (sum(getattr(tensors[key], what) for key in keys) for what in ("num_bytes", "num_elements"))
        widths = sum(linear.shape[1] for linear in block.linears)
        layers.append(stored + elements * (2 * size + 2 * 4) + 4 * length * widths * size)
    outer = sum(tensors[key].num_elements for key in model.names.keys_of(model.outer_parameters())) * size
    logits = min(length, POSITIONS_AT_ONCE) * int(model.config.get_text_config(decoder=True).vocab_size) * 4 * 4
    return int(psutil.Process().memory_info().rss) + max([*layers, outer + logits])


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
