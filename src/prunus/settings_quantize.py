"""The settings of `quantize`: the scheme, how weights are rounded, and whether zeros are chosen in the same sweep."""

from typing import Self

from pydantic import field_validator, model_validator

from prunus.errors import UserError
from prunus.quantizing import QUANTIZERS, SCHEMES
from prunus.settings import CalibratedSettings
from prunus.sparsity import parse_pattern

EXPORTED = "gguf"


class QuantizeSettings(CalibratedSettings):
    """What decides the content of a quantized model."""

    scheme: str
    method: str = "rtn"
    joint: bool = False  # choose zeros and round what is kept in one sweep
    pattern: str | None = None  # of those zeros
    calibration: tuple[str, ...] = ()

    @field_validator("scheme")
    @classmethod
    def _known_scheme(cls, value: str) -> str:
        if value.partition(":")[0] == EXPORTED:
            raise UserError(f"{value} is a file of llama.cpp: make it with `prunus export MODEL OUT --to {value}`.")
        if value not in SCHEMES:
            raise UserError(f"unknown scheme {value!r}; allowed are {', '.join(SCHEMES)} (see `prunus methods`).")
        return value

    @field_validator("method")
    @classmethod
    def _known_method(cls, value: str) -> str:
        if value not in QUANTIZERS:
            raise UserError(f"unknown method {value!r} of quantizing; allowed are {', '.join(QUANTIZERS)}.")
        return value

    @field_validator("pattern", mode="before")
    @classmethod
    def _readable_pattern(cls, value: object) -> str | None:
        return None if value is None else str(parse_pattern(value))

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        method = QUANTIZERS[self.method]
        if method.needs and not self.calibration:
            raise UserError(
                f"method {self.method!r} looks at calibration text: give --calibration PATH | hf:NAME:split:column | "
                "self | builtin, or take --method rtn."
            )
        if self.calibration and not method.needs:
            raise UserError(
                f"method {self.method!r} looks at weights alone: leave --calibration out, or take --method gptq."
            )
        if method.input_scales and SCHEMES[self.scheme].rounds_inputs:
            able = ", ".join(name for name, scheme in SCHEMES.items() if not scheme.rounds_inputs)
            raise UserError(
                f"method {self.method!r} scales inputs for the sake of the weights, and {self.scheme} rounds both: "
                f"take --method gptq, or a scheme of weights alone: {able}."
            )
        if self.joint != (self.pattern is not None):
            raise UserError("--joint and --pattern go together: --joint --pattern 0.5 zeroes and rounds in one sweep.")
        if self.joint and not method.prunes:
            able = " or ".join(name for name, known in QUANTIZERS.items() if known.prunes)
            raise UserError(f"--joint sweeps over columns, which method {self.method!r} does not: add --method {able}.")
        return self
