"""The settings of every step, validated in one place for the command line, Python and recipes alike.

Unknown keys are refused. What a step records as its settings is exactly what stands here.
"""

import re
from typing import Annotated, Any, Literal, Self

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

    @property
    def reads_text(self) -> bool:
        """Whether calibration text is looked at."""
        return bool(METHODS[self.method].needs) or self.allocation != "uniform"

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


LOSSES = ("ce", "logits", "hidden")
COUNT_UNITS = {"": 1, "k": 1_000, "m": 1_000_000, "b": 1_000_000_000}
LEARNING_RATES = {"full": 1e-4, "lora": 2e-3, "block-wise": 5e-4}


class RecoverSettings(Settings):
    """What decides the content of a recovered model."""

    teacher: str | None = None
    data: tuple[str, ...] = ()
    tokens: int = Field(2_000_000, ge=1)
    method: Literal["full", "lora", "block-wise"] = "full"
    loss: tuple[str, ...] = ("logits",)
    temperature: float = Field(1.0, gt=0)
    top_k: int | None = Field(None, ge=1)
    teacher_blocks: tuple[int, ...] = ()
    lr: float | None = Field(None, gt=0)
    warm_up: float = Field(0.05, ge=0, lt=1)
    weight_decay: float = Field(0.0, ge=0)
    clip: float = Field(1.0, gt=0)
    batch_tokens: int = Field(8192, ge=2)
    micro_batch: int = Field(1, ge=1)
    length: int = Field(1024, ge=2)
    held_out: int = Field(16, ge=1)
    evaluate_every: int | None = Field(None, ge=1)
    patience: int = Field(3, ge=0)
    keep_zeros: str = "auto"
    lora_rank: int = Field(32, ge=1)
    lora_alpha: float = Field(32.0, gt=0)
    gradient_checkpointing: bool = False
    seed: int = Field(0, ge=0)
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    device: str = "auto"

    @property
    def losses(self) -> dict[str, float]:
        """Each loss with its weight: "hidden=0.5" weighs half."""
        return {name: float(weight or 1) for name, _, weight in (text.partition("=") for text in self.loss)}

    @property
    def learning_rate(self) -> float:
        return self.lr if self.lr is not None else LEARNING_RATES[self.method]

    @property
    def samples_teacher(self) -> bool:
        """Whether the teacher's own samples are among the text."""
        return any(source.partition("=")[0] == "self" for source in self.data)

    @field_validator("tokens", "batch_tokens", mode="before")
    @classmethod
    def _readable_count(cls, value: object) -> object:
        match = re.fullmatch(r"\s*([\d.]+)\s*([kmb]?)\s*", value.lower()) if isinstance(value, str) else None
        return round(float(match[1]) * COUNT_UNITS[match[2]]) if match else value

    @field_validator("loss", mode="before")
    @classmethod
    def _readable_losses(cls, value: object) -> object:
        return tuple(part.strip() for part in value.split(",")) if isinstance(value, str) else value

    @field_validator("loss")
    @classmethod
    def _known_losses(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        names = [text.partition("=")[0] for text in value]
        weights = [text.partition("=")[2] for text in value]
        if not value or set(names) - set(LOSSES) or len(set(names)) < len(names):
            raise UserError(f"loss={','.join(value)!r}; give one or several of {', '.join(LOSSES)}, each once.")
        if any(weight and not re.fullmatch(r"\d*\.?\d+(e-?\d+)?", weight) for weight in weights):
            raise UserError(f"loss={','.join(value)!r}: a weight is a number above 0, as in hidden=0.5.")
        return value

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if not self.data:
            raise UserError("no text to train on: give --data PATH | hf:NAME:split:column | self | builtin.")
        if self.top_k is not None and ("logits" not in self.losses or "hidden" in self.losses):
            raise UserError(
                f"top_k={self.top_k} keeps the teacher's likeliest tokens on disk: it takes loss logits, and not "
                f"hidden; {','.join(self.loss)} was given."
            )
        if self.method == "block-wise" and set(self.losses) != {"hidden"}:
            raise UserError(
                f"method 'block-wise' learns the teacher's hidden states: it takes --loss hidden; "
                f"{','.join(self.loss)} was given."
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


class ExportSettings(Settings):
    """What is made of a model: FORMAT or FORMAT:TYPE, as in exporting/."""

    to: str = "gguf"


class BenchSettings(Settings):
    """How speed and memory are measured. The engine is that of the model; naming it makes sure of it."""

    engine: str | None = None
    against: str | None = None
    prompt_tokens: int = Field(512, ge=1)
    new_tokens: int = Field(128, ge=2)
    repetitions: int = Field(5, ge=1)
    mix: tuple[str, ...] = ()  # prompts that come with prunus, in place of random tokens
    prompts: str | None = None  # a file of the user's own
    concurrency: tuple[Annotated[int, Field(ge=1)], ...] = Field((1,), min_length=1)
    threads: int | None = Field(None, ge=1)
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    device: str = "auto"

    @field_validator("mix")
    @classmethod
    def _known_mixes(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        from prunus.benchmark.prompts import MIXES  # here, so that other settings do not wait for its room

        if unknown := [name for name in value if name not in MIXES]:
            raise UserError(f"unknown mix {unknown[0]!r}; allowed are {', '.join(MIXES)}.")
        return value

    @model_validator(mode="after")
    def _together_is_random(self) -> Self:
        if max(self.concurrency) > 1 and (self.mix or self.prompts):
            raise UserError(
                f"concurrency {max(self.concurrency)} runs random prompts of one length, and prompts of your own were "
                "given too: bench the two apart."
            )
        return self


class ReportSettings(Settings):
    """Where the page goes; by default `report.html` inside the run."""

    output: str | None = None
