"""What each engine can load of one run, as what, and what the run gains there. No weight is read.

The answers come from the checks that an export makes, and from the record of the run.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from prunus.checkpoint import Checkpoint, open_checkpoint, read_record
from prunus.checkpoint.per_layer import OPENED_BY, layer_fields
from prunus.engines import ENGINES, Engine, Installed, find
from prunus.errors import UserError
from prunus.exporting import FORMATS, Format, Target
from prunus.exporting.exported import Exported, find_exported
from prunus.models import StreamedModel
from prunus.models.skeleton import check_config
from prunus.reporting.record import Run
from prunus.reporting.shapes import shapes
from prunus.reporting.text import interval
from prunus.steps.export import check_engine, check_target

Fit = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Subject:
    """What is asked about. `model` is None for a file that only its own engine reads."""

    run: Run
    model: StreamedModel | None
    exported: Exported | None


def engine_fit(model: str | Path, *, trust_remote_code: bool = False) -> list[Fit]:
    """One row for each engine: installed or not, what it takes of `model`, what it refuses and why, and the gains.

    `model` is a model directory or what `prunus export` made; a hub name is downloaded. Raises UserError for
    anything else.
    """
    exported = find_exported(model)
    streamed = None
    if exported is None or exported.load.is_dir():
        checkpoint = open_checkpoint(model, trust_remote_code=trust_remote_code)
        check_config(checkpoint.config, trust_remote_code=trust_remote_code)
        streamed = StreamedModel(checkpoint, dtype=torch.float32)
    path = exported.directory if exported else streamed.checkpoint.path if streamed else Path(model)
    subject = Subject(Run(path.name, read_record(path) or {}), streamed, exported)
    return [_row(engine, subject) for engine in ENGINES.values()]


def _row(engine: Engine, subject: Subject) -> Fit:
    installed = find(engine)
    takes, refuses = _fit(engine, installed, subject)
    return {
        "engine": engine.name,
        "installed": installed is not None,
        "versions": installed.versions if installed else None,
        "install": f"prunus engines install {engine.name}" if engine.packages else None,
        "takes": takes,
        "refuses": refuses,
        "gains": _gains(engine, subject.run) if takes else [],
    }


def _fit(engine: Engine, installed: Installed | None, subject: Subject) -> tuple[list[Fit], list[Fit]]:
    """What the engine takes, and what it refuses: each with what it would be read as."""
    exported = subject.exported
    if exported is not None and exported.engine is engine:
        return [{"as": f"{exported.target}, as it was exported", "notes": []}], []
    if subject.model is None:
        assert exported is not None
        why = f"only {exported.engine.name} reads {exported.target}; ask about what it was made from, {exported.source}"
        return [], [{"as": ["as it is"], "why": why}]
    forms = [form for form in FORMATS.values() if form.engine is engine]
    if not forms:
        return [_in_transformers(subject.model.checkpoint)], []
    try:
        if installed is not None:
            check_engine(subject.model.checkpoint, engine)
    except UserError as error:
        return [], [{"as": [form.name for form in forms], "why": str(error)}]
    return _targets(subject.model, forms)


def _in_transformers(checkpoint: Checkpoint) -> Fit:
    per_layer = layer_fields(checkpoint.config) is not None
    return {"as": "by prunus.load" if per_layer else "as it is", "notes": [OPENED_BY] if per_layer else []}


def _targets(model: StreamedModel, forms: list[Format]) -> tuple[list[Fit], list[Fit]]:
    """Every type that fits, with its size, and every other under the sentence that an export would end with."""
    takes: list[Fit] = []
    refused: dict[str, list[str]] = {}
    for form in forms:
        for kind in form.types.values():
            if kind.keeps and model.checkpoint.scheme is None:
                continue  # a type of quantized models alone
            name = f"{form.name}:{kind.name}"
            try:
                notes = check_target(model, Target(form, kind))
            except UserError as error:
                refused.setdefault(str(error), []).append(name)
            else:
                takes.append({"as": f"--to {name}", "about_bytes": form.size(model, kind), "notes": notes})
    return takes, [{"as": names, "why": why} for why, names in refused.items()]


def _gains(engine: Engine, run: Run) -> list[str]:
    """What was done to the model, and what that brings in this engine: measured, where it was."""
    return [*_of_zeros(engine, run), *_of_shapes(engine, run), *_measured(engine, run)] or [
        "nothing that prunus knows of: no record of zeros or of smaller shapes is here."
    ]


def _of_zeros(engine: Engine, run: Run) -> list[str]:
    pattern = run.setting("pattern")
    named = f" ({pattern})" if pattern else ""
    return [f"{run.sparsity:.0%} zeros in the pruned matrices{named} bring {engine.zeros}."] if run.sparsity else []


def _of_shapes(engine: Engine, run: Run) -> list[str]:
    changed = shapes(run)
    if changed is None or changed.parameters_left is None:
        return []
    read = changed.after["decode_bytes"] / changed.before["decode_bytes"]
    return [
        f"{1 - changed.parameters_left:.0%} fewer parameters: a decoded token reads {read:.2f} of the bytes, so decode "
        f"is at most {1 / read:.2f} times as fast; what follows the shapes: {engine.shapes}."
    ]


def _measured(engine: Engine, run: Run) -> list[str]:
    """The last speed-up over the dense model that is on record here."""
    found = [one for one in run.benchmarks if one.get("engine") == engine.name and one.get("speedup")]
    return [f"measured: decode {interval(found[-1]['speedup']['decode'])} of the dense model."] if found else []
