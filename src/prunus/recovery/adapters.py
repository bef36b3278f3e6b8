"""LoRA on a sparse model: the low-rank change is taken under the keep mask, in training as in the merged matrix.

    W_eff = W + keep * (alpha / rank) * B A          B (O, rank) starts at zero, A (rank, I) small and random

Hu et al. 2021, "LoRA", arXiv:2106.09685; the mask inside the product as in SQFT, Munoz et al. 2024, arXiv:2410.03750.
So what is trained is exactly what is merged, and the merged matrix has the zeros of the old one. Libraries add the
product beside a matrix, unmasked; merged, it fills the zeros in, and masked only then, it is not what was trained. The
price: the gradient of W_eff is computed where they avoid it; it is not kept.

A matrix is changed through `torch.nn.utils.parametrize`: any module and any stored layout, fused experts included.

Shapes: O = out_features, I = in_features as stored, E = experts.
"""

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from prunus.recovery.keep_masks import KeepMasks

A, B = "a", "b"


class MaskedDelta(nn.Module):
    """`forward(weight)` is the weight plus the masked low-rank change; leading axes (experts) have one change each."""

    keep: Tensor | None

    def __init__(
        self, weight: Tensor, keep: Tensor | None, rank: int, scale: float, generator: torch.Generator
    ) -> None:
        super().__init__()
        *experts, num_out, num_in = weight.shape
        a = torch.randn(*experts, rank, num_in, generator=generator) / num_in**0.5
        self.a = nn.Parameter(a.to(weight.device))
        self.b = nn.Parameter(torch.zeros(*experts, num_out, rank, device=weight.device))
        self.scale = scale
        self.register_buffer("keep", None if keep is None else keep.to(weight.device), persistent=False)

    def delta(self) -> Tensor:
        """Return the change, in the shape of the stored weight."""
        change = self.scale * (self.b @ self.a)
        return change if self.keep is None else change * self.keep

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.delta().to(weight.dtype)


def add_adapters(model: nn.Module, parameters: list[str], masks: KeepMasks, rank: int, alpha: float, seed: int) -> None:
    """Freeze the model and give the named parameters a trainable masked change each."""
    model.requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for name in parameters:
        owner, _, leaf = name.rpartition(".")
        weight = model.get_parameter(name)
        change = MaskedDelta(weight, masks.keep.get(name), rank, alpha / rank, generator)
        parametrize.register_parametrization(model.get_submodule(owner), leaf, change)


def without_adapters(name: str) -> str:
    """The name that a parameter has where there are no adapters."""
    return name.replace(".parametrizations.", ".").removesuffix(".original")


def merged(original: Tensor, keep: Tensor | None, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """Return the original matrix with the change taken in, in fp32."""
    change = scale * (b.float() @ a.float())
    return original.float() + (change if keep is None else change * keep)


def adapter_names(parameter: str) -> tuple[str, str]:
    """The names under which the model holds the two factors of a parameter's change."""
    owner, _, leaf = parameter.rpartition(".")
    return f"{owner}.parametrizations.{leaf}.0.{A}", f"{owner}.parametrizations.{leaf}.0.{B}"
