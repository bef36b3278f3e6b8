"""`prunus sparsify --dry-run`: refuse what the run would refuse, and say what it would take; writes nothing.

Calibration text is read and tokenised, since that is where many a run would end; the model's own samples are not made.
"""

import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from prunus.checkpoint import Checkpoint, OutputDirectory, open_dense
from prunus.checkpoint.output import check_place
from prunus.errors import UserError
from prunus.models import StreamedModel
from prunus.settings import Settings, SparsifySettings
from prunus.sparsity import parse_pattern
from prunus.steps.calibration_text import check_text
from prunus.steps.estimate import Estimate
from prunus.steps.held_out import HELD_OUT
from prunus.steps.identity import identity
from prunus.steps.length import fit_length
from prunus.steps.notices import notices
from prunus.steps.sparsify import estimate

TWICE = (
    "allocation {!r} makes two complete runs, uniform and as asked, and keeps the better: the time is that of both; "
    "finding the allocation and comparing the two on held-out text comes on top."
)
DONE = "{} already is the result of these settings: the run would return at once."


def dry_run(
    model: str | Path,
    out: str | Path,
    *,
    max_memory: str | int | None = None,
    trust_remote_code: bool = False,
    **settings: Any,
) -> tuple[Estimate, list[str]]:
    """Return what `sparsify` with these arguments would take, and what else there is to say of it.

    Raises UserError where that run would, except for what only the weights tell (NaN) or only the work (a full disk).
    """
    checked = SparsifySettings.check(**settings)
    checkpoint = open_dense(model, trust_remote_code=trust_remote_code)
    checked = fit_length(checked, checkpoint.config) if checked.reads_text else checked
    place = Path(out).expanduser().absolute()
    check_place(place, checkpoint.path)
    settings |= {"length": checked.length}
    expected = estimate(model, max_memory=max_memory, trust_remote_code=trust_remote_code, **settings)
    remarks = []
    if checked.allocation != "uniform":
        disk_bytes = expected.disk_bytes + checkpoint.num_bytes
        expected = replace(expected, seconds=2 * expected.seconds, disk_bytes=disk_bytes)
        remarks.append(TWICE.format(checked.allocation))
    if is_done(place, checkpoint, checked, checkpoint.num_bytes + expected.disk_bytes):
        return expected, [*remarks, DONE.format(place)]
    if checked.reads_text:
        more = 0 if checked.allocation == "uniform" else HELD_OUT
        check_text(StreamedModel(checkpoint, dtype=torch.float32), checked, more=more)
    return expected, [*remarks, *_notices(expected)]


def _notices(expected: Estimate) -> list[str]:
    """What the run will say before it starts."""
    wanted = {row["pattern"] for row in expected.by_projection} - {"dense"}
    return notices(parse_pattern(pattern) for pattern in wanted)


def is_done(place: Path, checkpoint: Checkpoint, settings: Settings, num_bytes: int) -> bool:
    """Whether OUT is there already. Raises UserError when it is something else or `num_bytes` cannot be written."""
    partial = place.with_name(place.name + ".partial")
    if not place.exists() and not partial.exists():
        _check_writable(place, num_bytes)
        return False
    output = OutputDirectory(place, checkpoint, identity(settings))  # reads every byte of the weights
    if output.is_done:
        return True
    output.progress()
    return False


def _check_writable(place: Path, num_bytes: int) -> None:
    nearest = next(folder for folder in place.parents if folder.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
        raise UserError(f"cannot write {place} (in {nearest} no directory can be made); choose another OUT.")
    free = shutil.disk_usage(nearest).free
    if num_bytes > free:
        raise UserError(f"no space: {place} needs {num_bytes / 1e9:.1f} GB and its disk has {free / 1e9:.1f} GB free.")
