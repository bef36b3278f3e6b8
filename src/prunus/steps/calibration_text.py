"""The calibration tokens that a step's settings ask for."""

from typing import Any

import torch
from torch import Tensor

from prunus.models import StreamedModel
from prunus.models.limits import max_length
from prunus.models.whole import load_whole
from prunus.settings import CalibratedSettings
from prunus.text.batches import TokenBatch, calibration_tokens
from prunus.text.self_generated import self_generator, start_token
from prunus.text.sources import parse_source


def calibration_batch(model: StreamedModel, settings: CalibratedSettings) -> TokenBatch:
    """Read, tokenise and mix the sources. Raises UserError for text that cannot serve."""
    sources = [parse_source(text) for text in settings.calibration]
    return calibration_tokens(
        sources,
        model.tokenizer,
        samples=settings.samples,
        length=settings.length,
        seed=settings.seed,
        max_length=max_length(model.config),
        generate=self_generator(
            lambda: whole_model(model), model.tokenizer, identity=f"{model.checkpoint.sha256} {model.dtype}"
        ),
    )


def whole_model(model: StreamedModel) -> Any:
    """The model loaded whole, for what needs every block again and again: generating, and going back for gradients."""
    return load_whole(model.checkpoint, model.dtype, model.device)


def check_text(model: StreamedModel, settings: CalibratedSettings, *, more: int = 0) -> None:
    """Raise UserError when the calibration text cannot serve; `more` sequences are needed beside those asked for.

    The model's own samples are not made: a stand-in of as many tokens is.
    """

    def stand_in(samples: int, length: int, _seed: int) -> Tensor:
        return torch.full((samples, length), start_token(model.tokenizer))

    calibration_tokens(
        [parse_source(text) for text in settings.calibration],
        model.tokenizer,
        samples=settings.samples + more,
        length=settings.length,
        seed=settings.seed,
        max_length=max_length(model.config),
        generate=stand_in,
    )
