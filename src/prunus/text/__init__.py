"""Text sources to token batches: files, datasets, the model's own samples."""

from prunus.text.batches import TokenBatch, calibration_tokens, evaluation_windows
from prunus.text.self_generated import self_generator
from prunus.text.sources import TextSource, parse_source

__all__ = [
    "TextSource",
    "TokenBatch",
    "calibration_tokens",
    "evaluation_windows",
    "parse_source",
    "self_generator",
]
