"""Where results go once measured: into the record beside the model, and never lost when that cannot be written."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from prunus.checkpoint.record import RECORD_NAME
from prunus.progress import console


@contextmanager
def results_survive(directory: Path) -> Iterator[None]:
    """Within the context, a record that cannot be written is said, not raised: hours of work stand behind it.

    The caller returns the results all the same, and the command line prints them.
    """
    try:
        yield
    except OSError as error:
        console.print(
            f"note: the results are shown but not recorded, since {directory / RECORD_NAME} cannot be written "
            f"({error.strerror}); reports will not have them.",
            markup=False,
            highlight=False,
            soft_wrap=True,
        )
