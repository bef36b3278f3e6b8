"""From a model directory to the file of an engine: types, what fits them, and the proof that the engine computes it."""

from prunus.exporting.gguf_types import GGUF_TYPES, GgufType, parse_target

__all__ = ["GGUF_TYPES", "GgufType", "parse_target"]
