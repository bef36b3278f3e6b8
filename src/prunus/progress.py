"""Progress lines with time left, on stderr, for everything that takes more than a moment."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

console = Console(stderr=True)


@contextmanager
def progress(description: str, total: int, done: int = 0) -> Iterator[Callable[[int], None]]:
    """Show one progress bar while the body runs; yields `advance(steps)`.

    Silent when stderr is not a terminal, so logs stay readable and tests quiet.
    """
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True, disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task(description, total=total, completed=done)

        def advance(steps: int) -> None:
            bar.advance(task, steps)

        yield advance


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Within the context, transformers and the hub show no bars of their own."""
    from huggingface_hub.utils.tqdm import disable_progress_bars, enable_progress_bars
    from transformers.utils import logging

    disable_progress_bars()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        enable_progress_bars()
        logging.enable_progress_bar()
