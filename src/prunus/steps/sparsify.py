"""`prunus.sparsify`: model directory in, sparse model directory out, one decoder block in memory at a time."""

import time
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from prunus import __version__
from prunus.benchmark.machine import machine, peak_resident_bytes, reset_peak_resident
from prunus.calibration import BlockPass, HiddenStates, SpillFiles, embed_all, hidden_shape
from prunus.checkpoint import Checkpoint, OutputDirectory, open_checkpoint, read_record
from prunus.checkpoint.output import full_disk_is_an_error
from prunus.checkpoint.record import new_record
from prunus.checkpoint.shards import Shards
from prunus.errors import UserError
from prunus.machine_choice import DTYPES, choose_device, choose_dtype, parse_memory
from prunus.models import StreamedModel
from prunus.progress import console, progress
from prunus.result import Run
from prunus.settings import SparsifySettings
from prunus.sparsity import METHODS
from prunus.sparsity.methods import make_options
from prunus.steps.allocate import SparsifyTo, sparsify_allocated
from prunus.steps.calibration_text import calibration_batch
from prunus.steps.estimate import Estimate, estimate_sparsify
from prunus.steps.identity import identity
from prunus.steps.memory_plan import plan_memory
from prunus.steps.notices import notices
from prunus.steps.plan import Plan, make_plan
from prunus.steps.sparsify_edit import SparsifyEdit
from prunus.text.batches import TokenBatch


def sparsify(
    model: str | Path,
    out: str | Path,
    *,
    max_memory: str | int | None = None,
    trust_remote_code: bool = False,
    **settings: Any,
) -> Run:
    """Write a sparse copy of `model` to `out`.

    `settings` are the fields of `SparsifySettings`: method, pattern, overrides, protect, calibration, samples, ... The
    same call again goes on where an interrupted one stopped, and returns at once when `out` is already its result.
    `max_memory` ("4GiB") bounds what waits in memory between stages; the rest waits on disk beside `out`: other times,
    the same result. Raises UserError for anything the user can mend.
    """
    job = _job(model, max_memory, trust_remote_code, settings)
    checked, checkpoint, limit = job.settings, job.model.checkpoint, job.max_memory
    output = OutputDirectory(Path(out), checkpoint, identity(checked))
    if output.is_done:
        return Run.open(output.out, reused=True)
    with output:
        if checked.allocation == "uniform":
            job.run(output)
        else:
            sparsify_allocated(job.model, output.out, checked, output.fingerprint, _another(checkpoint, limit), limit)
    return Run.open(output.out)


def estimate(
    model: str | Path, *, max_memory: str | int | None = None, trust_remote_code: bool = False, **settings: Any
) -> Estimate:
    """What `sparsify` with these arguments would cut, and the memory and time it would take; touches nothing."""
    job = _job(model, max_memory, trust_remote_code, settings)
    return estimate_sparsify(job.model, job.plan, job.method, job.settings, job.max_memory)


def _job(
    model: str | Path, max_memory: str | int | None, trust_remote_code: bool, settings: dict[str, Any]
) -> "SparsifyJob":
    checked = SparsifySettings.check(**settings)
    checkpoint = open_checkpoint(model, trust_remote_code=trust_remote_code)
    return SparsifyJob(checked, checkpoint, parse_memory(max_memory))


def _another(checkpoint: Checkpoint, max_memory: int | None) -> SparsifyTo:
    """Sparsify the same model with other settings to another place."""

    def sparsify_to(out: Path, settings: SparsifySettings) -> None:
        output = OutputDirectory(out, checkpoint, identity(settings))
        if not output.is_done:
            with output:
                SparsifyJob(settings, checkpoint, max_memory).run(output)

    return sparsify_to


class SparsifyJob:
    """One sparsification: everything decided before weights are read, then the pass over the blocks."""

    def __init__(self, settings: SparsifySettings, checkpoint: Checkpoint, max_memory: int | None) -> None:
        self.settings, self.max_memory = settings, max_memory
        self.method = METHODS[settings.method]
        self.options = make_options(self.method.options, settings.options)
        device = choose_device(settings.device)
        width = int(checkpoint.config.get_text_config(decoder=True).hidden_size)
        self.model = StreamedModel(checkpoint, dtype=choose_dtype(settings.dtype, device, width), device=device)
        self.plan: Plan = make_plan(
            self.model.spec, self.method, settings.pattern, settings.overrides, settings.protect, settings.head
        )
        self.shards = Shards(self.model)
        self.notices = notices(self.plan.patterns.values())

    def run(self, output: OutputDirectory) -> None:
        """Go through the blocks from where `output` stands, then give the directory its name."""
        self._started = time.monotonic()
        reset_peak_resident()
        _say(self.notices)
        saved = output.progress() or nothing_done()
        self.model.dtype = DTYPES[saved.get("dtype", str(self.model.dtype).removeprefix("torch."))]
        edit = SparsifyEdit(self.method, self.options, self.plan, saved["matrices"])
        memory = plan_memory(self.model, self.method, self.settings, self.max_memory)
        self.shards.check_space(output, memory.disk_bytes)
        batch = calibration_batch(self.model, self.settings) if self.method.needs else no_text()
        self._write_outer(output)
        self._pass_blocks(output, edit, batch, saved, memory.sequences_in_memory)
        _say(edit.notices)
        output.finish(self._record(edit, batch, saved, output.fingerprint))

    def _write_outer(self, output: OutputDirectory) -> None:
        for name, keys in self.shards.outer.items():
            if not set(keys) <= set(output.files):
                output.write_shard(name, {key: self.model.checkpoint.read(key) for key in keys})

    def _pass_blocks(
        self, output: OutputDirectory, edit: SparsifyEdit, batch: TokenBatch, saved: dict[str, Any], in_memory: int
    ) -> None:
        num_blocks, num_sequences = len(self.model.spec.blocks), len(batch.tokens_NT)
        with full_disk_is_an_error(output.out):
            first, hidden = self._hidden_states(output, batch, saved)
        units = max(num_sequences, 1)
        with progress(f"Sparsify, {self.settings.method}", num_blocks * units, first * units) as advance:
            run = BlockPass(
                model=self.model,
                real_NT=batch.real_NT,
                edit=edit,
                propagate=self.settings.propagate,
                num_in_memory=max(in_memory, 1),
                spill_files=SpillFiles(output.partial),
                advance=advance,
            )
            for index in range(first, num_blocks):
                with full_disk_is_an_error(output.out):
                    state = run.run_block(index, hidden[index % 2], hidden[(index + 1) % 2])
                self._save_block(output, index, state)
                saved["zeros"] += sum(int((tensor == 0).sum()) for tensor in state.values())
                saved |= self._progress(index + 1, edit, hidden[(index + 1) % 2], saved)
                output.save_progress(saved)
        if self.settings.head:
            state = run.edit_head(batch.tokens_NT, hidden[num_blocks % 2])
            self._save_head(output, state)
            saved["zeros"] += sum(int((tensor == 0).sum()) for tensor in state.values())

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

    def _save_block(self, output: OutputDirectory, index: int, state: dict[str, Tensor]) -> None:
        output.write_shard(self.shards.of_block(index), self.model.names.store(state))

    def _progress(
        self, blocks_done: int, edit: SparsifyEdit, hidden: HiddenStates, saved: dict[str, Any]
    ) -> dict[str, Any]:
        now = time.monotonic()
        seconds, self._started = now - self._started, now
        return {
            "blocks_done": blocks_done,
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "hidden_checksum": hidden.checksum(),
            "matrices": edit.matrices,
            "seconds": saved["seconds"] + seconds,
            "peak_memory_bytes": max(saved["peak_memory_bytes"], peak_resident_bytes() or 0),
        }

    def _record(self, edit: SparsifyEdit, batch: TokenBatch, saved: dict[str, Any], fingerprint: str) -> dict[str, Any]:
        checkpoint = self.model.checkpoint
        record = read_record(checkpoint.path) or new_record(__version__)
        record |= {"prunus": __version__, "evaluations": [], "benchmarks": []}
        about_input = record.pop("sensitivity", [])
        step = {
            "step": "sparsify",
            "settings": self.settings.model_dump(mode="json"),
            "options": asdict(self.options),
            "fingerprint": fingerprint,
            "input": {"path": str(checkpoint.path), "sha256": checkpoint.sha256},
            "finished": datetime.now(UTC).isoformat(timespec="seconds"),
            "seconds": round(saved["seconds"], 2),
            "peak_memory_bytes": max(saved["peak_memory_bytes"], peak_resident_bytes() or 0),
            "environment": machine(),
            "dtype": saved["dtype"],
            "device": str(self.model.device),
            "calibration": batch.description,
            "allocation": self.settings.allocation,
            "parameters": checkpoint.num_parameters,
            "sparsity": achieved(edit.matrices, saved["zeros"], checkpoint.num_parameters),
            "notices": [*self.notices, *edit.notices],
            "sensitivity": about_input,
            "matrices": edit.matrices,
        }
        return {**record, "history": [*record["history"], step]}


def _say(notices: list[str]) -> None:
    for notice in notices:
        console.print(f"note: {notice}", markup=False, highlight=False, soft_wrap=True)


def nothing_done() -> dict[str, Any]:
    """What is saved after each block, before the first."""
    return {"blocks_done": 0, "matrices": [], "zeros": 0, "seconds": 0.0, "peak_memory_bytes": 0}


def achieved(matrices: list[dict[str, Any]], num_zeros: int, num_parameters: int) -> dict[str, float]:
    """Fraction of zeros over the matrices that this step pruned, and over all parameters of the model."""
    sizes = [row["shape"][0] * row["shape"][1] for row in matrices]
    zeros = sum(round(row["sparsity"] * size) for row, size in zip(matrices, sizes, strict=True))
    return {"pruned_matrices": zeros / max(sum(sizes), 1), "all_parameters": num_zeros / max(num_parameters, 1)}


def no_text() -> TokenBatch:
    """For methods that look at weights alone."""
    return TokenBatch(torch.empty(0, 1, dtype=torch.long), torch.empty(0, 1, dtype=torch.bool), [])
