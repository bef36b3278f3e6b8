"""Which weight file holds which tensors of an output: those outside the blocks first, then one file per block.

A file per block is what makes a run resumable at any block: each is written once and never touched again.
"""

import shutil
from collections.abc import Mapping
from typing import Protocol

from prunus.checkpoint.directory import Checkpoint
from prunus.checkpoint.output import OutputDirectory
from prunus.errors import UserError

OUTER_BYTES = 1 << 30


class Blocks(Protocol):
    """What the plan needs to know of a model."""

    checkpoint: Checkpoint

    def block_keys(self) -> list[list[str]]: ...


class Shards:
    """The plan of weight files: `outer` maps file name to tensor names; `of_block(i)` names the file of block i."""

    def __init__(self, model: Blocks) -> None:
        self._tensors = model.checkpoint.tensors
        blocks = model.block_keys()
        inside = {key for keys in blocks for key in keys}
        groups = self._split([key for key in self._tensors if key not in inside])
        self._num_outer, self._total = len(groups), len(groups) + len(blocks)
        self.outer = {self._name(i): keys for i, keys in enumerate(groups)}
        self._files = self.outer | {self.of_block(i): keys for i, keys in enumerate(blocks)}

    def of_block(self, index: int) -> str:
        return self._name(self._num_outer + index)

    def check_space(self, output: OutputDirectory, hidden_bytes: int, sizes: Mapping[str, int] | None = None) -> None:
        """Raise UserError now when what is still to be written will not fit.

        `sizes` are the bytes that each of the checkpoint's tensors takes as written; None: as many as now.
        """
        written = set(output.files.values())
        names = [name for file, keys in self._files.items() if file not in written for name in keys]
        missing = sum(self._tensors[name].num_bytes if sizes is None else sizes[name] for name in names)
        needed, free = missing + hidden_bytes, shutil.disk_usage(output.partial).free
        if needed > free:
            raise UserError(
                f"no space: {output.out} needs {needed / 1e9:.1f} GB more and its disk has {free / 1e9:.1f} GB free."
            )

    def _name(self, number: int) -> str:
        return f"model-{number + 1:05d}-of-{self._total:05d}.safetensors"

    def _split(self, keys: list[str]) -> list[list[str]]:
        groups: list[list[str]] = []
        room = 0
        for key in keys:
            size = self._tensors[key].num_bytes
            if not groups or size > room:
                groups.append([])
                room = OUTER_BYTES
            groups[-1].append(key)
            room -= size
        return groups
