"""What a pruning method is, and the one door through which every method is called: score, select, apply.

A method is a file with a `prune` function on one weight matrix and a line in `METHODS` (in `__init__`).
Everything inside runs in fp32 on the weight's device; the caller's weight is never touched.

Letters: O = out_features, I = in_features.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from prunus.errors import UserError
from prunus.sparsity.patterns import Compare, Pattern, Unstructured

Need: TypeAlias = Literal["input_sq_norm", "gram"]
Notes: TypeAlias = dict[str, float]


@dataclass(frozen=True, slots=True)
class Statistics:
    """What calibration measured on the inputs x of one matrix, fp32, as means over `num_tokens` tokens.

    `input_sq_norm_I` is the mean of x_i ** 2, `gram_II` the mean of x x^T; its diagonal is `input_sq_norm_I`.
    `input_mean_I` is the mean of x.
    """

    num_tokens: int = 0
    input_sq_norm_I: Tensor | None = None
    gram_II: Tensor | None = None
    input_mean_I: Tensor | None = None

    @classmethod
    def of_nothing(cls, width: int, device: torch.device) -> "Statistics":
        """For a matrix that no token met (an expert): as if its inputs were alike and independent.

        Zeros would let the position of a weight decide.
        """
        ones_I = torch.ones(width, device=device)
        return cls(0, ones_I, ones_I.diag(), torch.zeros(width, device=device))

    def sq_norm(self) -> Tensor:
        """Mean squared inputs, from whichever statistic was collected."""
        if self.input_sq_norm_I is not None:
            return self.input_sq_norm_I.float()
        return self.gram().diagonal()

    def gram(self) -> Tensor:
        """The Gram matrix; the method that asks must have declared it in `needs`."""
        assert self.gram_II is not None, "the Gram matrix was not collected"
        return self.gram_II.float()

    def mean(self) -> Tensor:
        """Mean inputs; who asks must have declared it."""
        assert self.input_mean_I is not None, "the mean was not collected"
        return self.input_mean_I.float()


@dataclass(frozen=True, slots=True)
class PruneResult:
    """New weight (the caller's dtype, exact zeros), what was kept (True = stays), and facts such as damping used."""

    weight_OI: Tensor
    keep_OI: Tensor
    notes: Notes = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class NoOptions:
    """For methods without settings."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Method:
    """One line of the table `METHODS`: what a reader and the block pass need to know.

    `prune(weight_OI, statistics, pattern, options, prepared)` gets an fp32 weight that it may not change in place.
    `prepare(gram_II, options)` does the work that matrices with the same input share, such as a factorisation.
    """

    name: str
    title: str
    paper: str
    needs: tuple[Need, ...]
    compare: Compare  # comparison group where the pattern leaves it open
    updates: bool  # True: kept weights change too
    idea: str
    cost: str
    when: str
    prune: Callable[[Tensor, Statistics, Pattern, Any, Any], PruneResult]
    prepare: Callable[[Tensor, Any], Any] | None = None
    options: type[Any] = NoOptions

    def resolve(self, pattern: Pattern) -> Pattern:
        """The pattern with this method's comparison group where none was asked."""
        if isinstance(pattern, Unstructured) and pattern.compare is None:
            return replace(pattern, compare=self.compare)
        return pattern


@torch.no_grad()
def prepare(method: Method, statistics: Statistics, options: object = None) -> Any:
    """Shared work for all matrices with these statistics; None when the method has none."""
    if method.prepare is None:
        return None
    return method.prepare(statistics.gram(), options or method.options())


@torch.no_grad()
def prune(
    method: Method,
    weight_OI: Tensor,
    statistics: Statistics,
    pattern: Pattern,
    options: object = None,
    prepared: Any = None,
) -> PruneResult:
    """Prune one matrix. The result satisfies the resolved pattern exactly and has the weight's dtype.

    `prepared` comes from `prepare` with the same statistics and options, and is made here when it is left out.
    Raises UserError when the pattern does not fit the matrix.
    """
    assert weight_OI.ndim == 2
    options = options or method.options()
    resolved = method.resolve(pattern)
    resolved.check((weight_OI.shape[0], weight_OI.shape[1]), "the matrix")
    prepared = prepare(method, statistics, options) if prepared is None else prepared
    found = method.prune(weight_OI.float(), statistics, resolved, options, prepared)
    assert resolved.satisfied_by(found.keep_OI), f"{method.name} missed {resolved}"
    values_OI = found.weight_OI.to(weight_OI.dtype) if method.updates else weight_OI
    return PruneResult(values_OI.where(found.keep_OI, torch.zeros_like(values_OI)), found.keep_OI, found.notes)


def reconstruction_error(weight_OI: Tensor, pruned_OI: Tensor, statistics: Statistics) -> float:
    """Relative squared output error ||X (W - W')^T||^2 / ||X W^T||^2 on the calibration inputs.

    Exact, tr(D G D^T) / tr(W G W^T), with a Gram matrix; with norms only it is the diagonal approximation, which
    leaves out correlated inputs; with neither it is the relative squared change of the weights.
    """
    difference_OI = weight_OI.float() - pruned_OI.float()
    before = output_energy(weight_OI.float(), statistics)
    return output_energy(difference_OI, statistics) / before if before else 0.0


def output_energy(weight_OI: Tensor, statistics: Statistics) -> float:
    """The mean squared norm of the outputs, as exactly as the statistics tell; of the weights, where there are none."""
    if statistics.gram_II is not None:
        return float(((weight_OI @ statistics.gram()) * weight_OI).sum())
    if statistics.input_sq_norm_I is not None:
        return float((weight_OI.square() @ statistics.sq_norm()).sum())
    return float(weight_OI.square().sum())


def make_options(kind: type[Any], values: Mapping[str, Any]) -> Any:
    """Build a method's options, all of them numbers. Raises UserError naming the ones there are."""
    known = {field.name: field.default for field in fields(kind)}
    for key, value in values.items():
        if key not in known:
            allowed = ", ".join(known) or "none"
            raise UserError(f"unknown option {key!r}; this method's options are: {allowed}.")
        if not _is_number(value, whole=isinstance(known[key], int)):
            number = "a whole number" if isinstance(known[key], int) else "a number"
            raise UserError(f"option {key}={value!r} is not {number}; the default is {known[key]}.")
    return kind(**values)


def _is_number(value: Any, *, whole: bool) -> bool:
    if isinstance(value, bool) or not isinstance(value, int if whole else int | float):
        return False
    return math.isfinite(value)
