"""Zeros stay zeros: which weights training may not bring back, and how it is kept from doing so.

A keep mask is True where a weight stays. Gradients of the others are cleared before the norm is clipped and before Adam
sees them, and the weights are cleared after every step, so that neither rounding nor weight decay can revive them.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from prunus.errors import UserError
from prunus.models.spec import LinearSpec, ModelSpec
from prunus.recovery.processes import shard_like

MANY_ZEROS = 0.1  # a matrix without a record of its own counts as pruned when more of it than this is zero


@dataclass(frozen=True, slots=True)
class Matrix:
    """One prunable matrix: its name, the parameter that holds it, and how to see it in there."""

    name: str
    parameter: str
    linear: LinearSpec


def matrices_of(spec: ModelSpec) -> list[Matrix]:
    """Every matrix that can be pruned, the untied output head included."""
    pairs = [*spec.matrices, *((spec.head, linear) for linear in (spec.head.linears if spec.head else ()))]
    return [Matrix(block.full_name(one), block.full_parameter(one), one) for block, one in pairs if block is not None]


def num_weights(matrices: Iterable[Matrix]) -> int:
    """How many weights they have."""
    return sum(matrix.linear.shape[0] * matrix.linear.shape[1] for matrix in matrices)


class KeepMasks:
    """The keep masks of some parameters, `keep` by parameter name, in the shape that the parameter is stored in."""

    def __init__(self, keep: dict[str, Tensor]) -> None:
        self.keep = keep

    def clear_gradients(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Set the gradients of weights that are gone to zero."""
        for name, keep in self.keep.items():
            gradient = parameters[name].grad if name in parameters else None
            if gradient is not None:
                local(gradient).mul_(keep)

    @torch.no_grad()
    def clear_weights(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Set the weights that are gone to zero."""
        for name, keep in self.keep.items():
            if name in parameters:
                local(parameters[name].data).mul_(keep)

    def placed_like(self, parameters: Mapping[str, nn.Parameter]) -> "KeepMasks":
        """The part of each mask that belongs to the part of the parameter that this process holds."""
        return KeepMasks({name: local(shard_like(keep, parameters[name])) for name, keep in self.keep.items()})


def local(tensor: Any) -> Tensor:
    """The part of a sharded tensor that this process holds; a plain tensor is its own part."""
    part: Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return part


class MaskSource:
    """Where the keep masks of a model come from.

    `keep_zeros` is "auto" (what the record says was pruned, and matrices with many zeros), "none", or a safetensors
    file of boolean masks by matrix name. Raises UserError for a file that does not fit the model.
    """

    def __init__(self, matrices: list[Matrix], history: list[dict[str, Any]], keep_zeros: str) -> None:
        self.matrices, self._keep_zeros = matrices, keep_zeros
        self._recorded = {row["name"] for step in history for row in step.get("matrices") or ()}
        last = history[-1] if history else {}
        self._rows = {row["name"]: row for row in last.get("matrices") or ()} if last.get("step") == "sparsify" else {}
        self._masks = {} if keep_zeros in ("auto", "none") else _read_masks(Path(keep_zeros), matrices)

    def find(self, weights: Mapping[str, Tensor]) -> tuple[KeepMasks, list[Matrix]]:
        """Return the keep masks of these weights (parameter name to tensor) and the matrices they are for.

        Raises UserError for a mask or a record that does not fit the weights.
        """
        keep: dict[str, Tensor] = {}
        chosen = [
            (m, mask) for m in self.matrices if m.parameter in weights if (mask := self._mask(m, weights)) is not None
        ]
        for matrix, keep_OI in chosen:
            stored = keep.setdefault(matrix.parameter, torch.ones_like(weights[matrix.parameter], dtype=torch.bool))
            matrix.linear.view(stored).copy_(keep_OI)
        return KeepMasks(keep), [matrix for matrix, _ in chosen]

    def _mask(self, matrix: Matrix, weights: Mapping[str, Tensor]) -> Tensor | None:
        if self._keep_zeros == "none":
            return None
        weight_OI = matrix.linear.view(weights[matrix.parameter])
        if self._keep_zeros != "auto":
            return self._of_file(matrix, weight_OI)
        keep_OI = weight_OI != 0
        zeros = 1 - float(keep_OI.float().mean())
        _check_record(matrix, self._rows.get(matrix.name), zeros)
        return keep_OI if matrix.name in self._recorded or zeros > MANY_ZEROS else None

    def _of_file(self, matrix: Matrix, weight_OI: Tensor) -> Tensor | None:
        keep_OI = self._masks.get(matrix.name)
        alive = 0 if keep_OI is None else int((weight_OI[~keep_OI] != 0).sum())
        if alive:
            raise UserError(
                f"{self._keep_zeros}: {alive} weights of {matrix.name} that the mask says are gone are not zero; "
                "recover never prunes: sparsify first, or give the mask that belongs to these weights."
            )
        return keep_OI


def count_zeros(matrices: Iterable[Matrix], weights: Mapping[str, Tensor]) -> dict[str, int]:
    """The zeros of each matrix, by name."""
    return {m.name: int((m.linear.view(weights[m.parameter]) == 0).sum()) for m in matrices}


def _check_record(matrix: Matrix, row: dict[str, Any] | None, zeros: float) -> None:
    """Weights with fewer zeros than their record says are not those that it is about."""
    shape = tuple(matrix.linear.shape)
    if row is not None and (tuple(row["shape"]) != shape or zeros < row["sparsity"] - 1e-6):
        raise UserError(
            f"the record says {row['sparsity']:.1%} of {matrix.name} {tuple(row['shape'])} is zero; the weights have "
            f"{zeros:.1%} of {shape}: they were changed since. Give --keep-zeros none, or a file of masks."
        )


def _read_masks(file: Path, matrices: list[Matrix]) -> dict[str, Tensor]:
    try:
        masks = load_file(file)
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"keep_zeros={str(file)!r} is neither auto, none nor a safetensors file of masks ({error})."
        ) from error
    known = {matrix.name: matrix for matrix in matrices}
    for name, keep_OI in masks.items():
        if name not in known:
            raise UserError(f"{file}: {name} is no matrix of this model; names are like {matrices[0].name}.")
        if keep_OI.dtype != torch.bool or tuple(keep_OI.shape) != tuple(known[name].linear.shape):
            raise UserError(
                f"{file}: the mask of {name} is {keep_OI.dtype} {tuple(keep_OI.shape)}; it must be torch.bool "
                f"{tuple(known[name].linear.shape)}, True where a weight stays."
            )
    return masks
