"""The record of what a step makes: the history of the model that it was made from, and one entry more."""

from datetime import UTC, datetime
from typing import Any

from prunus import __version__
from prunus.benchmark.machine import machine
from prunus.checkpoint import OutputDirectory, read_record
from prunus.checkpoint.record import Record, new_record
from prunus.settings import Settings


def record_of(output: OutputDirectory, verb: str, settings: Settings, facts: dict[str, Any]) -> Record:
    """The content of `prunus.json`. `facts` are what the entry says beyond what it says of every step.

    What was measured on the input (evaluations, benchmarks, sensitivity) does not hold for the result; sensitivity,
    which may have decided what the step did, goes into the entry.
    """
    source = output.source
    record = read_record(source.path) or new_record(__version__)
    about_input = record.pop("sensitivity", [])
    entry = {
        "step": verb,
        "settings": settings.model_dump(mode="json"),
        "fingerprint": output.fingerprint,
        "input": {"path": str(source.path), "sha256": source.sha256},
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "environment": machine(),
        "sensitivity": about_input,
        **facts,
    }
    history = [*record["history"], entry]
    return {**record, "prunus": __version__, "history": history, "evaluations": [], "benchmarks": []}
