"""Whether and how a block can take over what the layers behind it did: its last matrix, its inputs, its output.

Folding asks that the block add the product of its last matrix to its output, times one number that is 1 in most
families. A norm between the two (Gemma 2 and 3, OLMo 2) or a gate breaks that. It is tested on the block itself.

Shapes: N = sequences, T = tokens, H = hidden, O = out_features, I = in_features.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn

from prunus.calibration.hidden_states import HiddenStates
from prunus.errors import UserError
from prunus.models import StreamedModel
from prunus.models.spec import BlockSpec, LinearSpec
from prunus.shrinking.fold import Folded, FoldStatistics

RAISED = 100.0  # the matrix's product is made so many times larger than all else, so that rounding does not matter
TOLERANCE = 0.05


def last_matrix(block: BlockSpec) -> LinearSpec:
    """The matrix that a fold changes. Raises UserError where the block ends in several."""
    linears = [linear for group in block.stages[-1].groups for linear in group.linears]
    if len(linears) > 1:
        raise UserError(
            f"{block.name} ends in {len(linears)} matrices ({linears[0].projection}), so removed layers cannot be "
            "folded into it; use --no-fold."
        )
    return linears[0]


@dataclass(frozen=True, slots=True)
class LastMatrix:
    """What a fold changes of a block: its last matrix (O, I) and that matrix's bias (O), None where it has none."""

    weight_OI: Tensor
    bias_O: Tensor | None

    @classmethod
    def stored_in(cls, block: BlockSpec, state: Mapping[str, Tensor]) -> Self:
        """From a block's tensors, under the model's names."""
        linear = last_matrix(block)
        bias_O = linear.bias_view(state[block.full(linear.bias)]) if linear.bias else None
        return cls(linear.view(state[block.full_parameter(linear)]), bias_O)

    def stored(self, linear: LinearSpec) -> dict[str, Tensor]:
        """As the parameters that hold it, under the block's names."""
        weight = self.weight_OI.T if linear.transposed else self.weight_OI
        stored = {linear.parameter: weight.contiguous()}
        return {**stored, linear.bias: self.bias_O} if linear.bias and self.bias_O is not None else stored

    def folded(self, folded: Folded | None) -> "LastMatrix":
        """With the fold, in its own dtype; None: as it is."""
        if folded is None:
            return self
        weight_OI = (self.weight_OI.float() + folded.delta_HI.to(self.weight_OI.device)).to(self.weight_OI)
        if self.bias_O is None:
            return LastMatrix(weight_OI, None)
        assert folded.delta_bias_H is not None, "the fold was fitted without the bias"
        return LastMatrix(weight_OI, (self.bias_O.float() + folded.delta_bias_H.to(self.bias_O.device)).to(self.bias_O))


def last_parameters(block: BlockSpec) -> list[str]:
    """The model's names of the parameters that a fold changes."""
    linear = last_matrix(block)
    return [block.full(name) for name in (linear.parameter, linear.bias) if name]


def set_last_matrix(model: StreamedModel, index: int, matrix: LastMatrix) -> None:
    """Let the loaded block run with another last matrix, in memory of its own: `load_block` may share its state's."""
    for name, stored in matrix.stored(last_matrix(model.spec.blocks[index])).items():
        owner, _, leaf = name.rpartition(".")
        new = stored.to(model.device, model.dtype, copy=True)
        model.blocks[index].get_submodule(owner)._parameters[leaf] = nn.Parameter(new, requires_grad=False)


@torch.no_grad()
def share_of_output(model: StreamedModel, index: int, hidden_1TH: Tensor) -> float:
    """The number that the product of the loaded block's last matrix is multiplied by on its way to the output.

    Raises UserError when it is no one number: then nothing can be folded there.
    """
    linear = last_matrix(model.spec.blocks[index])
    weight_OI = linear.view(model.blocks[index].get_parameter(linear.parameter).data).clone()
    products, outputs = [], []
    for scale in (0.0, _raise_by(model, index, linear, hidden_1TH)):
        set_last_matrix(model, index, LastMatrix(weight_OI * scale, None))
        with _observed(model.blocks[index].get_submodule(linear.name)) as seen:
            outputs.append(model.run_block(index, hidden_1TH).double())
        products.append(seen[0][1].double().view_as(outputs[-1]))
    set_last_matrix(model, index, LastMatrix(weight_OI, None))
    return _one_number(products[1] - products[0], outputs[1] - outputs[0], model, index)


def _raise_by(model: StreamedModel, index: int, linear: LinearSpec, hidden_1TH: Tensor) -> float:
    with _observed(model.blocks[index].get_submodule(linear.name)) as seen:
        output_1TH = model.run_block(index, hidden_1TH)
    return float(RAISED * output_1TH.float().norm() / seen[0][1].float().norm().clamp_min(1e-20))


def _one_number(product: Tensor, change: Tensor, model: StreamedModel, index: int) -> float:
    share = float((product * change).sum() / product.square().sum())
    if not share > TOLERANCE or float((change - share * product).norm() / product.norm()) > TOLERANCE * share:
        name = model.spec.blocks[index].full_name(last_matrix(model.spec.blocks[index]))
        raise UserError(
            f"architecture {model.spec.family!r} does not add what {name} gives to the hidden states as it is (a norm "
            "or a gate comes after it), so removed layers cannot be folded into it; use --no-fold."
        )
    return share


@contextmanager
def _observed(module: nn.Module) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Within the context, the module's (input (T, I), output (T, O)) of every call."""
    seen: list[tuple[Tensor, Tensor]] = []

    def note(_module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        seen.append((args[0].flatten(0, -2), output.flatten(0, -2)))

    handle = module.register_forward_hook(note)
    try:
        yield seen
    finally:
        handle.remove()


@torch.no_grad()
def fit_folds(
    model: StreamedModel, index: int, hidden_in: HiddenStates, real_NT: Tensor, targets: list[HiddenStates]
) -> list[Folded]:
    """For each target, what the loaded block's last matrix needs to come as near to it as it can.

    Raises UserError when the block is not of the kind that can be folded into.
    """
    linear = last_matrix(model.spec.blocks[index])
    share = share_of_output(model, index, hidden_in[0])
    statistics = FoldStatistics(len(targets), bias=linear.bias is not None)
    for n, real_T in enumerate(real_NT):
        with _observed(model.blocks[index].get_submodule(linear.name)) as seen:
            out_TH = model.run_block(index, hidden_in[n])[0]
        real = real_T.to(out_TH.device)
        wanted = [target[n][0].to(out_TH.device)[real] for target in targets]
        statistics.add(seen[0][0][real], out_TH[real], wanted, share)
        if n % 16 == 15:
            for states in (hidden_in, *targets):
                states.release()
    return statistics.solve()
