"""`prunus.sparsify`: model directory in, sparse model directory out, one decoder block in memory at a time."""

import math
import shutil
import time
from collections.abc import Mapping
from dataclasses import fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from prunus import __version__
from prunus.benchmark.machine import machine, peak_resident_bytes
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
from prunus.steps.allocate import SparsifyTo, sparsify_allocated
from prunus.steps.calibration_text import calibration_batch
from prunus.steps.estimate import Estimate, estimate_sparsify
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
    output = OutputDirectory(Path(out), checkpoint, checked.model_dump(mode="json"))
    if output.is_done:
        return Run.open(output.out, reused=True)
    with output:
        if checked.allocation == "uniform":
            job.run(output)
        else:
            sparsify_allocated(job.model, output.out, checked, output.fingerprint, _another(checkpoint, limit), limit)
            shutil.rmtree(output.partial)
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
        output = OutputDirectory(out, checkpoint, settings.model_dump(mode="json"))
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
        for notice in self.notices:
            console.print(f"note: {notice}", markup=False, highlight=False, soft_wrap=True)
        saved = output.progress() or {"blocks_done": 0, "matrices": [], "seconds": 0.0, "peak_memory_bytes": 0}
        self.model.dtype = DTYPES[saved.get("dtype", str(self.model.dtype).removeprefix("torch."))]
        edit = SparsifyEdit(self.method, self.options, self.plan, saved["matrices"])
        estimate = estimate_sparsify(self.model, self.plan, self.method, self.settings, self.max_memory)
        self.shards.check_space(output, estimate.disk_bytes)
        batch = calibration_batch(self.model, self.settings) if self.method.needs else no_text()
        self._write_outer(output)
        self._pass_blocks(output, edit, batch, saved, estimate.sequences_in_memory)
        output.finish(self._record(edit, batch, saved, output.fingerprint))

    def _write_outer(self, output: OutputDirectory) -> None:
        for name, keys in self.shards.outer.items():
            if not set(keys) <= set(output.files):
                output.write_shard(name, {key: self.model.checkpoint.read(key) for key in keys})

    def _pass_blocks(
        self, output: OutputDirectory, edit: SparsifyEdit, batch: TokenBatch, saved: dict[str, Any], in_memory: int
    ) -> None:
        num_blocks, num_sequences = len(self.model.spec.blocks), len(batch.tokens_NT)
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
                saved |= self._progress(index + 1, edit, hidden[(index + 1) % 2], saved)
                output.save_progress(saved)
        if self.settings.head:
            self._save_head(output, run.edit_head(batch.tokens_NT, hidden[num_blocks % 2]))

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
        record.pop("sensitivity", None)
        step = {
            "step": "sparsify",
            "settings": self.settings.model_dump(mode="json"),
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
            "sparsity": achieved(edit.matrices, checkpoint.num_parameters),
            "notices": self.notices,
            "matrices": edit.matrices,
        }
        return {**record, "history": [*record["history"], step]}


def make_options(kind: type[Any], values: Mapping[str, Any]) -> Any:
    """Build a method's options, all of them numbers. Raises UserError naming the ones there are."""
    known = {field.name: field.default for field in fields(kind)}
    for key, value in values.items():
        if key not in known:
            allowed = ", ".join(known) or "none"
            raise UserError(f"unknown option {key!r}; this method's options are: {allowed}.")
        if not _is_number(value, whole=isinstance(known[key], int)):
            number = "a whole number" if isinstance(known[key], int) else "a number"
            raise UserError(f"option {key}={value!r} is not {number}; the default is {known[key]}.")
    return kind(**values)


def _is_number(value: Any, *, whole: bool) -> bool:
    if isinstance(value, bool) or not isinstance(value, int if whole else int | float):
        return False
    return math.isfinite(value)


def achieved(matrices: list[dict[str, Any]], num_parameters: int) -> dict[str, float]:
    """Fraction of zeros over the pruned matrices, and of their zeros over all parameters."""
    sizes = [row["shape"][0] * row["shape"][1] for row in matrices]
    zeros = sum(round(row["sparsity"] * size) for row, size in zip(matrices, sizes, strict=True))
    return {"pruned_matrices": zeros / max(sum(sizes), 1), "all_parameters": zeros / max(num_parameters, 1)}


def no_text() -> TokenBatch:
    """For methods that look at weights alone."""
    return TokenBatch(torch.empty(0, 1, dtype=torch.long), torch.empty(0, 1, dtype=torch.bool), [])
