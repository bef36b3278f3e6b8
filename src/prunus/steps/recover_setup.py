"""What a recovery will do, settled before weights are read: teacher, losses, steps, memory. All refusals are here."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch

from prunus.checkpoint import Checkpoint, open_checkpoint, open_dense, read_record
from prunus.checkpoint.shards import Shards
from prunus.errors import UserError
from prunus.machine_choice import choose_device, choose_dtype
from prunus.models import StreamedModel
from prunus.models.streamed import load_tokenizer
from prunus.progress import say
from prunus.recovery.keep_masks import MaskSource, matrices_of
from prunus.recovery.memory import Sizes, check_fits
from prunus.recovery.processes import Processes, check_share
from prunus.recovery.trainer import Plan
from prunus.settings import RecoverSettings
from prunus.steps.length import fit_length
from prunus.steps.recover_layers import teacher_layers

EVALUATIONS = 8  # in a run, where the user does not say; a long run evaluates every MOST_STEPS
MOST_STEPS = 100


@dataclass(frozen=True, slots=True)
class Setup:
    """One recovery, everything decided; no weight of it was read yet."""

    settings: RecoverSettings
    checkpoint: Checkpoint
    teacher: Checkpoint | None
    model: StreamedModel
    masks: MaskSource
    shards: Shards
    processes: Processes
    plan: Plan
    dtype: torch.dtype

    @property
    def history(self) -> list[dict[str, Any]]:
        return list((read_record(self.checkpoint.path) or {}).get("history") or [])


def set_up(model: str | Path, settings: RecoverSettings, max_memory: int | None, trust_remote_code: bool) -> Setup:
    """Decide and check everything. Raises UserError for what cannot work, what does not fit into memory included."""
    processes = Processes(choose_device(settings.device))
    checkpoint = open_dense(model, trust_remote_code=trust_remote_code)
    settings = fit_length(settings, checkpoint.config, says_so=processes.is_main)
    teacher = find_teacher(checkpoint, settings, says_so=processes.is_main)
    width = int(checkpoint.config.get_text_config(decoder=True).hidden_size)
    own = choose_dtype(settings.dtype, str(processes.device), width)
    dtype = processes.agree(own, (torch.float32, torch.bfloat16))
    streamed = StreamedModel(checkpoint, dtype=torch.float32, device=str(processes.device))
    history = (read_record(checkpoint.path) or {}).get("history") or []
    layers = teacher_layers(streamed, teacher, settings, history, says_so=processes.is_main)
    plan = make_plan(settings, layers, processes.count, dtype)
    masks = MaskSource(matrices_of(streamed.spec), history, settings.keep_zeros)
    sizes = sizes_of(streamed, teacher, settings, dtype, processes)
    check_fits(sizes, available_memory(processes.device, max_memory))
    return Setup(settings, checkpoint, teacher, streamed, masks, Shards(streamed), processes, plan, dtype)


def find_teacher(checkpoint: Checkpoint, settings: RecoverSettings, *, says_so: bool) -> Checkpoint | None:
    """The teacher asked for, or else the model that the first recorded step began with; None where none is needed.

    Raises UserError when one is needed and not there, or has another vocabulary.
    """
    path = settings.teacher
    if path is None:
        if set(settings.losses) == {"ce"} and not settings.samples_teacher:
            return None
        path = _first_input(checkpoint)
        if says_so:
            say([f"the teacher is {path}, the model that {checkpoint.path} was made from."])
    teacher = open_checkpoint(path, trust_remote_code=checkpoint.trust_remote_code)
    _check_vocabulary(checkpoint, teacher)
    return teacher


def _first_input(checkpoint: Checkpoint) -> str:
    history = (read_record(checkpoint.path) or {}).get("history") or [{}]
    path = (history[0].get("input") or {}).get("path")
    if path is None:
        raise UserError(f"{checkpoint.path} has no record that names its dense model; give it with --teacher.")
    if not Path(path).is_dir():
        raise UserError(f"the dense model {path} that the record names is not there any more; give it with --teacher.")
    return str(path)


def _check_vocabulary(student: Checkpoint, teacher: Checkpoint) -> None:
    sizes = [int(one.config.get_text_config(decoder=True).vocab_size) for one in (student, teacher)]
    same = sizes[0] == sizes[1] and load_tokenizer(student).get_vocab() == load_tokenizer(teacher).get_vocab()
    if not same:
        raise UserError(
            f"the teacher {teacher.path} has another vocabulary ({sizes[1]} tokens, the model {sizes[0]}), so their "
            "logits cannot be compared; give the dense model that this one was made from."
        )


def make_plan(settings: RecoverSettings, layers: tuple[int, ...], processes: int, dtype: torch.dtype) -> Plan:
    """The steps of the training. Raises UserError for a budget or a batch that cannot be."""
    sequences = settings.batch_tokens // settings.length
    at_once = 1 if settings.method == "block-wise" else settings.micro_batch
    micro_batches = check_share(processes, sequences, at_once, settings.batch_tokens, settings.length)
    steps = settings.tokens // (sequences * settings.length)
    if steps < 1:
        raise UserError(
            f"tokens={settings.tokens} is less than one batch of {sequences * settings.length} tokens; give more "
            "tokens or a smaller --batch-tokens."
        )
    return Plan(
        steps=steps,
        sequences=sequences,
        micro_batches=micro_batches,
        evaluate_every=settings.evaluate_every or max(min(round(steps / EVALUATIONS), MOST_STEPS), 1),
        patience=settings.patience,
        lr=settings.learning_rate,
        warm_up=round(steps * settings.warm_up),
        clip=settings.clip,
        seed=settings.seed,
        losses=settings.losses,
        temperature=settings.temperature,
        layers=layers,
        dtype=dtype,
    )


def sizes_of(
    model: StreamedModel,
    teacher: Checkpoint | None,
    settings: RecoverSettings,
    dtype: torch.dtype,
    processes: Processes,
) -> Sizes:
    """The shapes that decide how much memory the training takes."""
    matrices = [matrix.linear.shape for matrix in matrices_of(model.spec)]
    config = model.config.get_text_config(decoder=True)
    tensors = model.checkpoint.tensors
    in_memory = teacher is not None and settings.top_k is None and set(settings.losses) != {"ce"}
    blocks = [sum(tensors[key].num_elements for key in keys) for keys in model.block_keys()]
    return Sizes(
        method=settings.method,
        parameters=model.checkpoint.num_parameters,
        masked=0 if settings.keep_zeros == "none" else sum(rows * columns for rows, columns in matrices),
        adapted=sum((rows + columns) * settings.lora_rank for rows, columns in matrices),
        teacher_parameters=teacher.num_parameters if teacher is not None and in_memory else 0,
        largest_block=max(blocks),
        num_blocks=len(blocks),
        hidden=int(config.hidden_size),
        ffn=max(max(shape) for shape in (linear.shape for _, linear in model.spec.matrices)),
        vocabulary=int(config.vocab_size),
        length=settings.length,
        micro_batch=settings.micro_batch,
        forward_bytes=dtype.itemsize,
        checkpointing=settings.gradient_checkpointing,
        processes=processes.count if processes.sharded else 1,
    )


def available_memory(device: torch.device, max_memory: int | None) -> int:
    """Bytes that this process may use: what the user says, or its share of what is free."""
    if max_memory is not None:
        return max_memory
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
