"""ONNX: a directory of ONNX Runtime's own model builder, which is a graph, its weights, and the tokenizer's files."""

from pathlib import Path
from typing import Any

from prunus.engines import ONNXRUNTIME, require
from prunus.engines.onnxruntime import OnnxRuntime
from prunus.errors import UserError
from prunus.exporting.formats import Conversion, Format
from prunus.exporting.graphs import contents, convert
from prunus.exporting.types import FileType
from prunus.models import StreamedModel
from prunus.models.limits import max_length

# bounds: what SmolLM2-135M-Instruct showed (docs/engines.md), with room for other models
TYPES = {
    one.name: one
    for one in (
        FileType(name="f32", bits=32, kl=1e-4, nll=0.002),
        FileType(name="int8", bits=9, kl=0.025, nll=0.03),
        FileType(name="int4", bits=5, kl=2.0, nll=0.8),
    )
}
PRECISIONS = {"f32": "fp32", "int8": "int8", "int4": "int4"}  # as the builder calls them


def _check(model: StreamedModel, _kind: FileType) -> list[str]:
    rotary = getattr(model.config, "rope_parameters", None) or {}
    if any(isinstance(part, dict) for part in rotary.values()):
        raise UserError(
            f"{model.checkpoint.path} states its rotary angles for each kind of layer, which ONNX Runtime's builder "
            "does not read; keep to transformers, or export to gguf."
        )
    window = getattr(model.config, "sliding_window", None)
    if window and not getattr(model.config, "layer_types", None) and window < (max_length(model.config) or 0):
        raise UserError(
            f"every layer of {model.checkpoint.path} sees {window} tokens back, and ONNX Runtime fails at texts longer "
            "than that; keep to transformers, or export to gguf."
        )
    return []


def _write(job: Conversion) -> Path:
    return convert(OnnxRuntime(job.installed), job, PRECISIONS[job.kind.name])


def _describe(folder: Path) -> dict[str, Any]:
    return contents(OnnxRuntime(require(ONNXRUNTIME)), folder)


ONNX_DIRECTORY = Format(
    name="onnx",
    engine=ONNXRUNTIME,
    types=TYPES,
    default="f32",
    check=_check,
    write=_write,
    describe=_describe,
)
