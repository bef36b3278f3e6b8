"""From a model directory to what an engine loads: formats, types, what fits them, and the proof of the engine."""

from prunus.errors import UserError
from prunus.exporting.formats import Conversion, Format, Target
from prunus.exporting.gguf import GGUF
from prunus.exporting.gguf_types import GGUF_TYPES, GgufType
from prunus.exporting.onnx_directory import ONNX_DIRECTORY
from prunus.exporting.openvino_directory import OPENVINO_DIRECTORY
from prunus.exporting.sparse_directory import SPARSE_DIRECTORY
from prunus.exporting.types import FileType
from prunus.exporting.vllm_directory import VLLM_DIRECTORY

_TABLE = (GGUF, VLLM_DIRECTORY, ONNX_DIRECTORY, OPENVINO_DIRECTORY, SPARSE_DIRECTORY)
FORMATS: dict[str, Format] = {one.name: one for one in _TABLE}

__all__ = ["FORMATS", "GGUF_TYPES", "Conversion", "FileType", "Format", "GgufType", "Target", "parse_target"]


def parse_target(text: str) -> Target:
    """Read "FORMAT" or "FORMAT:TYPE", as `--to` takes it. Raises UserError with those there are."""
    form, colon, name = text.partition(":")
    if form not in FORMATS:
        known = "; ".join(f"{one.name}:TYPE with TYPE one of {', '.join(one.types)}" for one in FORMATS.values())
        raise UserError(f"cannot export to {text!r}; write {known} (or {', '.join(FORMATS)} alone).")
    types, name = FORMATS[form].types, name.lower() if colon else FORMATS[form].default
    if name not in types:
        raise UserError(f"{form} type {name!r} is not one that prunus writes; allowed are {', '.join(types)}.")
    return Target(FORMATS[form], types[name])
