"""The settings of every step, validated in one place for the command line, Python and recipes alike.

Unknown keys are refused. What a step records as its settings is exactly what stands here.
"""

from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from prunus.errors import UserError
from prunus.sparsity import METHODS, Unstructured, parse_pattern

DEFAULT_METHOD = "admm"


class Settings(BaseModel):
    """Base of all: frozen, closed, and its errors are sentences for the user."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    @classmethod
    def check(cls, /, **values: Any) -> Self:
        """Build from untrusted values. Raises UserError: what was given, what is allowed."""
        try:
            return cls(**values)
        except ValidationError as error:
            raise UserError(_sentence(cls, error)) from error


def _sentence(cls: type[BaseModel], error: ValidationError) -> str:
    first = error.errors()[0]
    key = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        return f"unknown setting {key!r}; allowed are {', '.join(cls.model_fields)}."
    if first["type"] == "value_error":
        return str(first["ctx"]["error"])
    return f"{key}={first.get('input')!r} is not allowed: {first['msg'].lower()}."


class CalibratedSettings(Settings):
    """What every step that looks at calibration text takes."""

    calibration: tuple[str, ...] = ("self",)
    samples: int = Field(128, ge=1)
    length: int = Field(2048, ge=2)
    seed: int = Field(0, ge=0)
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    device: str = "auto"

    @property
    def samples_itself(self) -> bool:
        """Whether the model's own samples are among the calibration text."""
        return any(source.partition("=")[0] == "self" for source in self.calibration)


class SparsifySettings(CalibratedSettings):
    """What decides the content of a sparsified model."""

    method: str = DEFAULT_METHOD
    pattern: str = "0.5"
    overrides: dict[str, str] = {}
    protect: tuple[str, ...] = ()
    options: dict[str, Any] = {}
    head: bool = False  # prune the output head too, where it is not tied to the embedding
    allocation: Literal["uniform", "model", "owl", "dlp", "sensitivity"] = "uniform"
    propagate: Literal["sparse", "dense"] = "sparse"

    @field_validator("method")
    @classmethod
    def _known_method(cls, value: str) -> str:
        if value not in METHODS:
            raise UserError(f"unknown method {value!r}; allowed are {', '.join(METHODS)} (see `prunus methods`).")
        return value

    @field_validator("pattern", mode="before")
    @classmethod
    def _readable_pattern(cls, value: object) -> str:
        return str(parse_pattern(value))

    @field_validator("overrides", mode="before")
    @classmethod
    def _readable_overrides(cls, value: object) -> object:
        if not isinstance(value, dict):
            return value
        return {glob: wish if wish == "dense" else str(parse_pattern(wish)) for glob, wish in value.items()}

    @model_validator(mode="after")
    def _allocation_decides_alone(self) -> Self:
        if self.allocation != "uniform" and (
            self.overrides or not isinstance(parse_pattern(self.pattern), Unstructured)
        ):
            raise UserError(
                f"allocation {self.allocation!r} decides the sparsity of every matrix itself: it takes an unstructured "
                f"pattern and no overrides; {self.pattern!r} with {len(self.overrides)} overrides was given."
            )
        return self


class EvaluateSettings(Settings):
    """What is measured of a model's quality, and on which text."""

    text: tuple[str, ...] = ()
    length: int = Field(2048, ge=2)
    windows: int | None = Field(None, ge=1)
    against: str | None = None
    choices: str | None = None
    limit: int | None = Field(None, ge=1)
    tasks: tuple[str, ...] = ()
    prompts: tuple[str, ...] = ()
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    device: str = "auto"


class BenchSettings(Settings):
    """How speed and memory are measured."""

    against: str | None = None
    prompt_tokens: int = Field(512, ge=1)
    new_tokens: int = Field(128, ge=2)
    repetitions: int = Field(5, ge=1)
    threads: int | None = Field(None, ge=1)
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    device: str = "auto"


class ReportSettings(Settings):
    """Where the page goes; by default `report.html` inside the run."""

    output: str | None = None
