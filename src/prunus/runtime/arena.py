"""One piece of memory in large pages for all packed tensors of a model.

A matrix of a small model is smaller than a large page (2 MiB), so by itself it can have none, and finding where small
pages lie takes a good part of reading them once for each token: docs/log.md has the figures.
"""

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

_ALIGNED = 64  # bytes, a line of the caches


class Arena:
    """Room for copies of these tensors. It lives as long as any of them does."""

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        size = sum(_padded(tensor) for tensor in tensors)
        self._memory = np.empty(size + _ALIGNED, dtype=np.uint8)  # numpy asks for large pages before it is written
        self._used = -self._memory.ctypes.data % _ALIGNED

    def copy(self, tensor: Tensor) -> Tensor:
        """The same values, in a storage of its own that lies behind the one before."""
        if tensor.numel() == 0:
            return tensor.clone()
        start, self._used = self._used, self._used + _padded(tensor)
        flat = torch.frombuffer(self._memory, dtype=tensor.dtype, count=tensor.numel(), offset=start)
        return flat.view(tensor.shape).copy_(tensor)


def _padded(tensor: Tensor) -> int:
    return -(-tensor.numel() * tensor.element_size() // _ALIGNED) * _ALIGNED
