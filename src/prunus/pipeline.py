"""The only place where steps are chained: each takes the directory the last one made; what is done is skipped.

The last step that makes a model writes OUT itself, the ones before it `OUT.steps/1-sparsify`, `OUT.steps/2-...`.
In a recipe, `against: dense` and `teacher: dense` mean the recipe's own model.
"""

import os
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from prunus.benchmark.prompts import chosen_prompts
from prunus.checkpoint import open_dense, read_record
from prunus.checkpoint.output import check_place, full_disk_is_an_error
from prunus.envelope import Envelope
from prunus.errors import UserError
from prunus.exporting import parse_target
from prunus.models import StreamedModel
from prunus.models.axes import shapes_of
from prunus.progress import say
from prunus.quantizing import SCHEMES
from prunus.recipe import MAKES_A_MODEL, Recipe, Step, load_recipe
from prunus.result import Run
from prunus.settings import BenchSettings, EvaluateSettings, ExportSettings, ReportSettings, SparsifySettings
from prunus.settings_quantize import QuantizeSettings
from prunus.settings_shrink import ShrinkSettings
from prunus.sparsity import METHODS
from prunus.sparsity.methods import make_options
from prunus.steps.bench import bench
from prunus.steps.evaluate import evaluate
from prunus.steps.export import check_engine, check_scheme, export
from prunus.steps.layer_choice import layer_budget
from prunus.steps.plan import make_plan
from prunus.steps.quantize import quantize
from prunus.steps.quantize_plan import check_quantize
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
    read when a step cannot work on this model. Under an envelope the recipe stops at the first evaluation outside it:
    OUT is the last model within, and `stopped` says why.
    """
    recipe = recipe if isinstance(recipe, Recipe) else load_recipe(Path(recipe))
    check_recipe(recipe, Path(out), trust_remote_code)
    return _Chain(recipe, Path(out), max_memory, trust_remote_code).run()


class _Chain:
    """One call: where it stands, and the last model within the envelope."""

    def __init__(self, recipe: Recipe, out: Path, max_memory: str | int | None, trust: bool) -> None:
        self.recipe, self.out, self.max_memory, self.trust = recipe, out, max_memory, trust
        self.targets = _targets(recipe, out)
        self.current: str | Path = recipe.model
        self.result: Run | None = None
        self.good: Path | None = None
        self.left: list[str] = []  # what the first evaluation outside the envelope said
        self.given: list[dict[str, Any]] = []

    def run(self) -> Run:
        for step in self.recipe.steps:
            if self.left and step.verb in {*MAKES_A_MODEL, "evaluate"} - {"export"}:
                continue  # what is kept is only exported, benched and reported
            self._step(step)
        assert self.result is not None
        reused = self.result.reused
        if self.recipe.envelope is not None:
            reused = publish(Path(self.current), self.out) and reused
        stopped = "; ".join(self.left) or None
        return replace(Run.open(self.out, reused=reused), steps=tuple(self.given), stopped=stopped)

    def _step(self, step: Step) -> None:
        if step.verb in MAKES_A_MODEL:
            self.result = _make(step, self.recipe.model, self.current, next(self.targets), self.max_memory, self.trust)
            self.current = self.result.path
            self.given.append(self.result.summary())
            return
        self.given.append(_observe(step, self.recipe.model, self.current, self.max_memory, self.trust))
        if self.recipe.envelope is not None and isinstance(step.settings, EvaluateSettings):
            self._judge(self.recipe.envelope, self.given[-1]["results"])

    def _judge(self, envelope: Envelope, results: list[dict[str, Any]]) -> None:
        if self.result is None:
            return  # the dense model itself
        self.left = envelope.left_by(results)
        if not self.left:
            self.good = self.result.path
            return
        if self.good is None:
            raise UserError(
                f"the first round left the envelope: {'; '.join(self.left)}. Its model is {self.result.path}; prune "
                "less in a round, recover longer, or widen the envelope."
            )
        say([f"stopped outside the envelope: {'; '.join(self.left)}. The last model within it is kept."])
        self.current = self.good


def publish(model: Path, out: Path) -> bool:
    """Give a finished model the name OUT too; its files are shared, not copied. Returns whether it was there already.

    Raises UserError when OUT is something else.
    """
    record = read_record(out) if out.is_dir() else None
    finished = read_record(model)
    if record is not None and finished is not None and record["history"] == finished["history"]:
        return True
    if out.exists():
        raise UserError(f"{out} exists and is not the result of this recipe; remove it or choose another OUT.")
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    with full_disk_is_an_error(out):
        shutil.copytree(model, partial, copy_function=os.link)
        partial.rename(out)
    return False


def check_recipe(recipe: Recipe, out: Path, trust_remote_code: bool) -> None:
    """Check recipe x model before weights are read. Raises UserError naming the step."""
    if not any(step.verb in MAKES_A_MODEL for step in recipe.steps):
        raise UserError(f"the recipe makes no model; add a step such as {' or '.join(sorted(MAKES_A_MODEL))}.")
    checkpoint = open_dense(recipe.model, trust_remote_code=trust_remote_code)
    check_place(out.expanduser().absolute(), checkpoint.path)
    model, config = StreamedModel(checkpoint, dtype=torch.float32), checkpoint.config
    spec, depth, sizes_known = model.spec, len(model.spec.blocks), True
    for step in recipe.steps:
        if isinstance(step.settings, SparsifySettings):
            s = step.settings
            make_options(METHODS[s.method].options, s.options)
            make_plan(spec, METHODS[s.method], s.pattern, s.overrides, s.protect, s.head)
        if isinstance(step.settings, ShrinkSettings):
            if step.settings.layers is not None:
                depth -= layer_budget(step.settings.of_layers, depth).count
            cuts = plan_cuts(config, step.settings, trust_remote_code)
            config = cuts[-1].config if cuts else config
            sizes_known = sizes_known and step.settings.budget is None
        if isinstance(step.settings, QuantizeSettings) and sizes_known:
            smaller = None if config is checkpoint.config else shapes_of(config, trust_remote_code=trust_remote_code)
            check_quantize(model, SCHEMES[step.settings.scheme], step.settings.pattern, smaller)
        if isinstance(step.settings, ExportSettings):
            target = parse_target(step.settings.to)
            check_scheme(checkpoint, target)
            check_engine(checkpoint, target.format.engine)
        if isinstance(step.settings, BenchSettings):
            chosen_prompts(step.settings.prompts, step.settings.mix)
        texts = [text for key in ("calibration", "data", "text") for text in getattr(step.settings, key, ())]
        for text in texts:
            check_exists(parse_source(text))


def _targets(recipe: Recipe, out: Path) -> Iterator[Path]:
    """Where each step that makes a model writes it, in order; under an envelope nobody knows yet which becomes OUT."""
    verbs = [step.verb for step in recipe.steps if step.verb in MAKES_A_MODEL]
    verbs += ["out"] if recipe.envelope is not None else []
    yield from (Path(f"{out}.steps") / f"{number}-{verb}" for number, verb in enumerate(verbs[:-1], start=1))
    yield out


def _make(step: Step, dense: str, model: str | Path, target: Path, max_memory: str | int | None, trust: bool) -> Run:
    values = step.settings.model_dump(exclude_unset=True)
    if values.get("teacher") == "dense":
        values["teacher"] = dense
    if step.verb == "export":
        return export(model, target, trust_remote_code=trust, **values)
    make = {"sparsify": sparsify, "shrink": shrink, "recover": recover, "quantize": quantize}[step.verb]
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
