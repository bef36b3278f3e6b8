"""Reading `prunus.json`: the only file of this room that knows the record's field names and what may be absent."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prunus.errors import UserError

FORMAT = 1


@dataclass(frozen=True, slots=True)
class Run:
    """One run directory's record, and a name that tells it from the other runs on the page."""

    name: str
    record: dict[str, Any]

    @property
    def history(self) -> list[dict[str, Any]]:
        """Every step, the first one first."""
        return list(self.record.get("history") or [])

    @property
    def shrink_steps(self) -> list[dict[str, Any]]:
        """The steps that changed shapes, the first one first; one call may have made several."""
        return [step for step in self.history if step.get("step") == "shrink"]

    @property
    def last_call(self) -> list[dict[str, Any]]:
        """The last step, and those that the same call made before it; empty without history."""
        request = self.history[-1].get("request") if self.history else None
        return [s for s in self.history if s.get("request") == request] if request else self.history[-1:]

    @property
    def matrices(self) -> list[dict[str, Any]]:
        """Each pruned matrix in its last state, with its method, in the order the matrices were first pruned."""
        latest: dict[str, dict[str, Any]] = {}
        for step in self.history:
            method = (step.get("settings") or {}).get("method")
            for matrix in step.get("matrices") or []:
                latest[matrix["name"]] = {"method": method, **matrix}
        return list(latest.values())

    @property
    def sensitivity(self) -> list[dict[str, Any]]:
        """KL of cutting one matrix or block alone, each row with the model it is about; empty when not measured.

        A step's rows are about its input.
        """
        rows = []
        for step in self.history:
            about = {"model": (step.get("input") or {}).get("path"), "dataset": "windows of the calibration text"}
            rows += [about | row for row in step.get("sensitivity") or []]
        return rows + [{"model": "this model", **row} for row in self.record.get("sensitivity") or []]

    @property
    def benchmarks(self) -> list[dict[str, Any]]:
        """Every benchmark, the last one last."""
        return list(self.record.get("benchmarks") or [])

    @property
    def evaluations(self) -> list[dict[str, Any]]:
        """Every evaluation that yields numbers; continuations are apart."""
        return [one for one in self.record.get("evaluations") or [] if one.get("kind") != "continuations"]

    @property
    def continuations(self) -> list[dict[str, Any]]:
        """Every set of prompts with the dense and the sparse model's continuation."""
        return [one for one in self.record.get("evaluations") or [] if one.get("kind") == "continuations"]

    @property
    def perplexities(self) -> dict[tuple[Any, ...], dict[str, Any]]:
        """For each set of conditions the last perplexity evaluation, one against the dense model preferred."""
        found: dict[tuple[Any, ...], dict[str, Any]] = {}
        for one in self.evaluations:
            if one.get("kind") == "perplexity":
                key = comparable(one)
                if one.get("against") or not found.get(key, {}).get("against"):
                    found[key] = one
        return found

    @property
    def origin(self) -> dict[str, Any]:
        """Path and hash of the model that the first step began with; empty when not recorded."""
        return dict(self.history[0].get("input") or {}) if self.history else {}

    @property
    def allocation(self) -> Any:
        """What the last step that has one says of its allocation: a name, or what was asked, used and measured."""
        return next((step["allocation"] for step in reversed(self.history) if "allocation" in step), None)

    @property
    def perplexity(self) -> dict[str, Any]:
        """The perplexity evaluation the verdict rests on: the first text, against the dense model preferred."""
        found = list(self.perplexities.values())
        compared = [one for one in found if one.get("against")]
        return (compared or found or [{}])[0]

    @property
    def sparsity(self) -> float | None:
        """Fraction of zeros in the pruned matrices after the last step that says so."""
        value: float | None = self._after_last_step("sparsity", "pruned_matrices")
        return value

    @property
    def sparsity_all(self) -> float | None:
        """Fraction of zeros over all parameters after the last step that says so."""
        value: float | None = self._after_last_step("sparsity", "all_parameters")
        return value

    def setting(self, name: str) -> Any:
        """A setting of the last step that pruned and has it, or None."""
        steps = (step for step in self.history if step.get("step") not in ("recover", "quantize"))
        pruned = [(step.get("settings") or {}).get(name) for step in steps]
        return next((value for value in reversed(pruned) if value is not None), None)

    @property
    def pruned(self) -> bool:
        """Whether any step took weights or shapes away."""
        return any(
            step.get("step") in ("sparsify", "shrink") or (step.get("settings") or {}).get("pattern")
            for step in self.history
        )

    @property
    def quantized(self) -> dict[str, Any]:
        """The last step, if that quantized the model; else empty."""
        return self.history[-1] if self.history and self.history[-1].get("step") == "quantize" else {}

    @property
    def method(self) -> str | None:
        """How the model was pruned, whether it was trained since, and how it was quantized."""
        name, before = self.setting("method"), [step for step in self.history if step.get("step") != "quantize"]
        trained = bool(before) and before[-1].get("step") == "recover"
        made = f"{name or 'pruned'} + recovery" if trained else name
        return " + ".join(part for part in (made, self.quantized.get("scheme")) if part) or None

    def _after_last_step(self, part: str, field: str) -> Any:
        values = [(step.get(part) or {}).get(field) for step in self.history]
        return next((value for value in reversed(values) if value is not None), None)


def evaluation_text(evaluation: dict[str, Any]) -> str:
    """The text of an evaluation and how it was cut, in words."""
    windows, length = evaluation.get("windows", "?"), evaluation.get("window", "?")
    return f"{evaluation.get('dataset', 'text not recorded')}, {windows} windows of {length} tokens"


def evaluation_conditions(evaluation: dict[str, Any]) -> str:
    """All that decides whether two perplexities of one tokenizer may be compared, in words."""
    return f"{evaluation_text(evaluation)}, {evaluation.get('dtype', 'dtype not recorded')}"


def comparable(evaluation: dict[str, Any]) -> tuple[Any, ...]:
    """The same as a key: the text by its hash, since a name may stand for another text tomorrow."""
    text = evaluation.get("dataset_sha256") or evaluation.get("dataset")
    return (text, *(evaluation.get(name) for name in ("window", "windows", "dtype")))


def read_runs(directories: list[Path]) -> list[Run]:
    """The records of the run directories. Raises UserError for none, a missing, broken or unknown record."""
    if not directories:
        raise UserError("no run was given: give at least one directory that prunus wrote")
    names = [directory.resolve().name for directory in directories]
    if len(set(names)) < len(names):
        names = [str(directory) for directory in directories]
    return [Run(name, _read(directory)) for name, directory in zip(names, directories, strict=True)]


def _read(directory: Path) -> dict[str, Any]:
    path = directory / "prunus.json"
    if not path.is_file():
        raise UserError(f"{directory} has no prunus.json: give a directory that a prunus step wrote")
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is not readable as JSON ({error}): write the run again") from error
    given = record.get("format") if isinstance(record, dict) else None
    if given != FORMAT:
        raise UserError(f"{path} has format {given!r} and this prunus reads {FORMAT}: use the prunus that wrote it")
    return dict(record)
