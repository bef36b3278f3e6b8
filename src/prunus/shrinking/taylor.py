"""Taylor scores: how the loss would change, to first order, without the unit.

Put a factor of 1 on what a unit hands to its reader. The derivative of the loss by that factor is the sum of weight
times gradient over the unit's columns of the reader, so no gradient of any weight is needed.

`taylor`: Ma et al. 2023, LLM-Pruner, arXiv:2305.11627, equation 3, vector-wise: |sum over all text of the derivative|.
`fisher`: its second-order term with the diagonal of the Fisher matrix (equation 4), which is also the criterion of
Molchanov et al. 2019, arXiv:1906.10771, equation 8: the mean over sequences of the squared derivative.
`taylor-element`: its first-order term element by element, summed over the group: sum |weight x derivative of the loss
over all text by that weight|, over the unit's columns of the reader and its rows in the producing matrices, so that
what would cancel inside a unit counts. It needs the gradients of these weights.
"""

from torch import Tensor

from prunus.shrinking.units import Units


def taylor(units: Units) -> Tensor:
    """(U): the absolute derivative over all sequences."""
    return _derivatives(units).mean(0).abs()


def fisher(units: Units) -> Tensor:
    """(U): the mean over sequences of the squared derivative."""
    return _derivatives(units).square().mean(0)


def taylor_element(units: Units) -> Tensor:
    """(U): the sum over all weights of a unit of the absolute first-order changes of the loss."""
    assert units.weight_taylor_U is not None, "the gradients of weights were not collected"
    return units.weight_taylor_U.float()


def _derivatives(units: Units) -> Tensor:
    assert units.gate_gradient_NU is not None, "the gate gradient was not collected"
    return units.gate_gradient_NU.float()
