"""Taylor+ of layers: remove the layers whose weights, set to zero one by one, would change the loss least.

Kim et al. 2024, "Shortened LLaMA: Depth Pruning for Large Language Models with Comparison of Retraining Methods",
arXiv:2402.02834. With L(D) the loss of the next token over all of the text D, and W the matrices of layer n:
    I_n = sum_W sum_o sum_i | dL(D)/dW_oi  W_oi |
the first-order change of the loss by each weight, summed over the inputs i of an output neuron o, its neurons, and all
matrices of the layer. The "+": the first four and the last two layers are never candidates, whatever their sum.
The gradient is that of the whole text, so its sum over sequences comes before the absolute value, as in the authors'
code, which takes one batch of 10 x 128 tokens.
Cost: two forward passes and one backward pass of the text that judges, one layer in memory at a time with the sum of
its gradients in fp32; hidden states of that text in front of every layer on disk.
Versus the authors: they load the whole model with all its gradients, and their code adds the weights of norms, which
are no matrices.

Shapes: O, I = out, in features, of any storage order.
"""

from torch import Tensor

PROTECTED_FIRST, PROTECTED_LAST = 4, 2  # the paper's "+"


def taylor_sum(weight_OI: Tensor, gradient_OI: Tensor) -> float:
    """The summed change of the loss, to first order, by each weight of a matrix."""
    return float((weight_OI.float() * gradient_OI.float()).abs().sum())
