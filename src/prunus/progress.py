"""Progress lines with time left, on stderr, for everything that takes more than a moment."""

import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

console = Console(stderr=True)


def say(notices: Iterable[str]) -> None:
    """Print notes for people, word for word."""
    for notice in notices:
        console.print(f"note: {notice}", markup=False, highlight=False, soft_wrap=True)


class Advance(Protocol):
    """`advance(steps, note)`: so many steps further; the note stands behind the bar from then on."""

    def __call__(self, steps: int, note: str = "") -> None: ...


@contextmanager
def progress(description: str, total: int, done: int = 0) -> Iterator[Advance]:
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
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=console, transient=True, disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task(description, total=total, completed=done, note="")

        def advance(steps: int, note: str = "") -> None:
            bar.advance(task, steps)
            bar.update(task, note=note)

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
