"""What a width score sees: the units of one coupled group, and the one door through which every score is called.

A unit goes or stays as a whole: a channel of the FFN, a KV group with its query heads, an expert's channel. All its
effect on the model passes through one matrix, its reader: `down` for channels, `o` for heads. So a score looks at the
reader and what is known of its inputs; some also look at the rows that produce those inputs.

Letters: O, I = out, in features of the reader; U = units; W = the reader's inputs that belong to one unit; R = runs.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from prunus.sparsity.methods import Statistics
from prunus.sparsity.select import keep_in_rows

WidthNeed: TypeAlias = Literal["input_sq_norm", "input_mean", "gram", "gate_gradient", "weight_gradient"]
FROM_THE_LOSS = frozenset({"gate_gradient", "weight_gradient"})  # needs that the pass over the blocks cannot meet


@dataclass(frozen=True, kw_only=True, slots=True)
class Units:
    """One coupled group, in fp32."""

    reader_OI: Tensor
    columns_UW: Tensor  # indices of the reader's inputs, unit by unit
    statistics: Statistics  # of the reader's inputs
    producers: tuple[Tensor, ...] = ()  # each (U, n): what else goes with a unit, flattened: rows, biases
    gate_gradient_NU: Tensor | None = None  # of each sequence: the loss's derivative by a factor on each unit
    weight_taylor_U: Tensor | None = None  # |weight x derivative of the loss by it|, summed over all weights of a unit
    runs: int = 1  # units fall into so many runs of equal length, each of which keeps as many

    @property
    def num_units(self) -> int:
        return len(self.columns_UW)

    def sum_of(self, values_I: Tensor) -> Tensor:
        """(U): the sum of a value of the reader's inputs over those of each unit."""
        return values_I[self.columns_UW].sum(1)

    def inputs(self, units_U: Tensor) -> Tensor:
        """Indices of the reader's inputs that belong to these units (a bool mask over all, or indices)."""
        return self.columns_UW[units_U].flatten()


@dataclass(frozen=True, slots=True)
class Choice:
    """Which units stay, and what each was worth (higher = keep)."""

    keep_U: Tensor
    score_U: Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class WidthScore:
    """One line of the table `WIDTH_SCORES`. Exactly one of `score` and `choose` is given.

    `score(units)` values every unit by itself; `choose(units, num_kept)` decides together which go.
    """

    name: str
    title: str
    paper: str
    needs: tuple[WidthNeed, ...]
    idea: str
    cost: str
    when: str
    score: Callable[[Units], Tensor] | None = None
    choose: Callable[[Units, int], Choice] | None = None


@torch.no_grad()
def choose_units(width_score: WidthScore, units: Units, num_kept: int) -> Choice:
    """Choose exactly `num_kept` units to stay, as many of each run; of equal scores the earlier unit stays."""
    assert 0 < num_kept <= units.num_units
    assert num_kept % units.runs == 0
    if width_score.choose is not None:
        choice = width_score.choose(units, num_kept)
    else:
        assert width_score.score is not None
        score_U = width_score.score(units)
        assert bool(score_U.isfinite().all()), f"{width_score.name} gave NaN or Inf"
        gone = (units.num_units - num_kept) // units.runs
        choice = Choice(keep_in_rows(score_U.view(units.runs, -1), gone).flatten(), score_U)
    kept_R = choice.keep_U.view(units.runs, -1).sum(1)
    assert bool((kept_R == num_kept // units.runs).all()), f"{width_score.name} missed {num_kept} units"
    return choice
