"""What a quantization method is, and the one door through which every method is called.

Everything inside runs in fp32; the caller's weight is never touched. A weight that was 0 is 0 afterwards.

Letters: O = out_features, I = in_features, G = scales in a row.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from prunus.quantizing.schemes import Scheme
from prunus.sparsity.methods import Need, Notes, Statistics
from prunus.sparsity.patterns import Pattern


@dataclass(frozen=True, slots=True)
class Quantized:
    """A matrix on its grid: `values_OI`, as it will be read back, and the scales, both in the checkpoint's dtype."""

    values_OI: Tensor
    scale_OG: Tensor
    notes: Notes = field(default_factory=dict)


# (matrices with the same input, scheme, statistics) -> powers of two (I) to multiply their columns by beforehand
InputScales = Callable[[Sequence[Tensor], Scheme, Statistics], Tensor]


@dataclass(frozen=True, kw_only=True, slots=True)
class Quantizer:
    """One line of the table `QUANTIZERS`.

    `quantize(weight_OI, scheme, statistics, prepared, pattern)` gets the weight in the checkpoint's dtype. `pattern` is
    None, but for the methods that choose zeros in the same sweep, when that is asked.
    """

    name: str
    title: str
    paper: str
    needs: tuple[Need, ...]
    idea: str
    cost: str
    when: str
    quantize: Callable[[Tensor, Scheme, Statistics, Any, Pattern | None], Quantized]
    prepare: Callable[[Tensor], Any] | None = None
    input_scales: InputScales | None = None  # where what makes the inputs can take the inverse
    prunes: bool = False  # whether it can choose zeros in the same sweep


@torch.no_grad()
def prepare(method: Quantizer, statistics: Statistics) -> Any:
    """Shared work for all matrices with these statistics; None when the method has none."""
    return None if method.prepare is None else method.prepare(statistics.gram())


@torch.no_grad()
def quantize_matrix(
    method: Quantizer,
    weight_OI: Tensor,
    scheme: Scheme,
    statistics: Statistics,
    prepared: Any = None,
    pattern: Pattern | None = None,
) -> Quantized:
    """Quantize one matrix of a width that fits the scheme; all of its zeros stay.

    `prepared` comes from `prepare` with the same statistics, and is made here when it is left out.
    """
    assert weight_OI.ndim == 2
    assert scheme.fits(weight_OI.shape[1])
    assert pattern is None or method.prunes
    prepared = prepare(method, statistics) if prepared is None else prepared
    found = method.quantize(weight_OI, scheme, statistics, prepared, pattern)
    assert not bool(found.values_OI[weight_OI == 0].any()), f"{method.name} filled zeros in"
    return found
