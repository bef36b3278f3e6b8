"""`prunus.quantize`: model directory in, quantized model directory out, one decoder block in memory at a time."""

from collections.abc import Collection
from pathlib import Path
from typing import Any

from torch import Tensor

from prunus.calibration.block_pass import Propagate
from prunus.checkpoint import Checkpoint, OutputDirectory, open_dense
from prunus.checkpoint.compressed_tensors import encoded, quantization_config
from prunus.checkpoint.directory import read_raw_config
from prunus.machine_choice import choose_device, choose_dtype, parse_memory
from prunus.models import StreamedModel
from prunus.quantizing import QUANTIZERS, SCHEMES
from prunus.result import Run
from prunus.settings_quantize import QuantizeSettings
from prunus.steps.block_job import BlockJob
from prunus.steps.identity import identity
from prunus.steps.length import fit_length
from prunus.steps.quantize_edit import QuantizeEdit, notes_of_unscaled
from prunus.steps.quantize_plan import make_quantize_plan, sources_of_groups
from prunus.steps.sparsify_edit import notes_of_unseen
from prunus.text.batches import TokenBatch

HEADER_BYTES = 1024  # at most, of a tensor and its scales in the header of their file


def quantize(
    model: str | Path,
    out: str | Path,
    *,
    max_memory: str | int | None = None,
    trust_remote_code: bool = False,
    **settings: Any,
) -> Run:
    """Write a quantized copy of `model` to `out`, in the format compressed-tensors; every zero stays a zero.

    `settings` are the fields of `QuantizeSettings`: scheme, method, joint, pattern, calibration, ... Embedding, head,
    norms and routers stay as they are. The same call again goes on where an interrupted one stopped, and returns
    at once when `out` is already its result. Raises UserError for anything the user can mend.
    """
    step = quantize_step(model, trust_remote_code, settings)
    limit = parse_memory(max_memory)
    output = OutputDirectory(Path(out), step.model.checkpoint, identity(step.settings))
    if output.is_done:
        return Run.open(output.out, reused=True)
    with output:
        BlockJob(step.model, step, limit).run(output)
    return Run.open(output.out)


def quantize_step(model: str | Path, trust_remote_code: bool, settings: dict[str, Any]) -> "QuantizeStep":
    """Everything decided before weights are read. Raises UserError for what cannot be."""
    checked = QuantizeSettings.check(**settings)
    checkpoint = open_dense(model, trust_remote_code=trust_remote_code)
    reads_text = bool(QUANTIZERS[checked.method].needs)
    return QuantizeStep(fit_length(checked, checkpoint.config) if reads_text else checked, checkpoint)


class QuantizeStep:
    """What quantizing does to the blocks: a `BlockStep`."""

    verb = "quantize"
    prepares = False
    propagate: Propagate = "sparse"
    edits_head = False

    def __init__(self, settings: QuantizeSettings, checkpoint: Checkpoint) -> None:
        self.settings = settings
        self.method, self.scheme = QUANTIZERS[settings.method], SCHEMES[settings.scheme]
        device = choose_device(settings.device)
        width = int(checkpoint.config.get_text_config(decoder=True).hidden_size)
        self.model = StreamedModel(checkpoint, dtype=choose_dtype(settings.dtype, device, width), device=device)
        self.plan = make_quantize_plan(self.model, self.scheme, settings.pattern)
        self.sources = sources_of_groups(self.model) if self.method.input_scales else {}
        self.sizes = {key: size + HEADER_BYTES for key, size in self.plan.num_bytes.items()}
        self.title = f"Quantize to {self.scheme.name}, {settings.method}"
        self.needs: Collection[str] = self.method.needs
        self.notices: list[str] = []

    def prepare(self, batch: TokenBatch, rows: list[dict[str, Any]]) -> None:
        raise AssertionError("matrices are quantized one after the other")

    def edit(self, rows: list[dict[str, Any]]) -> QuantizeEdit:
        self._edit = QuantizeEdit(self.method, self.plan, self.sources, rows)
        return self._edit

    def finished(self, index: int, state: dict[str, Tensor]) -> dict[str, Tensor]:
        self._edit.fold(state)
        return state

    def stored(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Codes and scales in place of each matrix of the block."""
        scales, self._edit.scales = self.model.names.store(self._edit.scales), {}
        written: dict[str, Tensor] = {}
        for name, tensor in tensors.items():
            found = encoded(name, tensor, scales[name], self.scheme) if name in self.plan.keys else {name: tensor}
            written |= found
        return written

    def outer(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        return state

    def config(self) -> dict[str, Any]:
        raw = read_raw_config(self.model.checkpoint.path)
        return {**raw, "quantization_config": quantization_config(self.scheme, self.plan.ignore)}

    def remarks(self, rows: list[dict[str, Any]]) -> list[str]:
        return [*notes_of_unseen(self.method.needs, rows, "quantized"), *notes_of_unscaled(rows)]

    def facts(self, rows: list[dict[str, Any]], num_zeros: int) -> dict[str, Any]:
        checkpoint = self.model.checkpoint
        zeros = sum(row["zeros_after"] for row in rows)
        weights = sum(row["shape"][0] * row["shape"][1] for row in rows)
        return {
            "scheme": self.scheme.name,
            "method": self.method.name,
            "parameters": checkpoint.num_parameters,
            "bytes": {"before": checkpoint.num_bytes, "after": sum(self.plan.num_bytes.values())},
            "num_zeros": {"before": sum(row["zeros_before"] for row in rows), "after": zeros},
            "sparsity": {
                "pruned_matrices": zeros / max(weights, 1),
                "all_parameters": num_zeros / max(checkpoint.num_parameters, 1),
            },
            "ignore": self.plan.ignore,
            "matrices": rows,
        }
