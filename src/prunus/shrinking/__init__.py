"""Smaller shapes: which units of a coupled group are worth least, and how the rest makes up for them. Pure functions.

To add a score: write one file with its formula, add one entry to the table, write one parity test.
"""

from prunus.shrinking.activation import activation
from prunus.shrinking.flap import flap
from prunus.shrinking.layer_scores import LAYER_SCORES, LayerScore
from prunus.shrinking.magnitude import magnitude_l1, magnitude_l2
from prunus.shrinking.second_order import remove_cheapest
from prunus.shrinking.taylor import fisher, taylor, taylor_element
from prunus.shrinking.units import Choice, Units, WidthScore, choose_units

__all__ = ["LAYER_SCORES", "WIDTH_SCORES", "Choice", "LayerScore", "Units", "WidthScore", "choose_units"]

_TABLE = (
    WidthScore(
        name="second-order",
        title="Second-order",
        paper="Kurtic et al. 2023, ZipLM, arXiv:2302.04089; Ling et al. 2024, SlimGPT, arXiv:2412.18110",
        needs=("gram",),
        idea="Remove, round by round, the units that the others can make up for best.",
        cost="One calibration forward; one I x I inverse per block and a sweep over it.",
        when="The default: the lowest error on text like the calibration text.",
        choose=remove_cheapest,
    ),
    WidthScore(
        name="flap",
        title="FLAP",
        paper="An et al. 2023, Fluctuation-based Adaptive Structured Pruning, arXiv:2312.11983",
        needs=("input_sq_norm", "input_mean"),
        idea="Remove units whose output hardly changes from token to token.",
        cost="One calibration forward; two vectors per block.",
        when="When the kept weights must not change and the architecture has biases to take the mean.",
        score=flap,
    ),
    WidthScore(
        name="activation",
        title="Activation magnitude",
        paper="Muralidharan et al. 2024, Minitron, arXiv:2407.14679",
        needs=("input_sq_norm",),
        idea="Remove units with the smallest outputs.",
        cost="One calibration forward; one vector per block.",
        when="Before long recovery training, where the score matters little.",
        score=activation,
    ),
    WidthScore(
        name="taylor",
        title="Taylor",
        paper="Ma et al. 2023, LLM-Pruner, arXiv:2305.11627, equation 3, vector-wise",
        needs=("gate_gradient",),
        idea="Remove units whose removal changes the loss least, to first order.",
        cost="A forward and a backward pass of the whole model, which is loaded for it.",
        when="To compare with LLM-Pruner.",
        score=taylor,
    ),
    WidthScore(
        name="taylor-element",
        title="Taylor, by element",
        paper="Ma et al. 2023, LLM-Pruner, arXiv:2305.11627, equation 4, element-wise, its first-order term",
        needs=("weight_gradient",),
        idea="Remove units whose weights, taken one by one, matter least to the loss, to first order.",
        cost="That of Taylor, and the gradients in fp32 of all weights that could go.",
        when="To compare with LLM-Pruner.",
        score=taylor_element,
    ),
    WidthScore(
        name="fisher",
        title="Fisher",
        paper="Ma et al. 2023, LLM-Pruner, arXiv:2305.11627, equation 4; Molchanov et al. 2019, arXiv:1906.10771",
        needs=("gate_gradient",),
        idea="Remove units with the smallest squared derivative of the loss.",
        cost="That of Taylor.",
        when="Where the loss on the text matters more than the output of each block.",
        score=fisher,
    ),
    WidthScore(
        name="magnitude",
        title="Magnitude (L2)",
        paper="Li et al. 2016, Pruning Filters for Efficient ConvNets, arXiv:1608.08710",
        needs=(),
        idea="Remove units with the smallest weights.",
        cost="Seconds, no calibration with --no-refit.",
        when="As the baseline every score has to beat.",
        score=magnitude_l2,
    ),
    WidthScore(
        name="magnitude-l1",
        title="Magnitude (L1)",
        paper="Li et al. 2016, Pruning Filters for Efficient ConvNets, arXiv:1608.08710",
        needs=(),
        idea="As magnitude, with absolute values.",
        cost="That of magnitude.",
        when="To compare with published figures.",
        score=magnitude_l1,
    ),
)
WIDTH_SCORES: dict[str, WidthScore] = {score.name: score for score in _TABLE}
