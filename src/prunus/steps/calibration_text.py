"""The calibration tokens that a step's settings ask for."""

from typing import Any

from transformers import AutoModelForCausalLM

from prunus.models import StreamedModel
from prunus.models.limits import max_length
from prunus.progress import quiet_libraries
from prunus.settings import SparsifySettings
from prunus.text.batches import TokenBatch, calibration_tokens
from prunus.text.self_generated import self_generator
from prunus.text.sources import parse_source


def calibration_batch(model: StreamedModel, settings: SparsifySettings) -> TokenBatch:
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
            lambda: _whole_model(model), model.tokenizer, identity=f"{model.checkpoint.sha256} {model.dtype}"
        ),
    )


def _whole_model(model: StreamedModel) -> Any:
    """Generating needs every block again for every token, so here, and only here, the model is loaded whole."""
    path, trust = model.checkpoint.path, model.checkpoint.trust_remote_code
    with quiet_libraries():
        whole = AutoModelForCausalLM.from_pretrained(path, dtype=model.dtype, trust_remote_code=trust)
    return whole.to(model.device)
