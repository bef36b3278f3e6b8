"""From a model directory to what an engine loads: formats, types, what fits them, and the proof of the engine."""

from prunus.exporting import formats
from prunus.exporting.formats import Conversion, Format, Target
from prunus.exporting.gguf import GGUF
from prunus.exporting.gguf_types import GGUF_TYPES, GgufType
from prunus.exporting.types import FileType
from prunus.exporting.vllm_directory import VLLM_DIRECTORY

FORMATS: dict[str, Format] = {one.name: one for one in (GGUF, VLLM_DIRECTORY)}

__all__ = ["FORMATS", "GGUF_TYPES", "Conversion", "FileType", "Format", "GgufType", "Target", "parse_target"]


def parse_target(text: str) -> Target:
    """Read "gguf" or "gguf:q4_k_m", as `--to` takes it. Raises UserError with those there are."""
    return formats.parse_target(text, FORMATS)
