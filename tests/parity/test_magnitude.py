"""Magnitude against a loop: of all weights, the smallest absolute values go."""

import torch

from prunus.sparsity import METHODS, Statistics, Unstructured, prune


def test_prunes_the_smallest_absolute_values() -> None:
    weight_OI = torch.randn(6, 9, generator=torch.Generator().manual_seed(0))
    result = prune(METHODS["magnitude"], weight_OI, Statistics(), Unstructured(20 / 54))
    flat = weight_OI.flatten().tolist()
    lowest = sorted(range(54), key=lambda place: abs(flat[place]))[:20]
    expected = torch.tensor([0.0 if place in lowest else flat[place] for place in range(54)])
    assert torch.equal(result.weight_OI, expected.reshape(6, 9))
