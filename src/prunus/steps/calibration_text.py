"""The calibration tokens that a step's settings ask for."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from prunus.models import StreamedModel
from prunus.models.limits import max_length
from prunus.models.whole import load_whole
from prunus.settings import CalibratedSettings
from prunus.text.batches import Generate, TokenBatch, calibration_tokens, shares
from prunus.text.self_generated import self_generator, start_token
from prunus.text.sources import TextSource, parse_source

BEYOND = 1 << 32  # added to the seed for samples beyond those of a step: other ones, and the same ones every time


def calibration_batch(model: StreamedModel, settings: CalibratedSettings, *, more: int = 0) -> TokenBatch:
    """Read, tokenise and mix the sources. Raises UserError for text that cannot serve.

    With `more`, so many windows are drawn beside those asked for. Of the model's own text only these are sampled then:
    the others are those that the step has made.
    """
    sources = [parse_source(text) for text in settings.calibration]
    generate = self_generator(
        lambda: whole_model(model), model.tokenizer, identity=f"{model.checkpoint.sha256} {model.dtype}"
    )
    return calibration_tokens(
        sources,
        model.tokenizer,
        samples=settings.samples + more,
        length=settings.length,
        seed=settings.seed,
        max_length=max_length(model.config),
        generate=_going_on(generate, sources, settings.samples) if more else generate,
    )


def _going_on(generate: Generate, sources: Sequence[TextSource], samples: int) -> Generate:
    """Begin with the model's own windows among these `samples`, and sample only what is asked for beyond them."""
    counts = zip(sources, shares(sources, samples), strict=True)
    made = next((count for source, count in counts if source.kind == "self"), 0)

    def going_on(wanted: int, length: int, seed: int) -> Tensor:
        first_NT = generate(made, length, seed)[:wanted]
        return torch.cat([first_NT, generate(wanted - made, length, seed + BEYOND)]) if wanted > made else first_NT

    return going_on


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
