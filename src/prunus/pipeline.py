"""The only place where steps are chained: each takes the directory the last one made; what is done is skipped.

The last step that makes a model writes OUT itself, the ones before it `OUT.steps/1-sparsify`, `OUT.steps/2-...`.
In a recipe, `against: dense` and `teacher: dense` mean the recipe's own model.
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from prunus.checkpoint import open_checkpoint
from prunus.checkpoint.output import check_place
from prunus.errors import UserError
from prunus.models import StreamedModel
from prunus.recipe import MAKES_A_MODEL, Recipe, Step, load_recipe
from prunus.result import Run
from prunus.settings import BenchSettings, EvaluateSettings, ReportSettings, SparsifySettings
from prunus.settings_shrink import ShrinkSettings
from prunus.sparsity import METHODS
from prunus.sparsity.methods import make_options
from prunus.steps.bench import bench
from prunus.steps.evaluate import evaluate
from prunus.steps.plan import make_plan
from prunus.steps.recover import recover
from prunus.steps.report import report
from prunus.steps.shrink import plan_cuts, shrink
from prunus.steps.sparsify import sparsify
from prunus.text.sources import check_exists, parse_source


def run(
    recipe: Recipe | str | Path,
    out: str | Path,
    *,
    max_memory: str | int | None = None,
    trust_remote_code: bool = False,
) -> Run:
    """Carry out a recipe (a file or a Recipe) and return the final run, with what every step gave in `steps`.

    The same call again skips what is done and goes on where it was interrupted. Raises UserError before any weight is
    read when a step cannot work on this model.
    """
    recipe = recipe if isinstance(recipe, Recipe) else load_recipe(Path(recipe))
    check_recipe(recipe, Path(out), trust_remote_code)
    targets = _targets(recipe, Path(out))
    current: str | Path = recipe.model
    result: Run | None = None
    given: list[dict[str, Any]] = []
    for step in recipe.steps:
        if step.verb in MAKES_A_MODEL:
            result = _make(step, recipe.model, current, next(targets), max_memory, trust_remote_code)
            current = result.path
            given.append(result.summary())
        else:
            given.append(_observe(step, recipe.model, current, max_memory, trust_remote_code))
    assert result is not None
    return replace(Run.open(result.path, reused=result.reused), steps=tuple(given))


def check_recipe(recipe: Recipe, out: Path, trust_remote_code: bool) -> None:
    """Check recipe x model before weights are read. Raises UserError naming the step."""
    if not any(step.verb in MAKES_A_MODEL for step in recipe.steps):
        raise UserError(f"the recipe makes no model; add a step such as {' or '.join(sorted(MAKES_A_MODEL))}.")
    checkpoint = open_checkpoint(recipe.model, trust_remote_code=trust_remote_code)
    check_place(out.expanduser().absolute(), checkpoint.path)
    spec, config = StreamedModel(checkpoint, dtype=torch.float32).spec, checkpoint.config
    for step in recipe.steps:
        if isinstance(step.settings, SparsifySettings):
            s = step.settings
            make_options(METHODS[s.method].options, s.options)
            make_plan(spec, METHODS[s.method], s.pattern, s.overrides, s.protect, s.head)
        if isinstance(step.settings, ShrinkSettings):
            cuts = plan_cuts(config, step.settings, trust_remote_code)
            config = cuts[-1].config if cuts else config
        texts = [text for key in ("calibration", "data", "text") for text in getattr(step.settings, key, ())]
        for text in texts:
            check_exists(parse_source(text))


def _targets(recipe: Recipe, out: Path) -> Iterator[Path]:
    """Where each step that makes a model writes it, in order."""
    verbs = [step.verb for step in recipe.steps if step.verb in MAKES_A_MODEL]
    yield from (Path(f"{out}.steps") / f"{number}-{verb}" for number, verb in enumerate(verbs[:-1], start=1))
    yield out


def _make(step: Step, dense: str, model: str | Path, target: Path, max_memory: str | int | None, trust: bool) -> Run:
    values = step.settings.model_dump(exclude_unset=True)
    if values.get("teacher") == "dense":
        values["teacher"] = dense
    make = {"sparsify": sparsify, "shrink": shrink, "recover": recover}[step.verb]
    return make(model, target, max_memory=max_memory, trust_remote_code=trust, **values)


def _observe(step: Step, dense: str, current: str | Path, max_memory: str | int | None, trust: bool) -> dict[str, Any]:
    """Measure or report, and return what the command of this step ends its output with."""
    values: dict[str, Any] = step.settings.model_dump(exclude_unset=True)
    if values.get("against") == "dense":
        values["against"] = dense
    if isinstance(step.settings, EvaluateSettings):
        results = evaluate(current, max_memory=max_memory, skip_done=True, trust_remote_code=trust, **values)
        return {"step": step.verb, "model": str(current), "results": results}
    if isinstance(step.settings, BenchSettings):
        return {"step": step.verb, **bench(current, skip_done=True, trust_remote_code=trust, **values)}
    assert isinstance(step.settings, ReportSettings)
    return {"step": step.verb, "output": str(report([current], **values))}
