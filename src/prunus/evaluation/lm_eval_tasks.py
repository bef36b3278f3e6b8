"""Tasks of lm-evaluation-harness (extra `eval`): its task definitions, its metrics, run on the model directory."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from prunus.errors import UserError


def lm_eval_tasks(
    model: Path,
    tasks: Sequence[str],
    *,
    limit: int | None = None,
    batch_size: int = 8,
    dtype: str = "float32",
    device: str = "cpu",
    include_path: Path | None = None,
) -> list[dict[str, Any]]:
    """Return one result per task: every metric lm-eval reports, the task's version and the conditions.

    `include_path` is a folder with task files of your own. UserError when the extra or a task is missing.
    """
    try:
        import lm_eval
        from lm_eval.tasks import TaskManager
    except ImportError:
        raise UserError("Tasks need the extra 'eval': pip install 'prunus[eval]'.") from None
    manager = TaskManager(include_path=None if include_path is None else str(include_path))
    _check_names(tasks, manager.all_tasks)
    results = lm_eval.simple_evaluate(
        model="hf",
        model_args={"pretrained": str(model), "dtype": dtype},
        tasks=list(tasks),
        limit=limit,
        batch_size=batch_size,
        device=device,
        task_manager=manager,
        log_samples=False,
    )
    shared = {"engine": f"lm-eval {lm_eval.__version__}", "dtype": dtype, "batch": batch_size, "limit": limit}
    return [_result(name, results, shared) for name in results["results"]]


def _check_names(tasks: Sequence[str], known: Sequence[str]) -> None:
    unknown = [task for task in tasks if task not in known]
    if unknown:
        raise UserError(f"lm-eval has no task {', '.join(unknown)}: `lm-eval ls tasks` lists its {len(known)} tasks.")


def _result(name: str, results: dict[str, Any], shared: dict[str, Any]) -> dict[str, Any]:
    metrics = {key: value for key, value in results["results"][name].items() if isinstance(value, int | float)}
    return {
        "kind": "lm-eval",
        "dataset": name,
        "version": results["versions"].get(name),
        "shots": results["n-shot"].get(name),
        **shared,
        "metrics": metrics,
    }
