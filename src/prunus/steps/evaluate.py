"""`prunus.evaluate`: how good a model is, on text and tasks the user names, beside the dense model it came from."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from prunus.calibration import StreamedSource
from prunus.checkpoint import Checkpoint, add_to_record, open_checkpoint, read_record
from prunus.checkpoint.per_layer import layer_fields
from prunus.engines import SPARSE_CPU, require
from prunus.errors import UserError
from prunus.evaluation import LogitSource
from prunus.evaluation.continuations import continuations
from prunus.evaluation.evaluate import evaluate_model
from prunus.evaluation.lm_eval_tasks import find_tasks, lm_eval_tasks
from prunus.exporting.engine_source import EngineSource
from prunus.exporting.exported import Exported, find_exported
from prunus.machine_choice import choose_device, choose_dtype, parse_memory
from prunus.models import StreamedModel
from prunus.models.skeleton import check_config
from prunus.models.streamed import load_tokenizer
from prunus.settings import EvaluateSettings
from prunus.steps.done import done_before, mark
from prunus.steps.keep import results_survive
from prunus.steps.length import fit_length
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
    same settings that are already there are returned instead. Of what `prunus export` made, its own engine reads
    text and choices. Raises UserError for anything the user can mend.
    """
    checked = EvaluateSettings.check(**settings)
    if not (checked.text or checked.choices or checked.tasks or checked.prompts):
        raise UserError("nothing to evaluate: give --text PATH, --choices FILE.jsonl, --tasks NAMES or --prompt TEXT.")
    if checked.prompts and checked.against is None:
        raise UserError("--prompt shows two continuations side by side: give the dense model with --against.")
    subject = find_exported(model) or open_checkpoint(model, trust_remote_code=trust_remote_code)
    path = subject.directory if isinstance(subject, Exported) else subject.path
    dense = open_checkpoint(checked.against, trust_remote_code=trust_remote_code) if checked.against else None
    reader = _reader(subject, dense, checked, trust_remote_code)
    if checked.text:
        checked = fit_length(checked, *(one.config for one in (reader, dense) if one))
    if skip_done and (found := done_before(read_record(path), "evaluations", checked)):
        return found
    limit = parse_memory(max_memory)
    _check(checked, [reader, dense] if dense else [reader])
    if isinstance(subject, Exported):
        results = _of_export(subject, reader, dense, checked, limit)
    else:
        results = _measure(subject, dense, checked, _forward(subject, checked, limit))
    with results_survive(path):
        add_to_record(path, "evaluations", mark(results, checked))
    return results


def _reader(
    subject: Exported | Checkpoint, dense: Checkpoint | None, settings: EvaluateSettings, trust_remote_code: bool
) -> Checkpoint:
    """Who reads the text: the model itself or, for an engine's file, the dense model, else what the file was made from.

    A packed model is one of transformers too, with its own tokenizer: whatever a model directory is asked, it can be.
    """
    if isinstance(subject, Checkpoint):
        return subject
    if subject.engine.name == SPARSE_CPU.name:
        return open_checkpoint(subject.directory, trust_remote_code=trust_remote_code)
    if settings.prompts or settings.tasks:
        raise UserError(
            f"--prompt and --tasks run in transformers, and {subject.directory} is {subject.target}: give --text or "
            "--choices, or evaluate the model that it was exported from."
        )
    return dense or open_checkpoint(subject.source, trust_remote_code=trust_remote_code)


def _of_export(
    exported: Exported,
    reader: Checkpoint,
    dense: Checkpoint | None,
    checked: EvaluateSettings,
    max_memory: int | None,
) -> list[Result]:
    """Text and choices in the engine; what is compared with runs in transformers, and so do prompts and tasks."""
    results: list[Result] = []
    if checked.text or checked.choices:
        worker = exported.engine.started(require(exported.engine))
        with EngineSource(worker, exported, load_tokenizer(reader), reader.config) as source:
            beside = _forward(reader, checked, max_memory).source(dense) if dense else None
            results += _on_text(source, beside, checked)
    if checked.prompts or checked.tasks:
        rest = checked.model_copy(update={"text": (), "choices": None})
        results += _measure(reader, dense, rest, _forward(reader, checked, max_memory))
    return results


def _check(settings: EvaluateSettings, checkpoints: list[Checkpoint]) -> None:
    """Raise UserError for what would otherwise end the work when hours of it are done."""
    for checkpoint in checkpoints:
        check_config(checkpoint.config, trust_remote_code=checkpoint.trust_remote_code)
        if settings.prompts:
            load_tokenizer(checkpoint)
        if settings.tasks and layer_fields(checkpoint.config) is not None:
            raise UserError(
                f"the layers of {checkpoint.path} differ, and lm-eval opens only what plain transformers "
                "opens; measure it with --text, --choices or --prompt."
            )
    if settings.tasks:
        find_tasks(settings.tasks)


@dataclass(frozen=True, slots=True)
class _Forward:
    """How the models are run: decided once, so that both are run in the same way."""

    dtype: torch.dtype
    device: str
    max_memory: int | None

    def source(self, checkpoint: Checkpoint) -> StreamedSource:
        model = StreamedModel(checkpoint, dtype=self.dtype, device=self.device)
        return StreamedSource(model, max_memory=self.max_memory)


def _forward(checkpoint: Checkpoint, settings: EvaluateSettings, max_memory: int | None) -> _Forward:
    device = choose_device(settings.device)
    width = int(checkpoint.config.get_text_config(decoder=True).hidden_size)
    return _Forward(choose_dtype(settings.dtype, device, width), device, max_memory)


def _measure(
    model: Checkpoint, dense: Checkpoint | None, settings: EvaluateSettings, forward: _Forward
) -> list[Result]:
    results: list[Result] = []
    if settings.text or settings.choices:
        results += _on_text(forward.source(model), forward.source(dense) if dense else None, settings)
    if settings.prompts:
        results.append(_continuations(model, dense, settings, forward))
    if settings.tasks:
        results += _tasks(model, dense, settings, forward)
    return results


def _on_text(source: LogitSource, dense: LogitSource | None, settings: EvaluateSettings) -> list[Result]:
    return evaluate_model(
        source,
        dense,
        texts=tuple(parse_source(text) for text in settings.text),
        length=settings.length,
        windows=settings.windows,
        choices=Path(settings.choices) if settings.choices else None,
        limit=settings.limit,
        against=settings.against,
    )


def _continuations(
    model: Checkpoint, dense: Checkpoint | None, settings: EvaluateSettings, forward: _Forward
) -> Result:
    assert dense is not None
    return continuations(
        dense.path,
        model.path,
        prompts=settings.prompts,
        dtype=forward.dtype,
        device=forward.device,
        trust_remote_code=model.trust_remote_code,
    )


def _tasks(model: Checkpoint, dense: Checkpoint | None, settings: EvaluateSettings, forward: _Forward) -> list[Result]:
    run = partial(
        lm_eval_tasks,
        tasks=settings.tasks,
        limit=settings.limit,
        dtype=str(forward.dtype).removeprefix("torch."),
        device=forward.device,
        trust_remote_code=model.trust_remote_code,
    )
    results = run(model.path)
    if dense is None:
        return results
    pairs = zip(results, run(dense.path), strict=True)
    return [{**own, "against": {"path": settings.against, "metrics": other["metrics"]}} for own, other in pairs]
