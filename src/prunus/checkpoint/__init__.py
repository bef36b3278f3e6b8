"""Model directories: validated and read lazily, written atomically, with their history in `prunus.json`."""

from prunus.checkpoint.directory import Checkpoint, open_checkpoint, open_dense
from prunus.checkpoint.output import OutputDirectory
from prunus.checkpoint.record import add_to_record, read_record

__all__ = ["Checkpoint", "OutputDirectory", "add_to_record", "open_checkpoint", "open_dense", "read_record"]
