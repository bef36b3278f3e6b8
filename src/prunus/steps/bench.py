"""`prunus.bench`: how fast a model is on a named engine, interleaved with the dense model it came from."""

from pathlib import Path
from typing import Any

from prunus.benchmark import measure
from prunus.checkpoint import add_to_record, open_checkpoint, read_record
from prunus.settings import BenchSettings
from prunus.steps.done import done_before, mark
from prunus.steps.keep import results_survive


def bench(
    model: str | Path, *, skip_done: bool = False, trust_remote_code: bool = False, **settings: Any
) -> dict[str, Any]:
    """Measure latency, throughput and memory; `settings` are the fields of `BenchSettings`.

    In a directory that prunus made, the result is added to `prunus.json`; with `skip_done`, a result of the same
    settings that is already there is returned instead. Raises UserError for anything the user can mend.
    """
    checked = BenchSettings.check(**settings)
    checkpoint = open_checkpoint(model, trust_remote_code=trust_remote_code)
    record = read_record(checkpoint.path)
    if skip_done and (found := done_before(record, "benchmarks", checked)):
        return found[0]
    values = checked.model_dump(exclude={"against"})
    dense = open_checkpoint(checked.against, trust_remote_code=trust_remote_code).path if checked.against else None
    result = measure(checkpoint.path, against=dense, trust_remote_code=trust_remote_code, **values)
    with results_survive(checkpoint.path):
        add_to_record(checkpoint.path, "benchmarks", mark([result], checked))
    return result
