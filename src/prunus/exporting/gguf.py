"""GGUF: llama.cpp's stock converter and, for the types that it does not write, llama.cpp's own quantizer."""

import json
import tempfile
from pathlib import Path
from typing import Any, cast

import torch

from prunus.checkpoint import Checkpoint
from prunus.engines import LLAMA_CPP
from prunus.engines.llama_cpp import convert, quantize
from prunus.exporting.formats import Conversion, Format
from prunus.exporting.generation import check_carried, for_gguf, left_behind
from prunus.exporting.gguf_file import read_gguf, read_sampling
from prunus.exporting.gguf_types import DEFAULT, GGUF_TYPES, GgufType
from prunus.exporting.types import FileType
from prunus.exporting.widths import check_head_width, check_widths
from prunus.models import StreamedModel

SIXTEEN_BITS = {torch.float16: "f16", torch.bfloat16: "bf16"}


def _check(model: StreamedModel, kind: FileType) -> list[str]:
    check_head_width(model.checkpoint, LLAMA_CPP.name)
    width = int(model.checkpoint.config.get_text_config(decoder=True).hidden_size)
    return [*check_widths(model.spec, width, cast(GgufType, kind)), *left_behind(model.checkpoint)]


def _write(job: Conversion) -> Path:
    """Convert, where the converter writes the type; else convert to the model's own precision and quantize that."""
    kind = cast(GgufType, job.kind)
    file = job.folder / f"{job.stem}-{kind.name}.gguf"
    if kind.converted:
        _convert(job, file, kind.name)
    else:
        between = file.with_name("before-quantizing.gguf")
        _convert(job, between, own_precision(job.checkpoint))
        quantize(job.installed, between, file, kind.number, threads=torch.get_num_threads(), timeout=job.timeout)
        between.unlink()
    check_carried(job.checkpoint, file)
    return file


def _convert(job: Conversion, file: Path, outtype: str) -> None:
    """By the stock converter, which is told how the model is sampled: it knows some of transformers' names, not all."""
    with tempfile.TemporaryDirectory() as folder:
        metadata = Path(folder) / "metadata.json"
        metadata.write_text(json.dumps(for_gguf(job.checkpoint)), encoding="utf-8")
        convert(job.installed, job.checkpoint.path, file, outtype, metadata=metadata, timeout=job.timeout)


def own_precision(checkpoint: Checkpoint) -> str:
    """The GGUF type that loses nothing of the checkpoint."""
    dtypes = {info.dtype for info in checkpoint.tensors.values()}
    return SIXTEEN_BITS.get(dtypes.pop(), "f32") if len(dtypes) == 1 else "f32"


def _describe(file: Path) -> dict[str, Any]:
    content = read_gguf(file)
    return {
        "sampling": read_sampling(file),
        "tensors": content.types,
        "parameters": content.parameters,
        "decode_bytes_per_token": content.decode_bytes,
    }


GGUF = Format(
    name="gguf",
    engine=LLAMA_CPP,
    types=GGUF_TYPES,
    default=DEFAULT,
    check=_check,
    write=_write,
    describe=_describe,
)
