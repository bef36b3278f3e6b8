"""Which blocks or matrices bear pruning: prune each one alone, run the rest dense, and measure KL to the dense model.

Shapes: N = windows, T = tokens, H = hidden, V = vocabulary.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from prunus.calibration import BlockPass, Edit, HiddenStates, embed_all, hidden_shape
from prunus.errors import UserError
from prunus.evaluation.divergence import token_kl
from prunus.evaluation.source import check_finite
from prunus.models import StreamedModel
from prunus.models.limits import max_length
from prunus.progress import progress
from prunus.sparsity import METHODS, Pattern, parse_pattern
from prunus.steps.plan import Plan
from prunus.steps.sparsify_edit import SparsifyEdit
from prunus.text.batches import evaluation_windows
from prunus.text.sources import parse_source

METHOD = "wanda"  # the cheapest method that looks at inputs; what matters here is the order of the units


def measure_sensitivity(
    model: StreamedModel, *, pattern: str, by: str, text: str, length: int, windows: int
) -> list[dict[str, Any]]:
    """Return one row per unit: its KL(dense || pruned alone), mean nats per token. `by` is "block" or "matrix"."""
    if by not in ("block", "matrix"):
        raise UserError(f"by={by!r} is not known; allowed are block and matrix.")
    if windows < 1:
        raise UserError(f"windows={windows}: measuring sensitivity needs at least 1 window.")
    batch = evaluation_windows(
        parse_source(text), model.tokenizer, length=length, windows=windows, max_length=max_length(model.config)
    )
    rows = sensitivity_of_windows(model, batch.tokens_NT, parse_pattern(pattern), by=by)
    facts = batch.description[0]
    return [{**row, "dataset": facts["source"], "dataset_sha256": facts["sha256"]} for row in rows]


def sensitivity_of_windows(
    model: StreamedModel, tokens_NT: Tensor, pattern: Pattern, *, by: str
) -> list[dict[str, Any]]:
    """The same on given tokens. Every row names the model it is about. Raises UserError when a KL is NaN."""
    method = METHODS[METHOD]
    wanted = method.resolve(pattern)
    conditions = _conditions(model, tokens_NT, wanted)
    units = _units(model, by)
    edits = [SparsifyEdit(method, method.options(), Plan(dict.fromkeys(names, wanted))) for *_, names in units]
    alone = [(index, name, edit) for (index, name, _, _), edit in zip(units, edits, strict=True)]
    return [
        {"name": name, "block": index, "projection": projection, "kl": kl, **conditions}
        for (index, name, projection, _), kl in zip(units, kl_of_each(model, tokens_NT, alone), strict=True)
    ]


def kl_of_each(model: StreamedModel, tokens_NT: Tensor, alone: Sequence[tuple[int, str, Edit]]) -> list[float]:
    """KL(dense || one block edited), mean nats per token, for each (block, name of what is edited, edit).

    Raises UserError when a KL is NaN.
    """
    inputs = _dense_inputs(model, tokens_NT)
    found = []
    with progress("Sensitivity", len(alone)) as advance:
        for index, name, edit in alone:
            kl = _mean_kl(model, tokens_NT, inputs[-1], _final_hidden(model, tokens_NT, inputs[index], index, edit))
            check_finite({"KL": kl}, str(model.checkpoint.path), f"this text, with {name} pruned,")
            found.append(kl)
            advance(1)
    return found


def _conditions(model: StreamedModel, tokens_NT: Tensor, wanted: Pattern) -> dict[str, Any]:
    return {
        "model": str(model.checkpoint.path),
        "sha256": model.checkpoint.sha256,
        "pattern": str(wanted),
        "method": METHOD,
        "window": tokens_NT.shape[1],
        "windows": len(tokens_NT),
        "dtype": str(model.dtype).removeprefix("torch."),
    }


def _units(model: StreamedModel, by: str) -> list[tuple[int, str, str, list[str]]]:
    units = []
    for index, block in enumerate(model.spec.blocks):
        if by == "block":
            units.append((index, block.name, "block", [block.full_name(linear) for linear in block.linears]))
        else:
            units += [(index, block.full_name(ln), ln.projection, [block.full_name(ln)]) for ln in block.linears]
    return units


def _dense_inputs(model: StreamedModel, tokens_NT: Tensor) -> list[HiddenStates]:
    """What enters each block of the dense model, and last what leaves the final one."""
    shape = hidden_shape(model, tokens_NT)
    states = [HiddenStates(shape, model.dtype) for _ in range(len(model.spec.blocks) + 1)]
    embed_all(model, tokens_NT, states[0])
    num_blocks = len(model.spec.blocks)
    with progress("Sensitivity, dense model", num_blocks * len(tokens_NT)) as advance:
        plain = BlockPass(model=model, real_NT=_all_real(tokens_NT), edit=None, advance=advance)
        for index in range(num_blocks):
            plain.run_block(index, states[index], states[index + 1])
    return states


def _final_hidden(model: StreamedModel, tokens_NT: Tensor, start: HiddenStates, index: int, edit: Edit) -> HiddenStates:
    shape = (start.states_NTH.shape[0], start.states_NTH.shape[1], start.states_NTH.shape[2])
    hidden = HiddenStates(shape, model.dtype)
    real_NT = _all_real(tokens_NT)
    BlockPass(model=model, real_NT=real_NT, edit=edit, num_in_memory=len(tokens_NT)).run_block(index, start, hidden)
    plain = BlockPass(model=model, real_NT=real_NT, edit=None)
    for later in range(index + 1, len(model.spec.blocks)):
        plain.run_block(later, hidden, hidden)
    return hidden


def _all_real(tokens_NT: Tensor) -> Tensor:
    return torch.ones_like(tokens_NT, dtype=torch.bool)


def _mean_kl(model: StreamedModel, tokens_NT: Tensor, dense: HiddenStates, sparse: HiddenStates) -> float:
    total = 0.0
    for n in range(len(tokens_NT)):
        tokens_1T = tokens_NT[n : n + 1]
        total += float(token_kl(model.logits(tokens_1T, dense[n])[0], model.logits(tokens_1T, sparse[n])[0]).mean())
    return total / len(tokens_NT)
