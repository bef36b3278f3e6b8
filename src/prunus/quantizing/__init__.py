"""Quantization of one weight matrix: grids, schemes, methods that keep zeros. Pure functions.

To add a method: write one file with its formula, add one entry to QUANTIZERS, write one parity test. A scheme is one
entry of SCHEMES; a grid that is not there yet is one class in `grid.py`.
"""

from prunus.quantizing.awq import awq_scales
from prunus.quantizing.gptq import prepare_gptq, quantize_gptq
from prunus.quantizing.grid import Float8Grid, IntGrid
from prunus.quantizing.methods import Quantized, Quantizer, prepare, quantize_matrix
from prunus.quantizing.packing import pack, unpack
from prunus.quantizing.rtn import quantize_rtn
from prunus.quantizing.schemes import Scheme

__all__ = [
    "QUANTIZERS",
    "SCHEMES",
    "Quantized",
    "Quantizer",
    "Scheme",
    "pack",
    "prepare",
    "quantize_matrix",
    "unpack",
]

_SCHEMES = (
    Scheme(
        name="int8",
        title="int8 weights",
        grid=IntGrid(8),
        bits=8,
        group=None,
        rounds_inputs=False,
        searches=False,
        storage="pack-quantized",
        loads_in="transformers; not vLLM on a CPU",
        when="Half the bytes of bfloat16 at almost no cost in quality.",
    ),
    Scheme(
        name="w8a8",
        title="int8 weights and inputs",
        grid=IntGrid(8),
        bits=8,
        group=None,
        rounds_inputs=True,
        searches=False,
        storage="int-quantized",
        loads_in="transformers, vLLM",
        when="As int8, where the engine multiplies in int8: prefill and large batches.",
    ),
    Scheme(
        name="int4-g128",
        title="int4 weights, groups of 128",
        grid=IntGrid(4),
        bits=4,
        group=128,
        rounds_inputs=False,
        searches=True,
        storage="pack-quantized",
        loads_in="transformers, vLLM",
        when="The fewest bytes; for large models whose widths are multiples of 128.",
    ),
    Scheme(
        name="int4-g32",
        title="int4 weights, groups of 32",
        grid=IntGrid(4),
        bits=4,
        group=32,
        rounds_inputs=False,
        searches=True,
        storage="pack-quantized",
        loads_in="transformers, vLLM",
        when="4-bit for small models and for widths that are no multiples of 128.",
    ),
    Scheme(
        name="fp8",
        title="fp8 (e4m3) weights and inputs",
        grid=Float8Grid(),
        bits=8,
        group=None,
        rounds_inputs=True,
        searches=False,
        storage="float-quantized",
        loads_in="transformers, vLLM",
        when="As w8a8, on GPUs with fp8 (from Ada and Hopper on).",
    ),
)
_QUANTIZERS = (
    Quantizer(
        name="rtn",
        title="Round to nearest",
        paper="-",
        needs=(),
        idea="Every weight goes to the nearest code of its row or group.",
        cost="No calibration. Seconds in 8 bits, minutes where scales are searched.",
        when="For 8 bits: the default.",
        quantize=quantize_rtn,
    ),
    Quantizer(
        name="gptq",
        title="GPTQ",
        paper="Frantar et al. 2022, GPTQ, arXiv:2210.17323",
        needs=("gram",),
        idea="Round column by column; the columns to the right make up for every rounding. Zeros stay zeros.",
        cost="That of SparseGPT: one factorisation per Gram and a sweep over the columns.",
        when="For 4 bits, and to prune and quantize in one sweep (--joint).",
        quantize=quantize_gptq,
        prepare=prepare_gptq,
        prunes=True,
    ),
    Quantizer(
        name="awq",
        title="AWQ",
        paper="Lin et al. 2023, AWQ, arXiv:2306.00978",
        needs=("gram",),
        idea="Weights of large inputs are stored larger, what makes these inputs smaller; then to nearest.",
        cost="One factor search for each input: 20 roundings and products with the Gram.",
        when="For 4 bits: closer to the dense model than GPTQ where it was measured, and chooses no zeros.",
        quantize=quantize_rtn,
        input_scales=awq_scales,
    ),
)
SCHEMES: dict[str, Scheme] = {scheme.name: scheme for scheme in _SCHEMES}
QUANTIZERS: dict[str, Quantizer] = {method.name: method for method in _QUANTIZERS}
