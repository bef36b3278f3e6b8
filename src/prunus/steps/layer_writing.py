"""Write the layers that stay under their new numbers, and fold removed runs into the layers before them."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from prunus.calibration import BlockPass, HiddenStates
from prunus.calibration.dense_stream import DenseStream
from prunus.calibration.fold_block import LastMatrix, fit_folds, last_matrix, last_parameters, set_last_matrix
from prunus.checkpoint import OutputDirectory
from prunus.checkpoint.shards import Shards
from prunus.models import StreamedModel
from prunus.models.layers import LayerNumbers
from prunus.progress import progress
from prunus.shrinking.fold import Folded
from prunus.steps.layer_choice import RemovedRun
from prunus.text.batches import TokenBatch

Rows = list[dict[str, Any]]


class LayerWriter:
    """Writes the checkpoint that has only the layers `kept`. A file that is there already is never written again."""

    def __init__(self, model: StreamedModel, output: OutputDirectory, kept: list[int]) -> None:
        self._model, self._output, self._kept = model, output, kept
        self._numbers = LayerNumbers.found_in(model.block_keys(), model.spec.family)
        self._keys: dict[int | None, list[str]] = {}  # layer -> all its tensors, those that the model ignores included
        for key in model.checkpoint.tensors:
            self._keys.setdefault(self._numbers.layer_of(key), []).append(key)
        infos = model.checkpoint.tensors
        self._names = {
            key: self._numbers.renamed(key, new) for new, layer in enumerate(kept) for key in self._keys[layer]
        }
        outside = {key: infos[key] for key in self._keys.get(None, [])}
        self.checkpoint = replace(model.checkpoint, tensors=outside | {n: infos[key] for key, n in self._names.items()})
        self.shards = Shards(self)

    def block_keys(self) -> list[list[str]]:
        """For each layer that stays, the new names of its tensors."""
        return [[self._names[key] for key in self._keys[layer]] for layer in self._kept]

    def write_all(self) -> None:
        """Write what is not written yet, as it is."""
        for file, keys in self.shards.outer.items():
            if not set(keys) <= set(self._output.files):
                self._output.write_shard(file, {key: self._model.checkpoint.read(key) for key in keys})
        with progress("Write layers", len(self._kept)) as advance:
            for layer in self._kept:
                if not self.is_written(layer):
                    self.write(layer, {})
                advance(1)

    def is_written(self, layer: int) -> bool:
        return {self._names[key] for key in self._keys[layer]} <= set(self._output.files)

    def write(self, layer: int, changed: dict[str, Tensor]) -> None:
        """Write one layer; `changed` are the parameters that are not what they were, under the model's names."""
        stored = self._model.names.store(changed)
        tensors = {
            self._names[key]: stored[key] if key in stored else self._model.checkpoint.read(key)
            for key in self._keys[layer]
        }
        self._output.write_shard(self.shards.of_block(self._kept.index(layer)), tensors)

    def read(self, layer: int, parameters: list[str]) -> dict[str, Tensor]:
        """Parameters of a layer that was written before, under the model's names."""
        return self._model.names.load(parameters, self._read_written)

    def _read_written(self, key: str) -> Tensor:
        name = self._names[key]
        with safe_open(self._output.partial / self._output.files[name], framework="pt") as file:
            tensor: Tensor = file.get_tensor(name).clone()
        return tensor


class Folding:
    """Folds run after run, each on what the model that is being written gives, towards what the dense one gave.

    Up to the first run the two are the same; behind the last nothing has to be run.
    """

    def __init__(
        self, model: StreamedModel, batch: TokenBatch, kept: list[int], writer: LayerWriter, folder: Path
    ) -> None:
        self._model, self._batch, self._kept, self._writer, self._folder = model, batch, kept, writer, folder
        self._own: HiddenStates | None = None  # of the model that is being written, in front of layer `_reached`
        self._reached = 0

    @torch.no_grad()
    def run(self, runs: list[RemovedRun], rows: Rows, save: Callable[[], None]) -> None:
        """Write the layers before the runs; `save` is called after each. Goes on behind those that are written."""
        last = max((i for i, run in enumerate(runs) if not self._is_written(run)), default=-1)
        if last < 0:
            return
        with progress("Fold", runs[last].boundary * len(self._batch.tokens_NT)) as advance:
            dense = DenseStream(self._model, self._batch, self._folder, advance)
            for number, run in enumerate(runs[: last + 1]):
                self._fold(run, dense, rows, save, go_on=number < last)

    def _is_written(self, run: RemovedRun) -> bool:
        return self._writer.is_written(run.before)

    def _fold(self, run: RemovedRun, dense: DenseStream, rows: Rows, save: Callable[[], None], *, go_on: bool) -> None:
        layer = run.before
        hidden_in, matrix = self._inputs_of(layer, dense), self._known(layer)
        target = dense.at(run.boundary)  # before the layer is loaded: the dense walk runs it, too, and frees it
        state = self._model.load_block(layer)
        if matrix is None:
            (folded,) = fit_folds(self._model, layer, hidden_in, self._batch.real_NT, [target])
            matrix = LastMatrix.stored_in(self._model.spec.blocks[layer], state).folded(folded)
            rows.append(self._row(run, folded))
            self._write(layer, matrix)
            save()
        if go_on:
            set_last_matrix(self._model, layer, matrix)
            self._step(layer, hidden_in)
        self._model.free_block(layer)
        dense.forget_before(run.boundary)

    def _inputs_of(self, layer: int, dense: DenseStream) -> HiddenStates:
        if self._own is None:
            return dense.at(layer)
        plain = BlockPass(model=self._model, real_NT=self._batch.real_NT, edit=None)
        for between in [kept for kept in self._kept if self._reached <= kept < layer]:
            plain.run_block(between, self._own, self._own)
        return self._own

    def _step(self, layer: int, hidden_in: HiddenStates) -> None:
        if self._own is None:
            num_sequences, length, width = hidden_in.states_NTH.shape
            shape = (num_sequences, length, width)
            self._own = HiddenStates(shape, self._model.dtype, self._folder / "hidden-shrunk")
        for n in range(len(self._batch.tokens_NT)):
            self._own[n] = self._model.run_block(layer, hidden_in[n])
        self._reached = layer + 1

    def _known(self, layer: int) -> LastMatrix | None:
        """What an interrupted run wrote already."""
        if not self._writer.is_written(layer):
            return None
        spec = self._model.spec.blocks[layer]
        return LastMatrix.stored_in(spec, self._writer.read(layer, last_parameters(spec)))

    def _write(self, layer: int, matrix: LastMatrix) -> None:
        spec = self._model.spec.blocks[layer]
        self._writer.write(layer, {spec.full(name): new for name, new in matrix.stored(last_matrix(spec)).items()})

    def _row(self, run: RemovedRun, folded: Folded) -> dict[str, Any]:
        spec = self._model.spec.blocks[run.before]
        return {
            "layers": list(run.layers),
            "into": spec.full_name(last_matrix(spec)),
            "error_before": folded.error_before,
            "error": folded.error_after,
            "damping": folded.damping,
            "tokens": int(self._batch.real_NT.sum()),
        }
