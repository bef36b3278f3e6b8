"""Tasks of lm-evaluation-harness (extra `eval`): its task definitions, its metrics, run on the model directory."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from prunus.errors import UserError
from prunus.evaluation.source import check_finite


def lm_eval_tasks(
    model: Path,
    tasks: Sequence[str],
    *,
    limit: int | None = None,
    batch_size: int = 8,
    dtype: str = "float32",
    device: str = "cpu",
    trust_remote_code: bool = False,
    include_path: Path | None = None,
) -> list[dict[str, Any]]:
    """Return one result per task: every metric lm-eval reports, the task's version and the conditions.

    `include_path` is a folder with task files of your own. UserError when the extra or a task is missing, and when a
    metric is NaN.
    """
    manager = find_tasks(tasks, include_path)
    import lm_eval

    results = lm_eval.simple_evaluate(
        model="hf",
        model_args={"pretrained": str(model), "dtype": dtype, "trust_remote_code": trust_remote_code},
        tasks=list(tasks),
        limit=limit,
        batch_size=batch_size,
        device=device,
        task_manager=manager,
        log_samples=False,
    )
    ran = {"dtype": dtype, "device": device, "batch": batch_size, "limit": limit}
    shared = {"engine": f"lm-eval {lm_eval.__version__}", **ran}
    found = [_result(name, results, shared) for name in results["results"]]
    for one in found:
        check_finite(one["metrics"], str(model), one["dataset"])
    return found


def find_tasks(tasks: Sequence[str], include_path: Path | None = None) -> Any:
    """Return lm-eval's task manager, which knows all these tasks. UserError when the extra or a task is missing."""
    try:
        from lm_eval.tasks import TaskManager
    except ImportError:
        raise UserError("Tasks need the extra 'eval': pip install 'prunus[eval]'.") from None
    manager = TaskManager(include_path=None if include_path is None else str(include_path))
    known = manager.all_tasks
    unknown = [task for task in tasks if task not in known]
    if unknown:
        raise UserError(f"lm-eval has no task {', '.join(unknown)}: `lm-eval ls tasks` lists its {len(known)} tasks.")
    return manager


def _result(name: str, results: dict[str, Any], shared: dict[str, Any]) -> dict[str, Any]:
    given = results["results"][name]
    metrics = {
        key: value for key, value in given.items() if isinstance(value, int | float) and not _no_error(key, value)
    }
    return {
        "kind": "lm-eval",
        "dataset": name,
        "version": results["versions"].get(name),
        "shots": results["n-shot"].get(name),
        **shared,
        "metrics": metrics,
    }


def _no_error(key: str, value: float) -> bool:
    """A standard error that cannot be had, as of a single question: lm-eval calls it NaN."""
    return "_stderr" in key and math.isnan(value)
