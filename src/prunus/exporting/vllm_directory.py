"""vLLM reads a model directory as it is: weights in one precision, and everything beside them that serving needs.

The type is the precision that the weights are stored and computed in, or the scheme of a quantized model, whose weights
stay as they are and which is computed in bfloat16. Weight files that have it already become hard
links where the disk allows it; prunus never writes into a weight file, and neither does an engine.
"""

import json
import os
import platform
import shutil
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from prunus.checkpoint import Checkpoint, open_checkpoint
from prunus.checkpoint.directory import CONFIG_NAME, INDEX_NAME, TensorInfo, read_raw_config
from prunus.checkpoint.output import write_tensors
from prunus.checkpoint.record import write_json
from prunus.engines import VLLM
from prunus.engines.vllm import HEAD_SIZES
from prunus.errors import UserError
from prunus.exporting.formats import Conversion, Format
from prunus.exporting.types import FileType
from prunus.exporting.widths import check_head_width
from prunus.models import StreamedModel
from prunus.models.axes import shapes_of
from prunus.models.configs import with_dtype
from prunus.models.footprint import footprint
from prunus.models.limits import head_size

# bounds: about four times what SmolLM2-135M-Instruct showed, of the schemes what a tiny Llama showed (docs/engines.md),
# but of w8a8, which was at most .038 without AVX-512 and .007 with it; bfloat16 is that of its activations too
TYPES = {
    one.name: one
    for one in (
        FileType(name="bf16", bits=16, kl=1e-2, nll=0.02),
        FileType(name="f16", bits=16, kl=2e-4, nll=0.005),
        FileType(name="f32", bits=32, kl=1e-4, nll=0.002),
        FileType(name="w8a8", bits=8, kl=0.06, nll=0.05, keeps=True),
        FileType(name="int4-g128", bits=4.125, kl=0.03, nll=0.05, keeps=True),
        FileType(name="int4-g32", bits=4.5, kl=0.03, nll=0.05, keeps=True),
        FileType(name="fp8", bits=8, kl=0.15, nll=0.1, keeps=True),
    )
}
DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32}


def _check(model: StreamedModel, kind: FileType) -> list[str]:
    """Raise UserError for heads that vLLM gets wrong, and for weights that it cannot multiply on this processor."""
    _check_heads(model)
    if kind.name.startswith("int4") and lacks_avx512():
        raise UserError(
            f"vLLM multiplies 4-bit weights by AVX-512 alone, which this processor has not; export {kind.name} on one "
            "that has it, quantize to w8a8, or export the unquantized model to gguf:q4_k_m."
        )
    serve = "vLLM makes bfloat16 of float32 by itself: serve this directory with `--dtype float32`."
    return [serve] if kind.name == "f32" else []


def _check_heads(model: StreamedModel) -> None:
    """Raise UserError for heads that vLLM's attention on the CPU has no code for, or whose width it gets wrong."""
    if (width := head_size(model.config)) not in HEAD_SIZES:
        raise UserError(
            f"the heads of {model.checkpoint.path} are {width} wide, and vLLM on the CPU takes "
            f"{', '.join(map(str, HEAD_SIZES))}; export to gguf instead, or keep to transformers for this model."
        )
    check_head_width(model.checkpoint, "vLLM")


def lacks_avx512() -> bool:
    """Whether this is a processor of Intel's or AMD's without it."""
    is_theirs = platform.machine().lower() in ("x86_64", "amd64")
    return is_theirs and torch.backends.cpu.get_cpu_capability() in ("DEFAULT", "AVX2")


def _write(job: Conversion) -> Path:
    checkpoint = job.checkpoint
    for file in checkpoint.side_files:
        shutil.copyfile(file, job.folder / file.name)
    if job.kind.keeps:
        _keep_weights(checkpoint, job.folder)
    else:
        _write_in(checkpoint, DTYPES[job.kind.name], job.folder)
    return job.folder


def _keep_weights(checkpoint: Checkpoint, folder: Path) -> None:
    """The files of a quantized model, and a config that says what it is computed in."""
    for file in sorted({info.file for info in checkpoint.parts.values()}):
        _link(file, folder / file.name)
    if (index := checkpoint.path / INDEX_NAME).is_file():
        shutil.copyfile(index, folder / INDEX_NAME)
    write_json(folder / CONFIG_NAME, with_dtype(read_raw_config(checkpoint.path), torch.bfloat16))


def _write_in(checkpoint: Checkpoint, dtype: torch.dtype, folder: Path) -> None:
    """The model in one precision."""
    for file in sorted({info.file for info in checkpoint.tensors.values()}):
        names = [name for name, info in checkpoint.tensors.items() if info.file == file]
        _write_weights(checkpoint, names, file, folder / file.name, dtype)
    write_json(folder / CONFIG_NAME, with_dtype(read_raw_config(checkpoint.path), dtype))
    index = checkpoint.path / INDEX_NAME
    if index.is_file():
        total = sum(_stored(info, dtype).itemsize * info.num_elements for info in checkpoint.tensors.values())
        stated = json.loads(index.read_text(encoding="utf-8"))
        write_json(folder / INDEX_NAME, {**stated, "metadata": {"total_size": total}})


def _write_weights(
    checkpoint: Checkpoint, names: Sequence[str], source: Path, target: Path, dtype: torch.dtype
) -> None:
    """One weight file: the same one, where nothing in it changes."""
    infos = [checkpoint.tensors[name] for name in names]
    if all(info.dtype == _stored(info, dtype) for info in infos):
        _link(source, target)
        return
    write_tensors(target, {name: checkpoint.read(name).to(_stored(checkpoint.tensors[name], dtype)) for name in names})


def _link(source: Path, target: Path) -> None:
    """The same file under another name; a copy on another disk, or one that knows no links."""
    with suppress(OSError):
        os.link(source, target)
        return
    shutil.copyfile(source, target)


def _stored(info: TensorInfo, dtype: torch.dtype) -> torch.dtype:
    """What a tensor is stored in: masks and numbers stay what they are."""
    return dtype if info.dtype.is_floating_point else info.dtype


def _describe(folder: Path) -> dict[str, Any]:
    checkpoint = open_checkpoint(folder)
    model = StreamedModel(checkpoint, dtype=torch.float32)
    weight, stored = footprint(model, shapes_of(model.config), model.config), checkpoint.parts or checkpoint.tensors
    return {
        "tensors": dict(Counter(str(info.dtype).removeprefix("torch.") for info in stored.values())),
        "parameters": weight.parameters,
        "decode_bytes_per_token": weight.decode_bytes,
    }


VLLM_DIRECTORY = Format(
    name="vllm",
    engine=VLLM,
    types=TYPES,
    default="bf16",
    check=_check,
    write=_write,
    describe=_describe,
)
