"""`prunus.export`: a model directory in, what an engine loads out, proved by that engine before it gets its name."""

import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from prunus.benchmark.machine import peak_resident_bytes, reset_peak_resident
from prunus.checkpoint import Checkpoint, OutputDirectory, open_checkpoint
from prunus.checkpoint.directory import refuse_packed
from prunus.checkpoint.record import RECORD_NAME, write_json
from prunus.engines import Engine, Installed, require
from prunus.engines.worker import Worker, bytes_of
from prunus.errors import EngineError, UserError
from prunus.exporting import Conversion, Target, parse_target
from prunus.exporting.proof import proof_text, prove
from prunus.exporting.widths import check_uniform
from prunus.models import StreamedModel
from prunus.models.limits import max_length
from prunus.progress import progress, say
from prunus.result import Run
from prunus.settings import ExportSettings
from prunus.steps.history import record_of
from prunus.steps.identity import identity
from prunus.text.batches import TokenBatch


@dataclass(frozen=True, slots=True)
class Export:
    """One checked call: everything that could be refused has been."""

    model: StreamedModel
    target: Target
    settings: ExportSettings
    installed: Installed
    text: TokenBatch
    notices: list[str]
    timeout: float | None

    @property
    def checkpoint(self) -> Checkpoint:
        return self.model.checkpoint


def export(
    model: str | Path,
    out: str | Path,
    *,
    timeout: float | None = None,
    trust_remote_code: bool = False,
    **settings: Any,
) -> Run:
    """Write `model` into the directory `out` as an engine loads it, and have that engine prove it.

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


def check_export(model: StreamedModel, settings: ExportSettings) -> tuple[Target, Installed, list[str]]:
    """The target, its engine, and notes. Raises UserError for a model that the engine or the type does not take."""
    target, checkpoint = _target(settings.to, model.checkpoint), model.checkpoint
    check_scheme(checkpoint, target)
    engine = target.format.engine
    installed = check_engine(checkpoint, engine)
    untested = f"{engine.name} here is not the tested one: {', '.join(installed.untested)}"
    return target, installed, [*([untested] if installed.untested else []), *check_target(model, target)]


def check_target(model: StreamedModel, target: Target) -> list[str]:
    """Notes, from shapes alone. Raises UserError for a model that the format or the type does not take."""
    check_scheme(model.checkpoint, target)
    check_uniform(model.checkpoint, target.format.engine.name)
    return target.format.check(model, target.kind)


def check_scheme(checkpoint: Checkpoint, target: Target) -> None:
    """Raises UserError for a quantized model in another type than its own, and for a dense one in such a type."""
    scheme, kind, form = checkpoint.scheme, target.kind, target.format
    if scheme is None and kind.keeps:
        raise UserError(
            f"{form.name}:{kind.name} is for what `prunus quantize --scheme {kind.name}` wrote, and {checkpoint.path} "
            "is not quantized: quantize it first."
        )
    if scheme is not None and (not kind.keeps or kind.name != scheme.name):
        able = ", ".join(one.name for one in form.types.values() if one.keeps) or "none"
        raise UserError(
            f"{checkpoint.path} is quantized ({scheme.name}), and its full-precision weights are gone; of quantized "
            f"models {form.name} takes, each as it is: {able}. Export the model that it was made from."
        )


def _target(to: str, checkpoint: Checkpoint) -> Target:
    """A format alone means, of a quantized model, its own scheme where the format has it."""
    target, scheme = parse_target(to), checkpoint.scheme
    own = target.format.types.get(scheme.name) if scheme is not None and ":" not in to else None
    return Target(target.format, own) if own is not None else target


def check_engine(checkpoint: Checkpoint, engine: Engine) -> Installed:
    """The installed engine. Raises UserError for an architecture, or code beside the model, that it does not take."""
    installed = require(engine)
    architecture = (checkpoint.config.architectures or ["(none stated)"])[0]
    if architecture not in installed.facts.get("architectures", [architecture]):  # without a list it takes them all
        raise UserError(
            f"{engine.name} does not know the architecture {architecture} (here: {installed.told}); keep to "
            "transformers for this model."
        )
    if any(checkpoint.path.glob("*.py")) and not checkpoint.trust_remote_code:
        raise UserError(
            f"{checkpoint.path} holds Python code, which {engine.name} may run when it converts or loads a model; read "
            "it, then allow it with --trust-remote-code, or remove it."
        )
    return installed


def _checked(model: str | Path, settings: ExportSettings, timeout: float | None, trust_remote_code: bool) -> Export:
    checkpoint = open_checkpoint(model, trust_remote_code=trust_remote_code)
    refuse_packed(checkpoint)
    streamed = StreamedModel(checkpoint, dtype=torch.float32)
    target, installed, notices = check_export(streamed, settings)
    return Export(streamed, target, settings, installed, proof_text(streamed), notices, timeout)


def _check_space(job: Export, out: Path) -> None:
    """What is written, and what a quantizer reads before it, have to fit beside each other."""
    before = job.checkpoint.num_bytes if job.target.kind.in_two_steps else 0
    needed = before + job.target.format.size(job.model, job.target.kind)
    free = shutil.disk_usage(out.parent).free
    if free < needed:
        raise UserError(
            f"{out} needs about {needed / 2**30:.1f} GiB, and {free / 2**30:.1f} are free; choose another disk."
        )


def _run(job: Export, output: OutputDirectory) -> None:
    reset_peak_resident()
    start, kind, engine = time.perf_counter(), job.target.kind, job.target.format.engine
    with progress(f"Export to {kind.name}", total=2) as advance:
        written = job.target.format.write(_conversion(job, output))
        advance(1, "proof")
        proof = prove(engine.started(job.installed), written, job.model, job.text, kind, timeout=job.timeout)
        advance(1)
    if failures := proof.pop("failures"):
        raise EngineError(f"the proof failed, so {output.out} was not written: {'; '.join(failures)}.")
    facts: dict[str, Any] = {
        "seconds": round(time.perf_counter() - start, 2),
        "peak_memory_bytes": peak_resident_bytes(),
    }
    facts |= {"file": str(written.relative_to(output.partial)), "bytes": bytes_of(written)}
    record = record_of(output, "export", job.settings, _facts(job, written, {**facts, "proof": proof}))
    write_json(output.partial / RECORD_NAME, record)
    output.publish()


def _conversion(job: Export, output: OutputDirectory) -> Conversion:
    return Conversion(
        checkpoint=job.checkpoint,
        kind=job.target.kind,
        installed=job.installed,
        folder=output.partial,
        stem=output.out.name,
        timeout=job.timeout or Worker.patience(job.checkpoint.num_bytes),
    )


def _facts(job: Export, written: Path, facts: dict[str, Any]) -> dict[str, Any]:
    installed = job.installed
    return {
        "engine": {
            "name": job.target.format.engine.name,
            "versions": installed.versions,
            "untested": list(installed.untested),
            **{name: value for name, value in installed.facts.items() if name != "architectures"},
        },
        "format": job.target.format.name,
        "type": job.target.kind.name,
        "max_length": max_length(job.model.config),
        **job.target.format.describe(written),
        "notices": job.notices,
        **facts,
    }
