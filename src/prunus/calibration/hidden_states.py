"""The hidden states of all calibration sequences between two blocks: in memory, or in a memory-mapped file.

Shapes: N = sequences, T = tokens, H = hidden.
"""

import mmap
import os
import tempfile
import zlib
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from prunus.checkpoint.output import full_disk_is_an_error
from prunus.machine_choice import half_of_free_memory

CHUNK_BYTES = 1 << 24


class HiddenStates:
    """An (N, T, H) tensor that the block pass reads one sequence at a time.

    With `path` it is a mapping of that file, which outlives the process: what an interrupted pass goes on from. The
    system keeps as much of it in memory as there is room for.
    """

    def __init__(self, shape: tuple[int, int, int], dtype: torch.dtype, path: Path | None = None) -> None:
        self._map: mmap.mmap | None = None
        if path is None:
            self.states_NTH = torch.empty(shape, dtype=dtype)
            return
        num_elements = shape[0] * shape[1] * shape[2]
        with path.open("ab") as file:  # reserve the space now: a full disk is an error here, not a crash later
            os.posix_fallocate(file.fileno(), 0, max(num_elements * dtype.itemsize, 1))
        with path.open("r+b") as file:
            self._map = mmap.mmap(file.fileno(), num_elements * dtype.itemsize)
        self.states_NTH = torch.frombuffer(self._map, dtype=dtype).view(shape)

    @classmethod
    def scratch(cls, shape: tuple[int, int, int], dtype: torch.dtype, max_memory: int | None = None) -> Self:
        """In memory; past `max_memory` bytes (None: half of what is free) in a temporary file without a name."""
        if shape[0] * shape[1] * shape[2] * dtype.itemsize <= (max_memory or half_of_free_memory()):
            return cls(shape, dtype)
        with (
            full_disk_is_an_error(Path(tempfile.gettempdir())),
            tempfile.NamedTemporaryFile(prefix="prunus-hidden-") as file,  # unlinked at once, mapped until let go
        ):
            return cls(shape, dtype, Path(file.name))

    def __getitem__(self, index: int) -> Tensor:
        """Return sequence `index` as (1, T, H), a view."""
        return self.states_NTH[index : index + 1]

    def __setitem__(self, index: int, hidden_1TH: Tensor) -> None:
        self.states_NTH[index].copy_(hidden_1TH[0])

    def release(self) -> None:
        """Let go of the mapped pages, which count as this process's memory; their content stays with the file."""
        if self._map is not None:
            self._map.madvise(mmap.MADV_DONTNEED)

    def checksum(self) -> int:
        """CRC-32 of the content: tells whether a file still holds what was written before an interruption."""
        flat: Any = self.states_NTH.view(-1).view(torch.uint8).numpy()
        crc = 0
        for start in range(0, flat.size, CHUNK_BYTES):
            crc = zlib.crc32(flat[start : start + CHUNK_BYTES], crc)
            self.release()
        return crc
