"""A recipe: a model and a list of steps, in YAML, validated before any weight is read.

version: 1
model: org/model
steps:
  - sparsify: {method: admm, pattern: "2:4"}
  - recover: {teacher: dense, data: [train.txt], tokens: 2M}
  - evaluate: {text: [wiki.txt], against: dense}
  - export: {to: "gguf:q4_k_m"}             # optional: OUT is then what the engine loads
  - bench: {against: dense}                 # in that engine, with the dense model exported alike
  - report: {}
envelope: {kl: 0.3, perplexity: 1.15x}    # optional: stop at the first evaluation outside, keep the last model within
"""

from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml

from prunus.envelope import Envelope, parse_envelope
from prunus.errors import UserError
from prunus.settings import (
    BenchSettings,
    EvaluateSettings,
    ExportSettings,
    RecoverSettings,
    ReportSettings,
    Settings,
    SparsifySettings,
)
from prunus.settings_quantize import QuantizeSettings
from prunus.settings_shrink import ShrinkSettings

STEPS: dict[str, type[Settings]] = {
    "sparsify": SparsifySettings,
    "shrink": ShrinkSettings,
    "recover": RecoverSettings,
    "quantize": QuantizeSettings,
    "export": ExportSettings,
    "evaluate": EvaluateSettings,
    "bench": BenchSettings,
    "report": ReportSettings,
}
MAKES_A_MODEL = {"sparsify", "shrink", "recover", "quantize", "export"}
KEYS = {"version", "model", "steps", "envelope"}
ENDS = {
    "quantize": "the full-precision weights are gone by then",
    "export": "what an engine loads is no model directory any more",
}
VERSION = 1


@dataclass(frozen=True, slots=True)
class Step:
    """One verb with its validated settings."""

    verb: str
    settings: Settings


@dataclass(frozen=True, slots=True)
class Recipe:
    """What to do to which model."""

    model: str
    steps: tuple[Step, ...]
    envelope: Envelope | None = None  # the recipe stops at the first evaluation that is outside


def load_recipe(path: Path) -> Recipe:
    """Read a recipe file. Raises UserError: what is wrong, where, and what is allowed."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read recipe {path}: {error.strerror}.") from error
    except (yaml.YAMLError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        # the last five come out of PyYAML itself, for tags that do not fit their values and for deep nesting
        raise UserError(f"recipe {path} is not valid YAML: {' '.join(str(error).split())}.") from error
    return parse_recipe(content)


def parse_recipe(content: Any) -> Recipe:
    """Validate the content of a recipe. Raises UserError."""
    if not isinstance(content, dict):
        raise UserError(f"a recipe is a mapping with {', '.join(sorted(KEYS))}; this one is {type(content).__name__}.")
    if unknown := {str(key) for key in content} - KEYS:
        raise UserError(f"unknown recipe key {sorted(unknown)[0]!r}; allowed are {', '.join(sorted(KEYS))}.")
    if content.get("version") != VERSION:
        raise UserError(f"recipe version {content.get('version')!r} is not known; write version: {VERSION}.")
    model, steps = content.get("model"), content.get("steps")
    if not isinstance(model, str) or not model:
        raise UserError(f"model={model!r} is not a model directory or hub name; write model: org/model.")
    if not isinstance(steps, list) or not steps:
        raise UserError(f"steps={steps!r} is not a list of steps such as '- sparsify: {{pattern: \"2:4\"}}'.")
    parsed = tuple(_parse_step(entry, number) for number, entry in enumerate(steps, start=1))
    _check_order(parsed)
    return Recipe(model, parsed, _parse_envelope(content, parsed))


def _check_order(steps: tuple[Step, ...]) -> None:
    """What must come last, and what an engine cannot be asked."""
    making = [step.verb for step in steps if step.verb in MAKES_A_MODEL]
    for earlier, later in pairwise(making):
        if earlier in ENDS:
            raise UserError(f"the recipe has {later} after {earlier}: {ENDS[earlier]}; put {earlier} last.")
    exported = False
    for step in steps:
        exported = exported or step.verb == "export"
        if exported and isinstance(step.settings, EvaluateSettings) and (step.settings.prompts or step.settings.tasks):
            raise UserError("the recipe has prompts or tasks after export; they run in transformers: put them before.")


def _parse_envelope(content: dict[str, Any], steps: tuple[Step, ...]) -> Envelope | None:
    if "envelope" not in content:
        return None
    measured = [s.settings for s in steps if isinstance(s.settings, EvaluateSettings)]
    if not any(settings.against and settings.text for settings in measured):
        raise UserError(
            "the recipe has an envelope and no step that could leave it; add one such as "
            "'- evaluate: {text: [wiki.txt], against: dense}' after each round."
        )
    return parse_envelope(content["envelope"])


def _parse_step(entry: Any, number: int) -> Step:
    if isinstance(entry, str):
        entry = {entry: {}}
    if not isinstance(entry, dict) or len(entry) != 1:
        raise UserError(f"step {number} is {entry!r}; a step is one verb with its settings: {', '.join(STEPS)}.")
    verb, values = next(iter(entry.items()))
    if verb not in STEPS:
        raise UserError(f"step {number} is {verb!r}; allowed are {', '.join(STEPS)}.")
    values = {} if values is None else values
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise UserError(f"step {number}, {verb}: its settings are {values!r}; write them as a mapping.")
    try:
        return Step(verb, STEPS[verb].check(**values))
    except UserError as error:
        raise UserError(f"step {number}, {verb}: {error}") from error
