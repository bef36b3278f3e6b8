"""Which dimensions of the residual stream matter: how large they are after normalisation, over all blocks.

Muralidharan et al. 2024, Minitron, arXiv:2407.14679, equation 3 (embedding channels): the activation magnitude of a
dimension at every norm of the model, summed over norms. Differs from the paper: the value before the norm's weight,
|x_i| / rms(x), so that nothing but the hidden states between blocks is needed; the mean of absolute values over tokens.

Letters: T = tokens, H = hidden.
"""

import torch
from torch import Tensor


def normalised_magnitude(hidden_TH: Tensor) -> Tensor:
    """(H): the mean over tokens of |x_i| / rms(x), fp32."""
    hidden_TH = hidden_TH.float()
    rms_T1 = hidden_TH.square().mean(1, keepdim=True).sqrt()
    smallest = torch.finfo(torch.float32).tiny
    return (hidden_TH.abs() / rms_T1.clamp_min(smallest)).mean(0)
