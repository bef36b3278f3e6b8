"""Put what a waiting forward pass holds on disk and back.

Between two stages every calibration sequence waits in the middle of its block, each holding several times its hidden
states in tensors of the model's own code. They are found in the waiting frames, written to an unnamed file, and their
memory is given up until the sequence goes on; the tensors themselves stay where they are, so the code that holds them
notices nothing.
"""

import ctypes
import os
import tempfile
import weakref
from collections.abc import Iterator
from io import BufferedRandom
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor

SMALL_BYTES = 1 << 12  # not worth a file


def held_storages(frame: FrameType | None) -> dict[int, torch.UntypedStorage]:
    """The memory behind every tensor that the frames from `frame` outwards hold, by address."""
    found: dict[int, torch.UntypedStorage] = {}
    while frame is not None:
        for tensor in _tensors(list(frame.f_locals.values())):
            storage = tensor.untyped_storage()
            found[storage.data_ptr()] = storage
        frame = frame.f_back
    return {address: storage for address, storage in found.items() if storage.nbytes() >= SMALL_BYTES}


def _tensors(values: Any) -> Iterator[Tensor]:
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, dict):
        yield from _tensors(list(values.values()))
    elif isinstance(values, list | tuple):
        for value in values:
            yield from _tensors(value)


class SpillFiles:
    """For each sequence an unnamed file in `folder` (None: the system's place for temporary files).

    A file is written again at every stage: overwriting pages that the system holds already takes a third of the time
    of making new ones.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = folder
        self._files: dict[int, BufferedRandom] = {}
        weakref.finalize(self, _close, self._files)

    def __getitem__(self, sequence: int) -> BufferedRandom:
        if sequence not in self._files:
            descriptor, path = tempfile.mkstemp(prefix="prunus-waiting-", dir=self._folder)
            Path(path).unlink()
            self._files[sequence] = os.fdopen(descriptor, "w+b")
        return self._files[sequence]


def _close(files: dict[int, BufferedRandom]) -> None:
    for file in files.values():
        file.close()


class Spilled:
    """Storages whose content is in a file. `restore` brings it back, bit for bit."""

    def __init__(self, storages: list[torch.UntypedStorage], file: BufferedRandom) -> None:
        self._storages = [(storage, storage.nbytes()) for storage in storages]
        self._file = file
        self._file.seek(0)
        for storage in storages:
            on_cpu = _on_cpu(storage)  # named, so that a copy lives until it is written
            self._file.write(_memory(on_cpu))
            storage.resize_(0)
        self._file.flush()

    def restore(self) -> None:
        self._file.seek(0)
        for storage, size in self._storages:
            storage.resize_(size)
            on_cpu = _on_cpu(storage)
            if self._file.readinto(_memory(on_cpu)) != size:
                raise OSError("a temporary file of waiting sequences came back shorter than it was written")
            if on_cpu is not storage:
                storage.copy_(on_cpu)


def _on_cpu(storage: torch.UntypedStorage) -> torch.UntypedStorage:
    """The storage itself when it is on the CPU, else a copy there."""
    return storage if storage.device.type == "cpu" else storage.cpu()  # type: ignore[no-untyped-call]


def _memory(storage: torch.UntypedStorage) -> Any:
    """The bytes of a CPU storage. (A numpy view would do, but it forbids resizing for good.)"""
    return (ctypes.c_char * storage.nbytes()).from_address(storage.data_ptr())
