"""OpenVINO: a directory with the graph, its weights, and the files of tokenizer and generation as they were."""

import shutil
from pathlib import Path
from typing import Any

from prunus.checkpoint.directory import CONFIG_NAME
from prunus.engines import OPENVINO, require
from prunus.engines.openvino import OpenVino
from prunus.errors import UserError
from prunus.exporting.formats import Conversion, Format
from prunus.exporting.graphs import contents, convert
from prunus.exporting.types import FileType
from prunus.models import StreamedModel

# bounds: what SmolLM2-135M-Instruct showed (docs/engines.md), with room for other models
TYPES = {
    one.name: one
    for one in (
        FileType(name="f32", bits=32, kl=1e-4, nll=0.002),
        FileType(name="f16", bits=16, kl=1e-4, nll=0.002),
        FileType(name="int8", bits=8.5, kl=0.1, nll=0.1),
        FileType(name="int4", bits=5, kl=2.0, nll=0.8),
    )
}
LAYERS = {"full_attention", "sliding_attention"}


def _check(model: StreamedModel, _kind: FileType) -> list[str]:
    kinds = set(getattr(model.config, "layer_types", None) or [])
    if kinds - LAYERS:
        raise UserError(
            f"{model.checkpoint.path} has layers of {', '.join(sorted(kinds - LAYERS))}, and only attention with keys "
            "and values is made a state of OpenVINO's graph; keep to transformers for this model."
        )
    if any(getattr(model.config, name, None) for name in ("num_experts", "num_local_experts", "n_routed_experts")):
        raise UserError(
            f"{model.checkpoint.path} has experts, and tracing for OpenVINO would keep the choice of one text; export "
            "to gguf or vllm."
        )
    return []


def _write(job: Conversion) -> Path:
    folder = convert(OpenVino(job.installed), job, job.kind.name)
    for file in (*job.checkpoint.side_files, job.checkpoint.path / CONFIG_NAME):
        shutil.copyfile(file, folder / file.name)
    return folder


def _describe(folder: Path) -> dict[str, Any]:
    return contents(OpenVino(require(OPENVINO)), folder)


OPENVINO_DIRECTORY = Format(
    name="openvino",
    engine=OPENVINO,
    types=TYPES,
    default="f16",
    check=_check,
    write=_write,
    describe=_describe,
)
