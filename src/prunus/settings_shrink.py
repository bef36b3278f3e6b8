"""The settings of `shrink`: what stays along which axis, and how it is chosen."""

from typing import Literal, Self

from pydantic import Field, field_validator, model_validator

from prunus.errors import UserError
from prunus.settings import CalibratedSettings
from prunus.shrinking import LAYER_SCORES, WIDTH_SCORES
from prunus.shrinking.expert_scores import EXPERT_SCORES

DEFAULT_WIDTH_SCORE = "second-order"
DEFAULT_EXPERT_SCORE = "reap"
DEFAULT_LAYER_SCORE = "angular"
PER_LAYER_AXES = ("ffn", "kv_groups")  # that can differ from layer to layer
SUBLAYERS = ("attention", "mlp")  # that can go without the rest of their layer
# In the order they are cut
AXES = ("layers", "hidden", "experts", "kv_groups", "ffn", "expert_ffn", "shared_ffn", "query_heads", *SUBLAYERS)


class LayersSettings(CalibratedSettings):
    """What decides which layers a model loses, and how the rest makes up for them."""

    layers: int | float  # with a decimal point the ratio that stays, else the number that stays
    score: str = DEFAULT_LAYER_SCORE
    fold: bool = True  # removed runs are folded into the layer before each of them
    protect_first: int = Field(1, ge=0)
    protect_last: int = Field(1, ge=0)
    judged: int = Field(8, ge=1)  # how many of the calibration sequences judge candidates, where predictions do

    @field_validator("score")
    @classmethod
    def _known_score(cls, value: str) -> str:
        if value not in LAYER_SCORES:
            raise UserError(f"unknown score {value!r} of layers; allowed are {', '.join(LAYER_SCORES)}.")
        return value

    @field_validator("layers")
    @classmethod
    def _a_ratio_or_a_size(cls, value: int | float) -> int | float:
        check_wish("layers", value)
        return value

    @model_validator(mode="after")
    def _folds_where_the_score_does(self) -> Self:
        if LAYER_SCORES[self.score].folds and not self.fold:
            raise UserError(f"score {self.score!r} judges layers as folded, so fold=False has no use for it; drop one.")
        return self


class ShrinkSettings(CalibratedSettings):
    """What decides the shape and the content of a shrunk model.

    Along each axis, a number with a decimal point is the ratio that stays, a whole number the size that stays.
    """

    layers: int | float | None = None
    hidden: int | float | None = None
    experts: int | float | None = None
    kv_groups: int | float | None = None
    ffn: int | float | None = None
    expert_ffn: int | float | None = None
    shared_ffn: int | float | None = None
    query_heads: int | float | None = None
    attention: int | float | None = None  # of how many layers; the rest goes alone
    mlp: int | float | None = None
    parameters: float | None = Field(None, gt=0, lt=1)  # a budget, as a ratio that stays, in place of axes
    decode_bytes: float | None = Field(None, gt=0, lt=1)
    score: str = DEFAULT_WIDTH_SCORE  # of channels and heads
    expert_score: str | None = DEFAULT_EXPERT_SCORE  # None only in a part of a call that cuts no experts
    layer_score: str = DEFAULT_LAYER_SCORE
    refit: bool = True  # least squares for what stays in a block
    fold: bool = True  # and for layers that go
    protect_first: int = Field(1, ge=0)
    protect_last: int = Field(1, ge=0)
    judged: int = Field(8, ge=1)
    multiple_of: int | None = Field(None, ge=1)
    per_layer: Literal["uniform", "global", "sensitivity"] = "uniform"  # else plain transformers does not open it

    @property
    def wishes(self) -> dict[str, int | float]:
        """What was asked along which axis."""
        asked = {axis: getattr(self, axis) for axis in AXES}
        return {axis: wish for axis, wish in asked.items() if wish is not None}

    @property
    def sublayers(self) -> dict[str, int | float]:
        """What was asked of sublayers that go alone."""
        return {kind: wish for kind, wish in self.wishes.items() if kind in SUBLAYERS}

    @property
    def budget(self) -> tuple[str, float] | None:
        """What is limited, and the ratio of it that may stay."""
        limits = {"parameters": self.parameters, "decode_bytes": self.decode_bytes}
        return next(((name, ratio) for name, ratio in limits.items() if ratio is not None), None)

    @property
    def of_layers(self) -> LayersSettings:
        """The part of these settings that is about layers."""
        shared = {name: getattr(self, name) for name in CalibratedSettings.model_fields}
        own = {name: getattr(self, name) for name in ("layers", "fold", "protect_first", "protect_last", "judged")}
        return LayersSettings.check(**shared, **own, score=self.layer_score)

    @field_validator("score")
    @classmethod
    def _known_score(cls, value: str) -> str:
        if value not in WIDTH_SCORES:
            raise UserError(f"unknown score {value!r}; allowed are {', '.join(WIDTH_SCORES)} (see `prunus methods`).")
        return value

    @field_validator("expert_score")
    @classmethod
    def _known_expert_score(cls, value: str | None) -> str:
        if value is None or value not in EXPERT_SCORES:
            raise UserError(f"unknown expert score {value!r}; allowed are {', '.join(EXPERT_SCORES)}.")
        return value

    @model_validator(mode="after")
    def _sizes_make_sense(self) -> Self:
        if self.budget and (self.wishes or (self.parameters and self.decode_bytes)):
            given = [*self.wishes, *(name for name in ("parameters", "decode_bytes") if getattr(self, name))]
            raise UserError(f"{' and '.join(given)} were given; a budget chooses the mix itself, so it stands alone.")
        if self.sublayers and (others := self._beside_sublayers()):
            raise UserError(
                f"{' and '.join(self.sublayers)} was given with {' and '.join(others)}; what is to go without the rest "
                "of its layer takes a call of its own, on an ordinary checkpoint."
            )
        if self.per_layer != "uniform" and (others := self._beside_own_widths()):
            raise UserError(
                f"per_layer={self.per_layer!r} takes sizes along {' and '.join(PER_LAYER_AXES)} alone, and "
                f"{' and '.join(others)} was given; ask for that in a call of its own, before this one."
            )
        if not self.wishes and not self.budget:
            raise UserError(
                f"nothing to shrink; say what stays along {', '.join(AXES)}, such as 0.75, or give a budget."
            )
        for axis, wish in self.wishes.items():
            check_wish(axis, wish)
        if self.layers is not None:
            assert self.of_layers  # its own checks
        return self

    def _beside_sublayers(self) -> list[str]:
        """What was asked that cannot be in one call with them."""
        axes = [axis for axis in self.wishes if axis not in SUBLAYERS]
        return [*axes, *(["per_layer"] if self.per_layer != "uniform" else [])]

    def _beside_own_widths(self) -> list[str]:
        """What was asked that cannot differ from layer to layer."""
        axes = [axis for axis in self.wishes if axis not in PER_LAYER_AXES]
        return [*axes, *([self.budget[0]] if self.budget else [])]


def check_wish(axis: str, wish: int | float) -> None:
    """Raise UserError for a number that is neither a ratio nor a size."""
    if isinstance(wish, float) and not 0 < wish <= 1:
        raise UserError(f"{axis}={wish} is the ratio that stays, so it lies above 0 and at most at 1.")
    if isinstance(wish, int) and wish < 1:
        raise UserError(f"{axis}={wish} leaves nothing; write a size of at least 1, or a ratio such as 0.75.")
