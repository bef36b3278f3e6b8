"""The edit that removes units of coupled groups, and the table of facts it leaves behind.

It stops where a matrix reads the units of an axis (`down`, `o`), chooses which stay, and refits that matrix with zeros
for what goes. A block with such zeros computes what the smaller block will: so the pass goes on with shapes as they
were, and the tensors are cut when the block is written.

Letters: O, I = out, in features of the reader; U = units; N = sequences.
"""

import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from prunus.calibration import Tensors
from prunus.models.axes import Axis
from prunus.models.cut import Cut
from prunus.models.spec import BlockSpec, Group, LinearSpec, Stage
from prunus.shrinking import Units, WidthScore, choose_units
from prunus.shrinking.refit import drop, refit
from prunus.shrinking.units import FROM_THE_LOSS
from prunus.sparsity import Statistics
from prunus.sparsity.methods import output_energy
from prunus.steps.shrink_step import rounded_scores, to_hex


@dataclass(frozen=True, slots=True)
class FromTheLoss:
    """What the loss of the whole model says, by the name of the matrix that reads the units."""

    gate_gradients: Mapping[str, Tensor] = field(default_factory=dict)  # (N, U)
    weight_taylor: Mapping[str, Tensor] = field(default_factory=dict)  # (U)


@dataclass
class WidthEdit:
    """An Edit of the block pass: one row per coupled group goes to `rows`."""

    score: WidthScore
    refits: bool
    cut: Cut
    loss: FromTheLoss = FromTheLoss()
    rows: list[dict[str, Any]] = field(default_factory=list)

    def needs_at(self, block: BlockSpec, stage: Stage) -> Collection[str] | None:
        linear = stage.groups[0].linears[0]
        axis = axis_read(self.cut.axes, block, linear)
        if axis is None or self.cut.left_in(axis.name, number_of(block)) == axis.units:
            return None
        of_refit = {"gram", "input_mean"} if linear.bias else {"gram"}
        return {*self.score.needs, *(of_refit if self.refits else ())} - FROM_THE_LOSS

    def __call__(
        self, block: BlockSpec, group: Group, weights_OI: list[Tensor], statistics: Statistics, tensors: Tensors
    ) -> list[Tensor]:
        start = time.perf_counter()
        linear, weight_OI = group.linears[0], weights_OI[0]
        axis = axis_read(self.cut.axes, block, linear)
        assert axis is not None
        units = self.units(axis, block, linear, weight_OI, statistics, tensors)
        choice = choose_units(self.score, units, self.cut.left_in(axis.name, number_of(block)))
        new_OI, errors = self._solve(units, choice.keep_U, block, linear, tensors)
        self.rows.append(
            {
                "name": block.full_name(linear),
                "block": number_of(block),
                "axis": axis.name,
                "expert": linear.expert,
                "units": axis.units,
                "kept": to_hex(choice.keep_U),
                "scores": rounded_scores(choice.score_U),
                "tokens": statistics.num_tokens,
                **errors,
                "seconds": round(time.perf_counter() - start, 4),
            }
        )
        return [new_OI.to(weight_OI.dtype), *weights_OI[1:]]

    def units(
        self,
        axis: Axis,
        block: BlockSpec,
        linear: LinearSpec,
        weight_OI: Tensor,
        statistics: Statistics,
        tensors: Tensors,
    ) -> Units:
        """What the score sees of the units that this matrix reads."""
        if not statistics.num_tokens:
            statistics = Statistics.of_nothing(weight_OI.shape[1], weight_OI.device)
        reader = block.full_parameter(linear)
        producers = []
        for name, dim in axis.segments:
            if name != reader and name in tensors:
                tensor, at = (tensors[name], dim) if linear.expert is None else (tensors[name][linear.expert], dim - 1)
                positions_UW = axis.positions(name, dim)
                rows = tensor.movedim(at, 0)[positions_UW.flatten()].float()
                producers.append(rows.reshape(axis.units, -1).to(weight_OI.device))
        return Units(
            reader_OI=weight_OI.float(),
            columns_UW=axis.positions(reader, input_dim(linear)).to(weight_OI.device),
            statistics=statistics,
            producers=tuple(producers),
            gate_gradient_NU=self.loss.gate_gradients.get(block.full_name(linear)),
            weight_taylor_U=self.loss.weight_taylor.get(block.full_name(linear)),
            runs=axis.runs,
        )

    def _solve(
        self, units: Units, keep_U: Tensor, block: BlockSpec, linear: LinearSpec, tensors: Tensors
    ) -> tuple[Tensor, dict[str, float]]:
        """(the reader with zeros for what goes, its relative output error without and with what makes up for it).

        A bias takes what goes away on average; the columns that stay then only have to follow how it varies.
        """
        weight_OI, statistics = units.reader_OI, units.statistics
        stays_I = torch.zeros(weight_OI.shape[1], dtype=torch.bool, device=weight_OI.device)
        stays_I[units.inputs(keep_U)] = True
        new_OI = plain_OI = drop(weight_OI, stays_I)
        takes_mean = bool(linear.bias) and statistics.input_mean_I is not None
        around = _around_mean(statistics) if takes_mean else statistics
        if self.refits:
            new_OI = refit(weight_OI, around.gram(), stays_I)
        if linear.bias and takes_mean:
            bias_O = linear.bias_view(tensors[block.full(linear.bias)])
            bias_O += ((weight_OI - new_OI) @ statistics.mean()).to(bias_O)
        before = output_energy(weight_OI, statistics) or 1.0
        return new_OI, {
            "error_plain": output_energy(weight_OI - plain_OI, statistics) / before,
            "error": output_energy(weight_OI - new_OI, around) / before,
        }


def number_of(block: BlockSpec) -> int:
    """Which of the model's blocks it is."""
    return int(block.name.rpartition(".")[2])


def axis_read(axes: Mapping[str, Axis], block: BlockSpec, linear: LinearSpec) -> Axis | None:
    """The axis of a width inside blocks along which the inputs of this matrix go, if any of these does."""
    key = (block.full_parameter(linear), input_dim(linear))
    return next((axis for name, axis in axes.items() if key in axis.segments and name != "hidden"), None)


def input_dim(linear: LinearSpec) -> int:
    """The dimension of the stored tensor that runs over the inputs."""
    return (linear.expert is not None) + (not linear.transposed)


def _around_mean(statistics: Statistics) -> Statistics:
    """Statistics of the inputs less their mean."""
    mean_I = statistics.mean()
    sq_norm_I = (statistics.sq_norm() - mean_I.square()).clamp_min(0)
    gram_II = None if statistics.gram_II is None else statistics.gram() - torch.outer(mean_I, mean_I)
    return replace(statistics, input_sq_norm_I=sq_norm_I, gram_II=gram_II)
