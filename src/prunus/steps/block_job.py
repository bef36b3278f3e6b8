"""One step over all blocks of a model, to be killed at any moment: what sparsifying and shrinking have in common.

A step says what it edits (`BlockStep`); the job goes through the blocks with it, writes one weight file per block, and
saves after each what the next call needs to go on from there.

Shapes: N = sequences, T = tokens, H = hidden.
"""

import time
from collections.abc import Collection, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from prunus.benchmark.machine import peak_resident_bytes, reset_peak_resident
from prunus.calibration import BlockPass, Edit, HiddenStates, SpillFiles, embed_all, hidden_shape
from prunus.calibration.block_pass import Propagate
from prunus.checkpoint import OutputDirectory
from prunus.checkpoint.output import full_disk_is_an_error
from prunus.checkpoint.shards import Shards
from prunus.errors import UserError
from prunus.machine_choice import DTYPES
from prunus.models import StreamedModel
from prunus.progress import progress, say
from prunus.settings import CalibratedSettings
from prunus.steps.calibration_text import calibration_batch
from prunus.steps.history import record_of
from prunus.steps.memory_plan import plan_memory
from prunus.text.batches import TokenBatch


class BlockStep(Protocol):
    """What one step does to the blocks, and says of it afterwards."""

    @property
    def verb(self) -> str: ...  # as in the record's history

    @property
    def title(self) -> str: ...  # of the progress bar

    @property
    def settings(self) -> CalibratedSettings: ...

    @property
    def needs(self) -> Collection[str]: ...  # all statistics its edit asks for anywhere; none: the pass needs no text

    @property
    def prepares(self) -> bool: ...  # whether `prepare` looks at calibration text before the pass

    @property
    def propagate(self) -> Propagate: ...

    @property
    def edits_head(self) -> bool: ...

    @property
    def sizes(self) -> Mapping[str, int] | None: ...  # bytes of each tensor as written; None: at most as many as now

    @property
    def notices(self) -> list[str]: ...  # said before the work

    def prepare(self, batch: TokenBatch, rows: list[dict[str, Any]]) -> None:
        """What has to be known of the whole model before its first block is edited; facts may go to `rows`."""
        ...

    def edit(self, rows: list[dict[str, Any]]) -> Edit:
        """The edit of the pass. `rows` are the facts of the blocks done so far; it appends those of the next."""
        ...

    def finished(self, index: int, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """What is written of an edited block: its tensors, under the model's names."""
        ...

    def stored(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """The same as it is written, under the checkpoint's names."""
        ...

    def outer(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """What is written of tensors outside the blocks, under the model's names."""
        ...

    def config(self) -> dict[str, Any] | None:
        """The content of the new config.json; None: it stays as it is."""
        ...

    def remarks(self, rows: list[dict[str, Any]]) -> list[str]:
        """Said after the work."""
        ...

    def facts(self, rows: list[dict[str, Any]], num_zeros: int) -> dict[str, Any]:
        """What the record says of this step beyond what it says of all."""
        ...


class BlockJob:
    """One run of a step: everything decided before weights are read, then the pass over the blocks."""

    def __init__(self, model: StreamedModel, step: BlockStep, max_memory: int | None) -> None:
        self.model, self.step, self.max_memory = model, step, max_memory
        self.shards = Shards(model)

    def run(self, output: OutputDirectory) -> None:
        """Go through the blocks from where `output` stands, then give the directory its name."""
        self._started = time.monotonic()
        reset_peak_resident()
        say(self.step.notices)
        saved = output.progress() or nothing_done()
        self.model.dtype = DTYPES[saved.get("dtype", str(self.model.dtype).removeprefix("torch."))]
        memory = plan_memory(self.model, self.step.needs, self.step.settings, self.max_memory)
        self.shards.check_space(output, max(memory.disk_bytes - _hidden_on_disk(output), 0), self.step.sizes)
        reads_text = self.step.prepares or self.step.needs
        batch = calibration_batch(self.model, self.step.settings) if reads_text else no_text()
        if self.step.prepares:
            self.step.prepare(batch, saved["rows"])
        edit = self.step.edit(saved["rows"])
        self._write_outer(output)
        passed = batch if self.step.needs else no_text()
        self._pass_blocks(output, edit, passed, saved, memory.sequences_in_memory)
        remarks = self.step.remarks(saved["rows"])
        say(remarks)
        facts = self._facts(batch, saved, remarks)
        output.finish(record_of(output, self.step.verb, self.step.settings, facts), self.step.config())

    def _write_outer(self, output: OutputDirectory) -> None:
        names, read = self.model.names, self.model.checkpoint.read
        for file, keys in self.shards.outer.items():
            if not set(keys) <= set(output.files):
                state = self.step.outer(names.load(names.parameters_of(keys), read))
                stored = names.store(state)
                output.write_shard(file, {key: stored[key] if key in stored else read(key) for key in keys})

    def _pass_blocks(
        self, output: OutputDirectory, edit: Edit, batch: TokenBatch, saved: dict[str, Any], in_memory: int
    ) -> None:
        num_blocks, num_sequences = len(self.model.spec.blocks), len(batch.tokens_NT)
        with full_disk_is_an_error(output.out):
            first, hidden = self._hidden_states(output, batch, saved)
        units = max(num_sequences, 1)
        with progress(self.step.title, num_blocks * units, first * units) as advance:
            run = BlockPass(
                model=self.model,
                real_NT=batch.real_NT,
                edit=edit,
                propagate=self.step.propagate,
                num_in_memory=max(in_memory, 1),
                spill_files=SpillFiles(output.partial),
                advance=advance,
            )
            for index in range(first, num_blocks):
                with full_disk_is_an_error(output.out):
                    state = run.run_block(index, hidden[index % 2], hidden[(index + 1) % 2])
                state = self.step.finished(index, state)
                output.write_shard(self.shards.of_block(index), self.step.stored(self.model.names.store(state)))
                saved["zeros"] += _num_zeros(state)
                saved |= self._progress(index + 1, hidden[(index + 1) % 2], saved)
                output.save_progress(saved)
        if self.step.edits_head:
            state = run.edit_head(batch.tokens_NT, hidden[num_blocks % 2])
            self._save_head(output, state)
            saved["zeros"] += _num_zeros(state)

    def _save_head(self, output: OutputDirectory, state: dict[str, Tensor]) -> None:
        changed = self.model.names.store(state)
        for name, keys in self.shards.outer.items():
            if set(changed) & set(keys):
                output.write_shard(name, {k: changed.get(k, self.model.checkpoint.read(k)) for k in keys})

    def _hidden_states(
        self, output: OutputDirectory, batch: TokenBatch, saved: dict[str, Any]
    ) -> tuple[int, list[HiddenStates]]:
        """The two files that blocks read from and write to in turn; an interrupted pass finds its own again."""
        if not len(batch.tokens_NT):
            return saved["blocks_done"], [HiddenStates((0, 1, 1), self.model.dtype)] * 2
        paths = [output.partial / "hidden-0", output.partial / "hidden-1"]
        first = saved["blocks_done"]
        shape = hidden_shape(self.model, batch.tokens_NT)
        hidden = [HiddenStates(shape, self.model.dtype, path) for path in paths]
        if first == 0:
            embed_all(self.model, batch.tokens_NT, hidden[0])
        self.model.free_outer()
        if first and hidden[first % 2].checksum() != saved["hidden_checksum"]:
            raise UserError(
                f"{output.partial} was damaged, perhaps by a power failure; remove it and run the same command again."
            )
        return first, hidden

    def _progress(self, blocks_done: int, hidden: HiddenStates, saved: dict[str, Any]) -> dict[str, Any]:
        now = time.monotonic()
        seconds, self._started = now - self._started, now
        return {
            "blocks_done": blocks_done,
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "hidden_checksum": hidden.checksum(),
            "seconds": saved["seconds"] + seconds,
            "peak_memory_bytes": max(saved["peak_memory_bytes"], peak_resident_bytes() or 0),
        }

    def _facts(self, batch: TokenBatch, saved: dict[str, Any], remarks: list[str]) -> dict[str, Any]:
        return {
            "seconds": round(saved["seconds"], 2),
            "peak_memory_bytes": max(saved["peak_memory_bytes"], peak_resident_bytes() or 0),
            "dtype": saved["dtype"],
            "device": str(self.model.device),
            "calibration": batch.description,
            "notices": [*self.step.notices, *remarks],
            **self.step.facts(saved["rows"], saved["zeros"]),
        }


def nothing_done() -> dict[str, Any]:
    """What is saved after each block, before the first."""
    return {"blocks_done": 0, "rows": [], "zeros": 0, "seconds": 0.0, "peak_memory_bytes": 0}


def no_text() -> TokenBatch:
    """For methods that look at weights alone."""
    return TokenBatch(torch.empty(0, 1, dtype=torch.long), torch.empty(0, 1, dtype=torch.bool), [])


def _hidden_on_disk(output: OutputDirectory) -> int:
    """Bytes of hidden states whose room an interrupted run has taken already; the run that goes on uses them again."""
    return sum(file.stat().st_size for file in output.partial.glob("hidden-*"))


def _num_zeros(state: dict[str, Tensor]) -> int:
    return sum(int((tensor == 0).sum()) for tensor in state.values())
