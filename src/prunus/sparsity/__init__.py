"""Methods on one weight matrix, patterns, exact selection, allocation of sparsity. Pure functions.

To add a method: write one file with its formula, add one entry to METHODS, write one parity test.
"""

from prunus.sparsity.admm import AdmmOptions, prepare_admm, prune_admm
from prunus.sparsity.magnitude import prune_magnitude
from prunus.sparsity.methods import Method, PruneResult, Statistics, prepare, prune, reconstruction_error
from prunus.sparsity.patterns import NM, Compare, Pattern, Tile, Unstructured, parse_pattern
from prunus.sparsity.ria import RiaOptions, prune_ria
from prunus.sparsity.select import keep_highest
from prunus.sparsity.sparsegpt import SparseGptOptions, prepare_sparsegpt, prune_sparsegpt
from prunus.sparsity.wanda import prune_wanda

__all__ = [
    "METHODS",
    "NM",
    "AdmmOptions",
    "Compare",
    "Method",
    "Pattern",
    "PruneResult",
    "RiaOptions",
    "SparseGptOptions",
    "Statistics",
    "Tile",
    "Unstructured",
    "keep_highest",
    "parse_pattern",
    "prepare",
    "prune",
    "reconstruction_error",
]

_TABLE = (
    Method(
        name="magnitude",
        title="Magnitude",
        paper="Han et al. 2015, Learning both Weights and Connections, arXiv:1506.02626",
        needs=(),
        compare="matrix",
        updates=False,
        idea="Prune the weights nearest to zero.",
        cost="Seconds, no calibration.",
        when="As the baseline every method has to beat.",
        prune=prune_magnitude,
    ),
    Method(
        name="wanda",
        title="Wanda",
        paper="Sun et al. 2023, A Simple and Effective Pruning Approach for LLMs, arXiv:2306.11695",
        needs=("input_sq_norm",),
        compare="row",
        updates=False,
        idea="Rank weights by magnitude times the norm of their input, inside each output row.",
        cost="One calibration forward; one vector of memory per matrix.",
        when="When kept weights must not change, or memory and time are short; at most about 50%.",
        prune=prune_wanda,
    ),
    Method(
        name="ria",
        title="RIA",
        paper="Zhang et al. 2024, Plug-and-Play, ICLR 2024, OpenReview Tr0lPx9woF",
        needs=("input_sq_norm",),
        compare="matrix",
        updates=False,
        idea="Rank weights by their share of their row and column, times the root of the input norm.",
        cost="That of Wanda.",
        when="Instead of Wanda on models of 30 billion parameters and more.",
        prune=prune_ria,
        options=RiaOptions,
    ),
    Method(
        name="sparsegpt",
        title="SparseGPT",
        paper="Frantar & Alistarh 2023, SparseGPT, arXiv:2301.00774",
        needs=("gram",),
        compare="matrix",
        updates=True,
        idea="Prune column by column; the columns to the right make up for every weight that goes.",
        cost="One factorisation per Gram and a sweep over the columns; one I x I matrix of memory per input.",
        when="To compare with published figures; ADMM gives a lower error.",
        prune=prune_sparsegpt,
        prepare=prepare_sparsegpt,
        options=SparseGptOptions,
    ),
    Method(
        name="admm",
        title="ADMM",
        paper="Boza 2024, Fast and Effective Weight Update for Pruned LLMs, arXiv:2401.02938; ALPS, arXiv:2406.07831",
        needs=("gram",),
        compare="matrix",
        updates=True,
        idea="Find mask and remaining weights together with a growing penalty, then polish the weights that stay.",
        cost="Four inverses per Gram, 15 matrix products per matrix; seven I x I matrices of memory per input.",
        when="The default: the lowest error, for twice Wanda's time. Needs calibration text that resembles the use.",
        prune=prune_admm,
        prepare=prepare_admm,
        options=AdmmOptions,
    ),
)
METHODS: dict[str, Method] = {method.name: method for method in _TABLE}
