"""`prunus.evaluate`: how good a model is, on text and tasks the user names, beside the dense model it came from."""

from pathlib import Path
from typing import Any

from prunus.calibration import StreamedSource
from prunus.checkpoint import add_to_record, open_checkpoint, read_record
from prunus.errors import UserError
from prunus.evaluation.continuations import continuations
from prunus.evaluation.evaluate import evaluate_model
from prunus.evaluation.lm_eval_tasks import lm_eval_tasks
from prunus.machine_choice import choose_device, choose_dtype, parse_memory
from prunus.models import StreamedModel
from prunus.settings import EvaluateSettings
from prunus.steps.done import done_before, mark
from prunus.text.sources import parse_source

Result = dict[str, Any]


def evaluate(
    model: str | Path,
    *,
    max_memory: str | int | None = None,
    skip_done: bool = False,
    trust_remote_code: bool = False,
    **settings: Any,
) -> list[Result]:
    """Measure a model and return one result per measurement, each with all its conditions.

    `settings` are the fields of `EvaluateSettings`: text, length, windows, against, choices, limit, tasks, prompts.
    Models are streamed block by block, so size is no limit, except for prompts (continuations) and tasks, which load
    them whole. In a directory that prunus made, results are added to `prunus.json`; with `skip_done`, results of the
    same settings that are already there are returned instead. Raises UserError for anything the user can mend.
    """
    checked = EvaluateSettings.check(**settings)
    if not (checked.text or checked.choices or checked.tasks or checked.prompts):
        raise UserError("nothing to evaluate: give --text PATH, --choices FILE.jsonl, --tasks NAMES or --prompt TEXT.")
    if checked.prompts and checked.against is None:
        raise UserError("--prompt shows two continuations side by side: give the dense model with --against.")
    checkpoint = open_checkpoint(model, trust_remote_code=trust_remote_code)
    record = read_record(checkpoint.path)
    if skip_done and (found := done_before(record, "evaluations", checked)):
        return found
    results = _measure(str(checkpoint.path), checked, parse_memory(max_memory), trust_remote_code)
    add_to_record(checkpoint.path, "evaluations", mark(results, checked))
    return results


def _measure(model: str, settings: EvaluateSettings, max_memory: int | None, trust: bool) -> list[Result]:
    results: list[Result] = []
    if settings.text or settings.choices:
        dense = _source(settings.against, settings, max_memory, trust) if settings.against else None
        results += evaluate_model(
            _source(model, settings, max_memory, trust),
            dense,
            texts=tuple(parse_source(text) for text in settings.text),
            length=settings.length,
            windows=settings.windows,
            choices=Path(settings.choices) if settings.choices else None,
            limit=settings.limit,
            against=settings.against,
        )
    if settings.prompts:
        assert settings.against is not None
        dense_path = open_checkpoint(settings.against, trust_remote_code=trust).path
        results.append(continuations(dense_path, Path(model), prompts=settings.prompts, trust_remote_code=trust))
    if settings.tasks:
        results += lm_eval_tasks(Path(model), settings.tasks, limit=settings.limit)
    return results


def _source(model: str, settings: EvaluateSettings, max_memory: int | None, trust: bool) -> StreamedSource:
    checkpoint = open_checkpoint(model, trust_remote_code=trust)
    device = choose_device(settings.device)
    dtype = choose_dtype(settings.dtype, device, int(checkpoint.config.get_text_config(decoder=True).hidden_size))
    return StreamedSource(StreamedModel(checkpoint, dtype=dtype, device=device), max_memory=max_memory)
