"""The verb `recover` of the command line."""

import os
from typing import Annotated, Any

import typer

from prunus.cli import options as opt

Data = Annotated[
    list[str] | None,
    typer.Option(help="PATH | hf:NAME:split:column | self (the teacher's) | builtin, each with =weight; repeatable."),
]
Optimizer = "Optimizer and batches"
Memory = "Memory and machine"


def recover(
    model: opt.Model,
    out: opt.Out,
    teacher: Annotated[str | None, typer.Option(help="The dense model. Default: the one the record names.")] = None,
    data: Data = None,
    tokens: Annotated[str, typer.Option(help="Tokens to train on, like 500k or 2M.")] = "2M",
    method: Annotated[str, typer.Option(help="full, lora (masked, merged) or block-wise.")] = "full",
    loss: Annotated[str, typer.Option(help="ce, logits, hidden, comma separated, each with =weight.")] = "logits",
    temperature: Annotated[float, typer.Option(help="Of the softmax in loss logits.")] = 1.0,
    top_k: Annotated[
        int | None, typer.Option(help="Keep the teacher's K likeliest tokens on disk; it runs once.")
    ] = None,
    teacher_blocks: Annotated[
        str, typer.Option(help="For hidden: the teacher's block for each block, like 0,1,4. Default: as recorded.")
    ] = "",
    keep_zeros: Annotated[str, typer.Option(help="auto, none, or a safetensors file of masks.")] = "auto",
    lr: Annotated[
        float | None, typer.Option(help="Peak learning rate. Default: by method.", rich_help_panel=Optimizer)
    ] = None,
    warm_up: Annotated[float, typer.Option(help="Share of the steps.", rich_help_panel=Optimizer)] = 0.05,
    weight_decay: Annotated[float, typer.Option(help="Of matrices.", rich_help_panel=Optimizer)] = 0.0,
    clip: Annotated[float, typer.Option(help="Largest norm of the gradient.", rich_help_panel=Optimizer)] = 1.0,
    batch_tokens: Annotated[str, typer.Option(help="Tokens of one step.", rich_help_panel=Optimizer)] = "8192",
    length: Annotated[
        int | None,
        typer.Option(help="Tokens of one sequence. Default: 1024, or the model's maximum.", rich_help_panel=Optimizer),
    ] = None,
    held_out: Annotated[int, typer.Option(help="Windows never trained on.", rich_help_panel=Optimizer)] = 16,
    evaluate_every: Annotated[
        int | None, typer.Option(help="Steps between evaluations.", rich_help_panel=Optimizer)
    ] = None,
    patience: Annotated[
        int, typer.Option(help="Stop after so many without gain; 0: never.", rich_help_panel=Optimizer)
    ] = 3,
    lora_rank: Annotated[int, typer.Option(help="Rank of the change.", rich_help_panel=Optimizer)] = 32,
    lora_alpha: Annotated[float, typer.Option(help="Its scale is alpha / rank.", rich_help_panel=Optimizer)] = 32.0,
    seed: Annotated[
        int, typer.Option(help="Order of the text, and the adapters' start.", rich_help_panel=Optimizer)
    ] = 0,
    micro_batch: Annotated[int, typer.Option(help="Sequences in one forward pass.", rich_help_panel=Memory)] = 1,
    gradient_checkpointing: Annotated[
        bool, typer.Option("--gradient-checkpointing", help="Less memory, more time.", rich_help_panel=Memory)
    ] = False,
    dtype: opt.Dtype = "auto",
    device: opt.Device = "auto",
    max_memory: Annotated[
        str | None, typer.Option(help="What training may take, like 8GiB. Default: what is free.")
    ] = None,
    tensorboard: Annotated[str | None, typer.Option(help="A folder for event files (extra [train]).")] = None,
    trust_remote_code: opt.Trust = False,
) -> None:
    """Train a pruned MODEL to be close to its dense parent again; zeros stay zeros. Interrupted, it goes on.

    Example: `prunus recover out-50 out-50-recovered --teacher org/model --data train.txt --tokens 500k`
    """
    from prunus.steps.recover import recover as step
    from prunus.terminal.tables import show_recovered

    settings: dict[str, Any] = {
        "teacher": teacher,
        "data": tuple(data or ()),
        "tokens": tokens,
        "method": method,
        "loss": loss,
        "temperature": temperature,
        "top_k": top_k,
        "teacher_blocks": tuple(part for part in teacher_blocks.split(",") if part),
        "keep_zeros": keep_zeros,
        "lr": lr,
        "warm_up": warm_up,
        "weight_decay": weight_decay,
        "clip": clip,
        "batch_tokens": batch_tokens,
        **opt.given(length=length),
        "held_out": held_out,
        "evaluate_every": evaluate_every,
        "patience": patience,
        "lora_rank": lora_rank,
        "lora_alpha": lora_alpha,
        "seed": seed,
        "micro_batch": micro_batch,
        "gradient_checkpointing": gradient_checkpointing,
        "dtype": dtype,
        "device": device,
    }
    run = step(
        model, out, max_memory=max_memory, tensorboard=tensorboard, trust_remote_code=trust_remote_code, **settings
    )
    if int(os.environ.get("RANK", "0")) == 0:  # under accelerate launch, one process speaks for all
        show_recovered(run)
        opt.emit(run.summary())
