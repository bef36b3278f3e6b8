"""A model directory while it is being written: complete, or absent under its own name.

Everything goes into `OUT.partial` beside OUT, shard by shard (write, fsync, rename), progress after each block, the
index last; one rename makes it OUT. A killed process leaves a partial directory that the same command goes on from; a
lock keeps a second process out.
"""

import errno
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from prunus.checkpoint.directory import CONFIG_NAME, INDEX_NAME, Checkpoint, read_header
from prunus.checkpoint.per_layer import stored_config
from prunus.checkpoint.record import RECORD_NAME, read_record, write_json
from prunus.errors import UserError

PROGRESS_NAME = "progress.json"
LOCK_NAME = "lock"
TRAINING = "training"  # files of this prefix are what an interrupted training goes on from


def fingerprint(settings: dict[str, Any], source: Checkpoint) -> str:
    """Hash of what decides the content of an output: the step's settings and the input's bytes."""
    text = json.dumps({"settings": settings, "input": source.sha256}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


class OutputDirectory:
    """Use as a context manager; raises UserError when OUT cannot become the result of this step."""

    def __init__(self, out: Path, source: Checkpoint, settings: dict[str, Any]) -> None:
        self.out = out.expanduser().absolute()
        self.partial = self.out.with_name(self.out.name + ".partial")
        self.source = source
        self.fingerprint = fingerprint(settings, source)
        self.files: dict[str, str] = {}  # tensor -> shard
        check_place(self.out, source.path)

    @property
    def is_done(self) -> bool:
        """Whether OUT already is the result of this very step. Raises UserError when it is something else."""
        if not self.out.exists():
            return False
        record = read_record(self.out) if self.out.is_dir() else None
        history = record["history"] if record else []
        if history and history[-1].get("fingerprint") == self.fingerprint:
            self._clean()
            return True
        raise UserError(f"{self.out} exists and is not the result of these settings; remove it or choose another OUT.")

    def __enter__(self) -> Self:
        if self.partial.exists() and not (self.partial / LOCK_NAME).exists() and any(self.partial.iterdir()):
            raise UserError(f"{self.partial} is in the way and was not made by prunus; move it or choose another OUT.")
        with full_disk_is_an_error(self.out):
            self.partial.mkdir(parents=True, exist_ok=True)
        self._lock = (self.partial / LOCK_NAME).open("w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.fstat(self._lock.fileno()).st_nlink == 0:  # its owner was through and removed it a moment ago
                raise BlockingIOError
        except BlockingIOError as error:
            self._lock.close()
            raise UserError(f"another process is writing {self.out}; wait for it or choose another OUT.") from error
        self._clear_what_nobody_goes_on_from()
        return self

    def _clear_what_nobody_goes_on_from(self) -> None:
        """Drop what a killed process left: half-written files and, before its first block, all of them.

        Those may be of another model. safetensors writes to a `.tmp...` file of its own and renames it.
        """
        goes_on = (self.partial / PROGRESS_NAME).exists()
        for file in self.partial.iterdir():
            half_written = file.suffix == ".tmp" or file.name.startswith(".tmp")
            if file.is_file() and file.name != LOCK_NAME and (half_written or not goes_on):
                file.unlink()

    def __exit__(
        self, _type: type[BaseException] | None, _error: BaseException | None, _traceback: TracebackType | None
    ) -> None:
        self._drop_partial()
        self._lock.close()

    def _drop_partial(self) -> None:
        """Remove the partial directory unless a run can go on from it."""
        if not (self.partial / PROGRESS_NAME).exists():
            shutil.rmtree(self.partial, ignore_errors=True)

    def progress(self) -> dict[str, Any] | None:
        """What an interrupted run of this same step saved last; None for a fresh start.

        Raises UserError when the partial directory belongs to other settings or another input.
        """
        file = self.partial / PROGRESS_NAME
        if not file.is_file():
            return None
        saved: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        if saved["fingerprint"] != self.fingerprint:
            raise UserError(
                f"{self.partial} holds an unfinished run with other settings or another input; finish it with the same "
                "command, remove it, or choose another OUT."
            )
        self.files = saved["files"]
        return saved

    def save_progress(self, state: dict[str, Any]) -> None:
        with full_disk_is_an_error(self.out):
            write_json(self.partial / PROGRESS_NAME, {**state, "fingerprint": self.fingerprint, "files": self.files})

    def write_shard(self, name: str, tensors: dict[str, Tensor]) -> None:
        """Write one weight file: complete or absent."""
        with full_disk_is_an_error(self.out):
            write_tensors(self.partial / name, tensors)
        self.files |= dict.fromkeys(tensors, name)

    def finish(self, record: dict[str, Any], config: dict[str, Any] | None = None) -> None:
        """Write side files, config (None: that of the source), record and, last, the index; then give it its name."""
        with full_disk_is_an_error(self.out):
            for file in self.source.side_files:
                shutil.copyfile(file, self.partial / file.name)
            if config is not None:
                write_json(self.partial / CONFIG_NAME, stored_config(config))
            write_json(self.partial / RECORD_NAME, record)
            shards = [read_header(self.partial / name) for name in sorted(set(self.files.values()))]
            total = sum(info.num_bytes for shard in shards for info in shard.values())
            index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(self.files.items()))}
            write_json(self.partial / INDEX_NAME, index)
        self.publish()

    def publish(self) -> None:
        """Give the complete partial directory its name."""
        with full_disk_is_an_error(self.out):
            self.partial.rename(self.out)
            sync_directory(self.out.parent)
        self._clean()

    def _clean(self) -> None:
        """Drop what only a resume needs. After the rename, so that an interruption at any point loses nothing."""
        patterns = ("hidden-*", "prunus-waiting-*", f"{TRAINING}-*")
        waiting = [file for pattern in patterns for file in self.out.glob(pattern)]
        for file in [*waiting, self.out / PROGRESS_NAME, self.out / LOCK_NAME]:
            file.unlink(missing_ok=True)
        with suppress(OSError):  # there is none, or somebody's search is not through
            trials_of(self.out).rmdir()
        self._drop_partial()


def write_tensors(file: Path, tensors: dict[str, Tensor]) -> None:
    """Write one safetensors file: complete or absent."""
    temporary = file.with_name(file.name + ".tmp")
    save_file({k: t.contiguous().cpu() for k, t in tensors.items()}, temporary, metadata={"format": "pt"})
    with temporary.open("rb") as stream:
        os.fsync(stream.fileno())
    temporary.replace(file)


def trials_of(out: Path) -> Path:
    """Where a step that tries several models for OUT makes them; empty once one of them has become OUT."""
    return out.with_name(out.name + ".allocation")


def check_place(out: Path, source: Path) -> None:
    """Refuse an OUT inside MODEL, around it, or the same."""
    resolved = out.resolve()
    if resolved == source or source in resolved.parents:
        raise UserError(f"OUT {out} lies inside MODEL {source}; choose a directory of its own.")
    if resolved in source.parents:
        raise UserError(f"MODEL {source} lies inside OUT {out}; choose a directory of its own.")


def sync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def full_disk_is_an_error(out: Path) -> Iterator[None]:
    """Turn "no space left" and "not allowed" into a sentence, whichever library met it."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left" in str(error):
            raise UserError(
                f"no space left on the disk of {out}; free some and run the same command to go on from here."
            ) from error
        if isinstance(error, PermissionError | NotADirectoryError | FileExistsError):
            raise UserError(f"cannot write {out} ({error.strerror}); choose another OUT.") from error
        raise
