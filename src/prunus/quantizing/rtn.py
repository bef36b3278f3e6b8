"""Round to nearest: every weight goes to the nearest code, and nothing makes up for it.

    q_rc = clamp(round(w_rc / s_rg)),    w'_rc = q_rc * s_rg
Cost: one look at the weights (20 with a search for the scale). Needs no text.

Letters: O = out_features, I = in_features.
"""

from typing import Any

from torch import Tensor

from prunus.quantizing.methods import Quantized
from prunus.quantizing.schemes import Scheme
from prunus.sparsity.methods import Statistics
from prunus.sparsity.patterns import Pattern


def quantize_rtn(
    weight_OI: Tensor, scheme: Scheme, statistics: Statistics, prepared: Any, pattern: Pattern | None
) -> Quantized:
    """Scales from each row or group, then the nearest code."""
    scale_OG = scheme.scales(weight_OI.float(), weight_OI.dtype)
    return Quantized(scheme.quantized(weight_OI, scale_OG), scale_OG)
