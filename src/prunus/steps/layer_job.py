"""The job of a step that removes layers: choose them, fold what goes into what stays, write."""

import time
from dataclasses import asdict
from typing import Any

import torch

from prunus.benchmark.machine import peak_resident_bytes, reset_peak_resident
from prunus.calibration.streamed_source import hidden_shape
from prunus.checkpoint import OutputDirectory
from prunus.checkpoint.output import full_disk_is_an_error
from prunus.checkpoint.shards import Shards
from prunus.machine_choice import DTYPES
from prunus.progress import say
from prunus.steps.calibration_text import calibration_batch
from prunus.steps.history import record_of
from prunus.steps.layer_choice import removed_runs
from prunus.steps.layer_step import LayersStep, Saved
from prunus.steps.layer_writing import Folding, LayerWriter
from prunus.steps.memory_plan import plan_memory
from prunus.steps.shrink_shapes import weight_without_layers
from prunus.text.batches import TokenBatch


class LayerJob:
    """One run of the step: choose, fold, write; to be killed at any moment.

    `said` goes into the record's entry: what the call of which this is a part has to say.
    """

    def __init__(self, step: LayersStep, output: OutputDirectory, max_memory: int | None, said: dict[str, Any]) -> None:
        self.step, self.model, self.output = step, step.model, output
        self._max_memory, self._said = max_memory, said
        self._saved: Saved = {}

    def run(self) -> None:
        """Go on from where `output` stands, then give the directory its name."""
        self._started = time.monotonic()
        reset_peak_resident()
        self._saved = self.output.progress() or {"rows": [], "seconds": 0.0, "peak_memory_bytes": 0}
        self.model.dtype = DTYPES[self._saved.get("dtype", str(self.model.dtype).removeprefix("torch."))]
        needs = ("gram",) if self.step.settings.fold else ("input_sq_norm",)
        plan_memory(self.model, needs, self.step.settings, self._max_memory)
        self.step.check_memory(self._max_memory)
        batch = calibration_batch(self.model, self.step.settings)
        with full_disk_is_an_error(self.output.out), torch.no_grad():
            if "dtype" not in self._saved:  # a run that goes on has taken its room already
                Shards(self.model).check_space(self.output, self._hidden_bytes(batch))
            kept, config = self._choose(batch)
            self._write(batch, kept)
        remarks = self.step.remarks(kept)
        say(remarks)
        record = record_of(self.output, "shrink", self.step.settings, self._facts(batch, remarks))
        self.output.finish(record, config)

    def _choose(self, batch: TokenBatch) -> tuple[list[int], dict[str, Any]]:
        """(the layers that stay, the new content of config.json)"""
        if self.step.settings.fold:
            self.step.check_fold(batch)
        kept = self.step.choose(batch, self._saved, self._save, self.output.partial)
        return kept, self.step.new_config(kept)

    def _write(self, batch: TokenBatch, kept: list[int]) -> None:
        writer = LayerWriter(self.model, self.output, kept)
        writer.shards.check_space(self.output, 0)
        if self.step.settings.fold:
            runs = [run for run in removed_runs(kept, self.step.budget.depth) if run.before >= 0]
            Folding(self.model, batch, kept, writer, self.output.partial).run(runs, self._saved["rows"], self._save)
        writer.write_all()

    def _hidden_bytes(self, batch: TokenBatch) -> int:
        num_sequences, length, width = hidden_shape(self.model, batch.tokens_NT)
        each = num_sequences * length * width * self.model.dtype.itemsize
        return int(self.step.hidden_sets(num_sequences) * each)

    def _save(self) -> None:
        now = time.monotonic()
        self._saved["seconds"] += now - self._started
        self._saved["peak_memory_bytes"] = max(self._saved["peak_memory_bytes"], peak_resident_bytes() or 0)
        self._saved["dtype"] = str(self.model.dtype).removeprefix("torch.")
        self._started = now
        self.output.save_progress(self._saved)

    def _facts(self, batch: TokenBatch, remarks: list[str]) -> dict[str, Any]:
        depth, kept = self.step.budget.depth, self._saved["kept"]
        removed = [layer for layer in range(depth) if layer not in kept]
        sizes = {"asked": self.step.settings.layers, "before": depth, "after": len(kept)}
        return {
            "seconds": round(self._saved["seconds"] + time.monotonic() - self._started, 2),
            "peak_memory_bytes": max(self._saved["peak_memory_bytes"], peak_resident_bytes() or 0),
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "device": str(self.model.device),
            "calibration": batch.description,
            "notices": remarks,
            "axes": {"layers": {**sizes, "kept": kept, "removed": removed}},
            "before": asdict(weight_without_layers(self.model, range(depth), {})),
            "after": asdict(weight_without_layers(self.model, kept, self.step.fields(kept))),
            "scores": self._saved["scores"],
            "folds": self._saved["rows"],
            **self._said,
        }
