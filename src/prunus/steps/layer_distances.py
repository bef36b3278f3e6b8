"""Scores of layers that compare hidden states before and after them, in one forward pass of the dense model."""

import math
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from prunus.calibration.dense_stream import DenseStream
from prunus.calibration.hidden_states import HiddenStates
from prunus.errors import UserError
from prunus.models import StreamedModel
from prunus.progress import progress
from prunus.text.batches import TokenBatch

Distance = Callable[[Tensor, Tensor], Tensor]  # (T, H) before and after -> (T)


@torch.no_grad()
def distances(model: StreamedModel, batch: TokenBatch, span: int, distance: Distance, folder: Path) -> list[float]:
    """For each layer that `span` layers begin at, the mean distance over all tokens between before and after them."""
    depth = len(model.spec.blocks)
    means = []
    with progress("Compare layers", depth * len(batch.tokens_NT)) as advance:
        dense = DenseStream(model, batch, folder, advance)
        for end in range(depth + 1):
            after = dense.at(end)
            if end >= span:
                means.append(_mean(dense.at(end - span), after, batch.real_NT, distance))
                dense.forget_before(end - span + 1)
    check_finite(means, model)
    return means


def _mean(before: HiddenStates, after: HiddenStates, real_NT: Tensor, distance: Distance) -> float:
    total = 0.0
    for n, real_T in enumerate(real_NT):
        total += float(distance(before[n][0], after[n][0])[real_T].double().sum())
    before.release()
    after.release()
    return total / int(real_NT.sum())


def check_finite(means: list[float], model: StreamedModel) -> None:
    """Raises UserError for a mean that is NaN or infinite."""
    if not all(map(math.isfinite, means)):
        raise UserError(
            f"the hidden states of {model.checkpoint.path} became NaN or Inf in "
            f"{str(model.dtype).removeprefix('torch.')} on the calibration text; try --dtype float32."
        )
