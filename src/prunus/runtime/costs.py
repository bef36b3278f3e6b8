"""What products with packed matrices cost on this machine, from a few seconds of measuring: a rate for each pattern.

A product of one input takes `per_call` seconds and the bytes of its matrix over the rate of its pattern and type. Rates
are of weights that come from memory, medians of rounds in which everything is timed in turn.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import Self

import torch
from torch.nn.functional import linear

from prunus.runtime import TYPES, pack
from prunus.runtime.multiply import Multiplier
from prunus.runtime.timing import Pass, dense_products, in_turn, packed_as, products, random_matrix, reading

PATTERNS = ("0", "0.5", "0.6", "0.7", "0.8", "2:4", "tiles-0.5", "tiles-0.8")
TORCH, MEMORY = "torch bf16", "memory"
_BYTES = 160_000_000  # of a pass; all of them together are several times the last-level cache
_ROUNDS = 5
_CALLS = 200


@dataclass(frozen=True, slots=True)
class Costs:
    """`seconds_per_weight` of a matrix of (pattern, type), `bytes_per_weight` beside it, for one input.

    `memory` is the bandwidth of reading alone, bytes a second; `torch` what F.linear takes for a bfloat16 weight.
    """

    shape: tuple[int, int]
    seconds_per_weight: Mapping[tuple[str, str], float]
    bytes_per_weight: Mapping[tuple[str, str], float]
    per_call: float
    torch: float
    memory: float

    def corrected(self, factor: float) -> Self:
        """The same for memory in which our products take `factor` times as long."""
        seconds = {key: value * factor for key, value in self.seconds_per_weight.items()}
        return replace(self, seconds_per_weight=seconds, memory=self.memory / factor)


def measure_costs(shape: tuple[int, int], patterns: Sequence[str] = PATTERNS) -> Costs:
    """Time every pattern and type on a matrix (O, I) of this shape, at batch 1 and in bfloat16."""
    x_MI = torch.randn(1, shape[1], generator=torch.Generator().manual_seed(0)).bfloat16()
    made = {(pattern, kind): packed_as(pattern, TYPES[kind], *shape) for pattern in patterns for kind in TYPES}
    passes = {f"{pattern} {kind}": products(packed, x_MI, _BYTES) for (pattern, kind), packed in made.items()}
    torchs = dense_products(lambda one: linear(x_MI, one), random_matrix(*shape, "0"), _BYTES)
    passes |= {TORCH: torchs, MEMORY: reading(_BYTES)}
    seconds = {name: median(times) for name, times in in_turn(passes, _ROUNDS).items()}
    weights = shape[0] * shape[1]
    per_byte = {name: seconds[name] / passes[name].num_bytes for name in passes}
    return Costs(
        shape=shape,
        seconds_per_weight={key: per_byte[" ".join(key)] * made[key].num_bytes / weights for key in made},
        bytes_per_weight={key: packed.num_bytes / weights for key, packed in made.items()},
        per_call=_per_call(),
        torch=per_byte[TORCH] * torch.bfloat16.itemsize,
        memory=1 / per_byte[MEMORY],
    )


def _per_call() -> float:
    """Seconds of a product that has next to nothing to do."""
    packed = pack(random_matrix(16, 16, "0"), "dense", torch.bfloat16)
    assert packed is not None
    multiplier, x_MI = Multiplier(packed), torch.zeros(1, 16, dtype=torch.bfloat16)
    calls = Pass(lambda: [multiplier(x_MI) for _ in range(_CALLS)], 0)
    return median(in_turn({"calls": calls}, _ROUNDS)["calls"]) / _CALLS
