"""What packing a model would gain on this machine, before anything is pruned: `prunus profile --engine sparse-cpu`.

A decoded token takes the products of all matrices, at the rates that a micro-benchmark finds for each pattern and type,
and everything else that the model does for a token. The latter is timed with the model itself, its weights random and
half of them zeros, less the products in it. What these products take, beside what the micro-benchmark makes of them,
corrects its rates: memory is not equally fast wherever a machine puts it.
"""

import copy
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from prunus.errors import UserError
from prunus.exporting.sparse_directory import Packer, Source
from prunus.machine_choice import half_of_free_memory
from prunus.models import StreamedModel
from prunus.models.skeleton import build_on_meta, restore_buffers
from prunus.progress import progress
from prunus.runtime import TYPES
from prunus.runtime.costs import PATTERNS, Costs, measure_costs
from prunus.runtime.linear import PackedLinear, gather, optimize_decoding
from prunus.runtime.native import kernels
from prunus.runtime.timing import packed_as

ADVISES = "sparse-cpu"
LLAMA_CPP_SHARE = 0.8  # of the bandwidth, as it reaches at best: docs/sparse-cpu.md has a machine where it was 0.4
BITS_OF_4 = 4.5  # Q4_0: 32 weights of 4 bits and a scale of 16
_PROMPT, _TOKENS = 128, 32
_LEAST = 512
_STAND_IN = "0.5"  # the pattern of the model that is timed, in bfloat16


@dataclass(frozen=True, slots=True)
class Products:
    """The products of one token: weights in the blocks' matrices, how many matrices, weights of the head.

    `tied`: the head is the embedding, which bfloat16 leaves to torch.
    """

    inside: int
    matrices: int
    head: int
    tied: bool

    @property
    def weights(self) -> int:
        return self.inside + self.head


@dataclass(frozen=True, slots=True)
class Token:
    """Seconds of one: its products, and everything else, by our kernels and by torch."""

    products: float
    outside: float
    outside_by_torch: float


def advise(model: StreamedModel) -> dict[str, Any]:
    """Predicted decode speed (batch 1, bfloat16) of every pattern and type on this machine, and what it says.

    Raises UserError where prunus was installed without kernels, or nothing of the model can be packed.
    """
    native = kernels()
    if native is None:
        raise UserError("the kernels of packed models are not built here; install a C++ compiler, then prunus again.")
    *blocks, head = Packer(model, "int8").sources  # which has a head of its own, tied or not
    if not blocks:
        raise UserError(f"{model.checkpoint.path} has no matrix that could be packed: all of them are experts.")
    with progress("Micro-benchmark", 2) as advance:
        costs = measure_costs(_typical(blocks))
        advance(1, "the rest of a token")
        token = _token(model, [*blocks, head])
        advance(1)
    products = Products(sum(map(_weights, blocks)), len(blocks), _weights(head), tied=model.spec.head is None)
    measured, costs = costs, costs.corrected(token.products / _stand_in_products(products, costs))
    rows = [_row(products, costs, token.outside, pattern, kind) for kind in TYPES for pattern in PATTERNS]
    four_bits = _four_bits(products, costs)
    return {
        "engine": ADVISES,
        "level": native.level,
        "threads": torch.get_num_threads(),
        "bandwidth_gigabytes_per_second": measured.memory / 1e9,
        "measured_on": list(costs.shape),
        "seconds_outside_products": token.outside,
        "rows": [_in_transformers(products, costs, token.outside_by_torch), four_bits, *rows],
        "says": _verdicts(rows, four_bits),
    }


def _weights(source: Source) -> int:
    return source.linear.shape[0] * source.linear.shape[1]


def _typical(sources: Sequence[Source]) -> tuple[int, int]:
    """The shape that most weights have; not so small that copies of it are many and mostly calls."""
    shapes = Counter(source.linear.shape for source in sources)
    rows, columns = max(shapes, key=lambda shape: shape[0] * shape[1] * shapes[shape])
    return max(rows, _LEAST), max(columns, _LEAST)


def _stand_in_products(products: Products, costs: Costs) -> float:
    """What the micro-benchmark makes of the products that `_token` times."""
    return products.weights * costs.seconds_per_weight[_STAND_IN, "bf16"] + (products.matrices + 1) * costs.per_call


def _row(products: Products, costs: Costs, outside: float, pattern: str, kind: str) -> dict[str, Any]:
    """The blocks in the pattern, the head dense in the type."""
    stays = products.tied and kind == "bf16"
    seconds = products.inside * costs.seconds_per_weight[pattern, kind] + products.matrices * costs.per_call + outside
    seconds += products.head * (costs.torch if stays else costs.seconds_per_weight["0", kind])
    size = products.inside * costs.bytes_per_weight[pattern, kind] + products.head * costs.bytes_per_weight["0", kind]
    return _told(f"sparse:{kind}", pattern, seconds, size)


def _told(name: str, pattern: str, seconds: float, size: float) -> dict[str, Any]:
    return {"as": name, "pattern": pattern, "tokens_per_second": 1 / seconds, "seconds": seconds, "bytes": int(size)}


def _in_transformers(products: Products, costs: Costs, outside: float) -> dict[str, Any]:
    """What the dense model does today."""
    weights = products.weights
    return _told("transformers bf16", "0", weights * costs.torch + outside, weights * torch.bfloat16.itemsize)


def _four_bits(products: Products, costs: Costs) -> dict[str, Any]:
    """What the dense model could do in llama.cpp, by its bytes."""
    size = products.weights * BITS_OF_4 / 8
    return _told("gguf:q4_0 (at best)", "0", size / (costs.memory * LLAMA_CPP_SHARE), size)


def _verdicts(rows: Iterable[dict[str, Any]], four_bits: dict[str, Any]) -> list[str]:
    """One sentence for each sparse row that something dense beats, or that beats everything dense."""
    rows = list(rows)
    dense = [four_bits, *(row for row in rows if row["pattern"] == "0")]
    return [_verdict(row, dense) for row in rows if row["pattern"] != "0"]


def _verdict(row: dict[str, Any], dense: list[dict[str, Any]]) -> str:
    name = f"{row['pattern']} as {row['as']}"
    better = [one["as"] for one in dense if one["bytes"] <= row["bytes"] and one["seconds"] <= row["seconds"]]
    if better:
        return f"{name}: dense {better[0]} is smaller and faster; do not prune for speed here."
    smaller = [one["as"] for one in dense if one["bytes"] <= row["bytes"]]
    faster = [one["as"] for one in dense if one["seconds"] <= row["seconds"]]
    if not smaller and not faster:
        return f"{name}: smaller and faster than every dense one."
    beaten = [
        f"dense {', '.join(names)} is {how}" for names, how in ((smaller, "smaller"), (faster, "faster")) if names
    ]
    return f"{name}: {'; '.join(beaten)}."


@torch.inference_mode()
def _token(model: StreamedModel, sources: Sequence[Source]) -> Token:
    """Of a stand-in for the model, all of whose matrices are packed.

    Every layer's matrices lie apart in memory, as they will: the weights that a token reads drive everything else out
    of the caches, and Python's own work then takes twice as long. A token and its products are timed in turn, and the
    first half of the tokens is not counted: memory can be slow at first (runtime/timing.py).
    """
    module, packed = _stand_in(model, sources)
    ours = module.config._attn_implementation
    read = module(input_ids=torch.zeros(1, _PROMPT, dtype=torch.int64), use_cache=True).past_key_values
    products: list[float] = []
    outside = {}
    for attention in (ours, "sdpa"):
        module.set_attn_implementation(attention)
        cache = copy.deepcopy(read)
        pairs = [(_seconds_of_token(module, cache), seconds_of(packed)) for _ in range(_TOKENS)][_TOKENS // 2 :]
        products += [inside for _, inside in pairs]
        outside[attention] = max(median(whole - inside for whole, inside in pairs), 0.0)
    return Token(median(products), outside[ours], outside["sdpa"])


def _seconds_of_token(module: nn.Module, cache: Any) -> float:
    """Of one decoded token, which the cache then holds."""
    start = time.perf_counter()
    logits_11V = module(input_ids=torch.zeros(1, 1, dtype=torch.int64), past_key_values=cache, use_cache=True).logits
    logits_11V.argmax(-1)
    return time.perf_counter() - start


def seconds_of(modules: Sequence[PackedLinear]) -> float:
    """Seconds of the products of one token, one after another and nothing between them."""
    inputs = {one.in_features: torch.zeros(1, one.in_features, dtype=torch.bfloat16) for one in modules}
    start = time.perf_counter()
    for one in modules:
        one.multiply(inputs[one.in_features])
    return time.perf_counter() - start


def _stand_in(model: StreamedModel, sources: Sequence[Source]) -> tuple[Any, list[PackedLinear]]:
    """The module, and its packed matrices: each has memory of its own where half of what is free is enough."""
    module = build_on_meta(model.config, dtype=torch.bfloat16, trust_remote_code=model.checkpoint.trust_remote_code)
    restore_buffers(module)
    made = {
        shape: packed_as(_STAND_IN, torch.bfloat16, *shape) for shape in {source.linear.shape for source in sources}
    }
    packed = [PackedLinear.holding(made[source.linear.shape]) for source in sources]
    for source, one in zip(sources, packed, strict=True):
        module.set_submodule(source.module, one)
    if sum(one.packed.num_bytes for one in packed) < half_of_free_memory():
        gather(module)
    _fill(module)
    optimize_decoding(module)
    return module, packed


def _fill(module: nn.Module) -> None:
    """Every parameter without memory gets one, the same for all of one shape: next to no time goes there."""
    shared: dict[tuple[int, ...], Tensor] = {}
    for owner in module.modules():
        for name, parameter in owner.named_parameters(recurse=False):
            if parameter.is_meta:
                tensor = shared.setdefault(tuple(parameter.shape), torch.zeros(parameter.shape, dtype=torch.bfloat16))
                setattr(owner, name, nn.Parameter(tensor, requires_grad=False))
