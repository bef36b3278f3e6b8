"""The settings of every step, validated in one place for the command line, Python and recipes alike.

Unknown keys are refused. What a step records as its settings is exactly what stands here.
"""

from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from prunus.errors import UserError
from prunus.shrinking import WIDTH_SCORES
from prunus.shrinking.expert_scores import EXPERT_SCORES
from prunus.sparsity import METHODS, Unstructured, parse_pattern

DEFAULT_METHOD = "admm"
DEFAULT_WIDTH_SCORE = "second-order"
DEFAULT_EXPERT_SCORE = "reap"
AXES = (
    "layers",
    "hidden",
    "experts",
    "kv_groups",
    "ffn",
    "expert_ffn",
    "shared_ffn",
    "query_heads",
)  # in the order they are cut


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


class ShrinkSettings(CalibratedSettings):
    """What decides the shape and the content of a shrunk model.

    Along each axis, a number with a decimal point is the ratio that stays, a whole number the size that stays.
    """

    ffn: int | float | None = None
    expert_ffn: int | float | None = None
    shared_ffn: int | float | None = None
    kv_groups: int | float | None = None
    query_heads: int | float | None = None
    hidden: int | float | None = None
    experts: int | float | None = None
    layers: int | float | None = None
    parameters: float | None = Field(None, gt=0, lt=1)  # a budget, as a ratio that stays, in place of axes
    decode_bytes: float | None = Field(None, gt=0, lt=1)
    score: str = DEFAULT_WIDTH_SCORE  # of channels and groups
    expert_score: str = DEFAULT_EXPERT_SCORE
    refit: bool = True  # least squares for what stays
    multiple_of: int | None = Field(None, ge=1)

    @property
    def wishes(self) -> dict[str, int | float]:
        """What was asked along which axis."""
        asked = {axis: getattr(self, axis) for axis in AXES}
        return {axis: wish for axis, wish in asked.items() if wish is not None}

    @property
    def budget(self) -> tuple[str, float] | None:
        """What is limited, and the ratio of it that may stay."""
        limits = {"parameters": self.parameters, "decode_bytes": self.decode_bytes}
        return next(((name, ratio) for name, ratio in limits.items() if ratio is not None), None)

    @field_validator("score")
    @classmethod
    def _known_score(cls, value: str) -> str:
        if value not in WIDTH_SCORES:
            raise UserError(f"unknown score {value!r}; allowed are {', '.join(WIDTH_SCORES)} (see `prunus methods`).")
        return value

    @field_validator("expert_score")
    @classmethod
    def _known_expert_score(cls, value: str) -> str:
        if value not in EXPERT_SCORES:
            raise UserError(f"unknown expert score {value!r}; allowed are {', '.join(EXPERT_SCORES)}.")
        return value

    @model_validator(mode="after")
    def _sizes_make_sense(self) -> Self:
        if self.budget and (self.wishes or (self.parameters and self.decode_bytes)):
            given = [*self.wishes, *(name for name in ("parameters", "decode_bytes") if getattr(self, name))]
            raise UserError(f"{' and '.join(given)} were given; a budget chooses the mix itself, so it stands alone.")
        if not self.wishes and not self.budget:
            raise UserError(
                f"nothing to shrink; say what stays along {', '.join(AXES)}, such as 0.75, or give a budget."
            )
        for axis, wish in self.wishes.items():
            if isinstance(wish, float) and not 0 < wish <= 1:
                raise UserError(f"{axis}={wish} is the ratio that stays, so it lies above 0 and at most at 1.")
            if isinstance(wish, int) and wish < 1:
                raise UserError(f"{axis}={wish} leaves nothing; write a size of at least 1, or a ratio such as 0.75.")
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
