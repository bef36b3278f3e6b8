"""The block pass, the one loop over decoder blocks, and the statistics it collects."""

from prunus.calibration.block_pass import BlockPass, Edit, Tensors
from prunus.calibration.hidden_states import HiddenStates
from prunus.calibration.spill import SpillFiles
from prunus.calibration.statistics import Recorder
from prunus.calibration.streamed_source import StreamedSource, embed_all, hidden_shape, walk

__all__ = [
    "BlockPass",
    "Edit",
    "HiddenStates",
    "Recorder",
    "SpillFiles",
    "StreamedSource",
    "Tensors",
    "embed_all",
    "hidden_shape",
    "walk",
]
