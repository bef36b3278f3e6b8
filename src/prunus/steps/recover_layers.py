"""Which of the teacher's hidden states each block of a student learns to give, for `--loss hidden`."""

from typing import Any

from prunus.checkpoint import Checkpoint
from prunus.errors import UserError
from prunus.models import StreamedModel
from prunus.progress import say
from prunus.settings import RecoverSettings

History = list[dict[str, Any]]  # of `prunus.json`, oldest step first
SPREAD = (
    "the record of {} does not tell which of the teacher's {} blocks its {} are, so they are taken as evenly "
    "spread; --teacher-blocks says better."
)


def teacher_layers(
    student: StreamedModel, teacher: Checkpoint | None, settings: RecoverSettings, history: History, *, says_so: bool
) -> tuple[int, ...]:
    """Of each block of the student, how many of the teacher's blocks it stands at the end of.

    That is as `teacher_blocks` says, or else as `history` does, or else evenly spread, which is said. Raises UserError
    for a teacher or numbers that do not fit; () where hidden states are not compared.
    """
    if teacher is None or "hidden" not in settings.losses:
        return ()
    num, whole = _depths(student, teacher)
    if settings.teacher_blocks:
        return _as_asked(settings.teacher_blocks, num, whole)
    kept = kept_blocks(history, teacher.sha256, whole) if num < whole else list(range(whole))
    if kept is not None and len(kept) == num:
        return ends_of_runs(kept, whole)
    if says_so:
        say([SPREAD.format(student.checkpoint.path, whole, num)])
    return tuple(round((i + 1) * whole / num) for i in range(num))


def ends_of_runs(kept: list[int], whole: int) -> tuple[int, ...]:
    """Of each block that was kept, the number of the teacher's blocks up to the next one that was kept.

    A block answers for itself and for the run that was removed behind it. Folded, it gives what the run gave already,
    as near as least squares could. Not folded, it gives what came before the run, and has it to learn: the block behind
    the run has the weights that go with the run's end, so it is right as it is once its input is. The other choice, the
    end of the kept block itself, would have the block behind unlearn that, or leave the last run to nobody. A run that
    was removed at the very start is learned by the first block, which has nobody in front of it.
    """
    return (*kept[1:], whole)


def kept_blocks(history: History, teacher_sha256: str, whole: int) -> list[int] | None:
    """The teacher's blocks that are left after all steps since it, by number; None where the record does not tell."""
    inputs = [(step.get("input") or {}).get("sha256") for step in history]
    if teacher_sha256 not in inputs:
        return None
    kept = list(range(whole))
    for step in history[inputs.index(teacher_sha256) :]:
        if (step.get("settings") or {}).get("layers") is None:
            continue  # it cut no layers; its table of axes may still repeat those that its call cut before
        layers = (step.get("axes") or {}).get("layers") or {}
        if layers.get("before") != len(kept) or not set(layers.get("kept", [whole])) <= set(range(len(kept))):
            return None
        kept = [kept[layer] for layer in layers["kept"]]
    return kept


def _depths(student: StreamedModel, teacher: Checkpoint) -> tuple[int, int]:
    own, others = (one.get_text_config(decoder=True) for one in (student.config, teacher.config))
    if own.hidden_size != others.hidden_size:
        raise UserError(
            f"loss 'hidden' compares hidden states of one width; the model has {own.hidden_size} and the teacher "
            f"{others.hidden_size}: use --loss logits."
        )
    num, whole = len(student.spec.blocks), int(others.num_hidden_layers)
    if num > whole:
        raise UserError(f"the teacher has {whole} blocks and the model {num}; give the model that this was made from.")
    return num, whole


def _as_asked(given: tuple[int, ...], num: int, whole: int) -> tuple[int, ...]:
    if len(given) != num or sorted(set(given)) != list(given) or given[0] < 0 or given[-1] >= whole:
        raise UserError(
            f"teacher_blocks={','.join(map(str, given))}: give {num} rising numbers from 0 to {whole - 1}, the "
            "teacher's block for each block of the model."
        )
    return tuple(number + 1 for number in given)
