"""Recovery one decoder block at a time, for models whose training does not fit into memory."""

import time
from functools import partial
from typing import Any

import torch
from torch import Tensor

from prunus.benchmark.machine import peak_resident_bytes
from prunus.calibration.hidden_states import HiddenStates
from prunus.checkpoint import OutputDirectory
from prunus.checkpoint.output import full_disk_is_an_error
from prunus.errors import UserError
from prunus.models import StreamedModel
from prunus.progress import progress as progress_bar
from prunus.recovery.block_wise import BlockWise
from prunus.recovery.data import TrainingText
from prunus.recovery.keep_masks import KeepMasks, Matrix, count_zeros, num_weights
from prunus.steps.recover_result import say_guessed_masks, zeros_facts
from prunus.steps.recover_setup import Setup

Saved = dict[str, Any]


def train_blocks(setup: Setup, output: OutputDirectory, text: TrainingText, saved: Saved | None) -> dict[str, Any]:
    """Train block after block from where `output` stands, writing each one's file; returns facts for the record."""
    if setup.processes.count > 1:
        raise UserError(
            f"method 'block-wise' runs in one process, {setup.processes.count} were launched; start it without "
            "accelerate launch."
        )
    assert setup.teacher is not None
    teacher = StreamedModel(setup.teacher, dtype=torch.float32, device=str(setup.processes.device))
    run = _BlocksRun(setup, output, BlockWise(setup.model, teacher, text, setup.plan, setup.settings.weight_decay))
    return run.run(saved or _nothing_done(setup))


class _BlocksRun:
    def __init__(self, setup: Setup, output: OutputDirectory, blocks: BlockWise) -> None:
        self.setup, self.output, self.blocks = setup, output, blocks
        self.pruned: list[Matrix] = []
        self._started = time.monotonic()

    def run(self, saved: Saved) -> dict[str, Any]:
        num, steps = len(self.setup.model.spec.blocks), self.setup.plan.steps
        hidden = self._hidden_states(saved)
        with progress_bar("Recover, block-wise", num * steps, saved["blocks_done"] * steps) as advance:
            for index in range(saved["blocks_done"], num):
                find = partial(self._find_masks, saved)
                with full_disk_is_an_error(self.output.out):
                    state, row = self.blocks.run_block(index, hidden[index % 2], hidden[(index + 1) % 2], find, advance)
                self._save(saved, index, state, row, hidden[(index + 1) % 2])
        self._write_outer(saved)
        before, after = self.blocks.held_out(hidden[num % 2])
        return self._facts(saved, before, after)

    def _hidden_states(self, saved: Saved) -> list[HiddenStates]:
        """The two files that blocks read from and write to in turn; a run that goes on finds its own again."""
        partial_directory, done = self.output.partial, saved["blocks_done"]
        with full_disk_is_an_error(self.output.out):
            hidden = [HiddenStates(self.blocks.shape, torch.float32, partial_directory / f"hidden-{n}") for n in (0, 1)]
            if done == 0:
                self.blocks.embed(hidden[0])
        self.blocks.learn_calls()
        if done and hidden[done % 2].checksum() != saved["hidden_checksum"]:
            raise UserError(
                f"{partial_directory} was damaged, perhaps by a power failure; remove it and run the same command "
                "again."
            )
        return hidden

    def _find_masks(self, saved: Saved, weights: dict[str, Tensor]) -> KeepMasks:
        masks, pruned = self.setup.masks.find(weights)
        say_guessed_masks(self.setup, pruned)
        self.pruned = pruned
        saved["zeros_before"] |= count_zeros(pruned, weights)
        saved["pruned_weights"] += num_weights(pruned)
        return KeepMasks({name: keep.to(self.setup.processes.device) for name, keep in masks.keep.items()})

    def _save(self, saved: Saved, index: int, state: dict[str, Tensor], row: Saved, hidden: HiddenStates) -> None:
        self.output.write_shard(self.setup.shards.of_block(index), self.setup.model.names.store(state))
        now = time.monotonic()
        saved["zeros_after"] |= count_zeros(self.pruned, state)
        saved["all_zeros"] += sum(int((tensor == 0).sum()) for tensor in state.values())
        saved["blocks"].append(row)
        saved["seconds"] += now - self._started
        saved["peak_memory_bytes"] = max(saved["peak_memory_bytes"], peak_resident_bytes() or 0)
        saved |= {"blocks_done": index + 1, "hidden_checksum": hidden.checksum()}
        self._started = now
        self.output.save_progress(saved)

    def _write_outer(self, saved: Saved) -> None:
        for name, keys in self.setup.shards.outer.items():
            tensors = {key: self.setup.checkpoint.read(key) for key in keys}
            saved["all_zeros"] += sum(int((tensor == 0).sum()) for tensor in tensors.values())
            self.output.write_shard(name, tensors)

    def _facts(self, saved: Saved, before: dict[str, float], after: dict[str, float]) -> dict[str, Any]:
        plan, num = self.setup.plan, self.setup.checkpoint.num_parameters
        tokens = plan.steps * plan.sequences * self.setup.settings.length
        return {
            "seconds": round(saved["seconds"] + time.monotonic() - self._started, 2),
            "peak_memory_bytes": max(saved["peak_memory_bytes"], peak_resident_bytes() or 0),
            "steps": plan.steps,
            "tokens": tokens,
            "tokens_per_second": round(tokens * len(saved["blocks"]) / max(saved["seconds"], 1e-9), 1),
            "held_out_before": before,
            "held_out_after": after,
            "blocks": saved["blocks"],
            **zeros_facts(
                saved["zeros_before"], saved["zeros_after"], saved["all_zeros"], saved["pruned_weights"], num
            ),
        }


def _nothing_done(setup: Setup) -> Saved:
    """What is saved after each block, before the first."""
    return {
        "blocks_done": 0,
        "dtype": str(setup.dtype).removeprefix("torch."),
        "blocks": [],
        "zeros_before": {},
        "zeros_after": {},
        "all_zeros": 0,
        "pruned_weights": 0,
        "seconds": 0.0,
        "peak_memory_bytes": 0,
    }
