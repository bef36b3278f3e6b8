"""What a product with a packed matrix costs on this machine, when its weights come from memory and not from a cache.

A model's weights are read once for each token and are too many to stay in a cache between two tokens. So a matrix is
timed through copies of it, one after another, that are together larger than any cache; and since memory is not equally
fast from one second to the next, whatever is compared is timed in turn, a round at a time, after a while of running.
"""

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from math import gcd

import torch
from torch import Tensor

from prunus.runtime import Packed, pack
from prunus.runtime.arena import Arena
from prunus.runtime.layout import starts
from prunus.runtime.multiply import Multiplier, multiply_together
from prunus.runtime.native import kernels
from prunus.runtime.packed import STRIP

UNCOUNTED = 1.0
"""Seconds that passes run before one counts. Memory can be slow at first: on an AMD EPYC (Zen 4) two threads read 36
GB/s for up to 0.6 s after a pause and 55 from then on."""

_DIFFERENT_ROWS = 256
_START = "weight_start"

Timed = Callable[[], object]


@dataclass(frozen=True, slots=True)
class Pass:
    """What is timed: `run` reads `num_bytes` of weights from memory, those of `count` matrices.

    `again`: it runs once before, untimed, since it would follow on itself: what other passes leave in the caches is not
    what it finds then.
    """

    run: Timed
    num_bytes: int
    count: int = 1
    again: bool = False

    def seconds(self) -> float:
        """How long it takes, once."""
        if self.again:
            self.run()
        start = time.perf_counter()
        self.run()
        return time.perf_counter() - start


def products(packed: Packed, x_MI: Tensor, at_least: int) -> Pass:
    """Products of the same inputs with as many copies of a matrix as take `at_least` bytes, in one call."""
    count = max(1, -(-at_least // packed.num_bytes))
    multipliers = [Multiplier(one) for one in _copies(packed, count)]
    return Pass(lambda: multiply_together(multipliers, x_MI), count * packed.num_bytes, count)


def _copies(packed: Packed, count: int) -> Iterator[Packed]:
    """The same matrix elsewhere in memory, which is such as a model's weights have."""
    scales = [] if packed.scale_O is None else [packed.scale_O]
    arena = Arena([*packed.parts.values(), *scales] * count)
    for _ in range(count):
        parts = {name: arena.copy(part) for name, part in packed.parts.items()}
        yield replace(packed, parts=parts, scale_O=arena.copy(scales[0]) if scales else None)


def dense_products(multiply: Callable[[Tensor], Tensor], weight_OI: Tensor, at_least: int) -> Pass:
    """The same of torch's own product with a dense matrix, whatever `multiply` makes it by."""
    size = weight_OI.numel() * weight_OI.itemsize
    copies = [weight_OI.clone() for _ in range(-(-at_least // size))]
    return Pass(lambda: [multiply(one) for one in copies], len(copies) * size, len(copies))


def reading(num_bytes: int) -> Pass:
    """Memory that is read and nothing else: the ceiling of every other pass. Raises where there are no kernels."""
    native, memory = kernels(), torch.ones(num_bytes // 8, dtype=torch.int64)
    assert native is not None, "the ceiling is measured by the native library"
    native.use_huge_pages(memory)
    return Pass(lambda: native.read(memory), num_bytes)


def in_turn(passes: Mapping[str, Pass], rounds: int) -> dict[str, list[float]]:
    """Seconds of each pass in each round, after some that are not counted; every other round runs backwards."""
    begin = time.perf_counter()
    _round(passes)
    while time.perf_counter() - begin < UNCOUNTED:
        _round(passes)
    counted = [_round(passes, -1 if each % 2 else 1) for each in range(rounds)]
    return {name: [seconds[name] for seconds in counted] for name in passes}


def _round(passes: Mapping[str, Pass], order: int = 1) -> dict[str, float]:
    return {name: passes[name].seconds() for name in list(passes)[::order]}


def random_matrix(rows: int, columns: int, pattern: str, seed: int = 0) -> Tensor:
    """Normal weights with zeros as a pattern wants them: "0.5" anywhere, "2:4", "tiles-0.5" in tiles of 16 x 16."""
    generator = torch.Generator().manual_seed(seed)
    weight_OI = torch.randn(rows, columns, generator=generator).bfloat16()
    return weight_OI * _kept(rows, columns, pattern, generator)


def _kept(rows: int, columns: int, pattern: str, generator: torch.Generator) -> Tensor:
    if pattern == "2:4":
        scores = torch.rand(rows, columns // 4, 4, generator=generator)
        return (scores.argsort(-1).argsort(-1) < 2).view(rows, columns)
    if pattern.startswith("tiles-"):
        tiles = torch.rand(-(-rows // 16), -(-columns // 16), generator=generator) >= float(
            pattern.removeprefix("tiles-")
        )
        return tiles.repeat_interleave(16, 0)[:rows].repeat_interleave(16, 1)[:, :columns]
    return torch.rand(rows, columns, generator=generator) >= float(pattern)


def packed_as(pattern: str, dtype: torch.dtype, rows: int, columns: int) -> Packed:
    """A random matrix with a pattern, in the layout made for it. Its rows repeat, as packing them takes its time."""
    layout = {"2:4": "2:4", "0": "dense"}.get(pattern, "tiles" if pattern.startswith("tiles-") else "bitmask")
    few = gcd(rows, _DIFFERENT_ROWS)
    times = rows // few if few % STRIP == 0 else 1
    packed = pack(random_matrix(rows // times, columns, pattern), layout, dtype)
    assert packed is not None
    return _repeated(packed, times)


def _repeated(packed: Packed, times: int) -> Packed:
    """A matrix `times` below itself, which is whole strips."""
    parts = {name: torch.cat([part] * times) for name, part in packed.parts.items() if name != _START}
    if _START in packed.parts:
        parts[_START] = starts(packed.parts[_START].diff().repeat(times))
    scale_O = None if packed.scale_O is None else packed.scale_O.repeat(times)
    return replace(packed, rows=packed.rows * times, parts=parts, scale_O=scale_O)
