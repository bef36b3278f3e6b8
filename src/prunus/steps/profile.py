"""`prunus.profile`: where parameters, bytes and FLOPs are, known from headers alone, and what bears pruning."""

from pathlib import Path
from typing import Any

import torch

from prunus.checkpoint import Checkpoint, open_checkpoint, read_record
from prunus.checkpoint.record import RECORD_NAME, write_json
from prunus.errors import UserError
from prunus.machine_choice import choose_device, choose_dtype
from prunus.models import StreamedModel
from prunus.models.axes import find_axes
from prunus.models.limits import kv_cache_values
from prunus.steps.advise import ADVISES, advise
from prunus.steps.keep import results_survive
from prunus.steps.sensitivity import measure_sensitivity


def profile(
    model: str | Path,
    *,
    sensitivity: bool = False,
    into: str | Path | None = None,
    pattern: str = "0.5",
    by: str = "block",
    text: str = "builtin",
    length: int = 256,
    windows: int = 8,
    engine: str | None = None,
    dtype: str = "auto",
    device: str = "auto",
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """Return parameters and bytes by component, decode bytes and FLOPs per token, and a row per decoder block.

    With `sensitivity`, each block (or, with by="matrix", each matrix) is pruned alone to `pattern` and the KL to the
    model as it is on `text` is measured, with a forward pass in `dtype` on `device`. The rows are kept in the record of
    the model, where it has one, or of the run `into`, which was made from the model. `engine` "sparse-cpu" adds what
    packing every pattern would gain on this machine, by a micro-benchmark of some 20 seconds. Raises UserError when the
    model is not understood, the run was made from another, or the engine is not one that can be asked.
    """
    if engine not in (None, ADVISES):
        raise UserError(f"--engine {engine} gives no advice; {ADVISES} does.")
    if into is not None and not sensitivity:
        raise UserError("--into says where sensitivity is kept, and none was asked for; add --sensitivity.")
    checkpoint = open_checkpoint(model, trust_remote_code=trust_remote_code)
    described = StreamedModel(checkpoint, dtype=torch.float32)
    result = describe(described)
    if engine:
        result["advice"] = advise(described)
    if sensitivity:
        keeper = checkpoint.path if into is None else _made_from(checkpoint, Path(into))
        place = choose_device(device)
        width = int(checkpoint.config.get_text_config(decoder=True).hidden_size)
        streamed = StreamedModel(checkpoint, dtype=choose_dtype(dtype, place, width), device=place)
        rows = measure_sensitivity(streamed, pattern=pattern, by=by, text=text, length=length, windows=windows)
        result["sensitivity"] = rows
        with results_survive(keeper):
            _keep(keeper, rows)
    return result


def _made_from(checkpoint: Checkpoint, run: Path) -> Path:
    """The run, when this model is what it was made from. Raises UserError otherwise."""
    record = read_record(run)
    if record is None:
        raise UserError(f"{run} has no prunus.json; give --into a directory that prunus made.")
    inputs = [(step.get("input") or {}).get("sha256") for step in record["history"]]
    if checkpoint.sha256 not in inputs:
        raise UserError(f"{run} was not made from {checkpoint.path}; give --into a run that was, or leave it out.")
    return run


def _keep(directory: Path, rows: list[dict[str, Any]]) -> None:
    """Add the rows to the record of a directory that has one, in place of those of the same unit and conditions."""
    record = read_record(directory)
    if record is None:
        return
    again = [_conditions(row) for row in rows]
    others = [row for row in record.get("sensitivity", []) if _conditions(row) not in again]
    write_json(directory / RECORD_NAME, {**record, "sensitivity": [*others, *rows]})


def _conditions(row: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in row.items() if name not in ("kl", "model")}  # the hash is the model


def describe(model: StreamedModel) -> dict[str, Any]:
    """The part of a profile that reads no weights."""
    tensors, blocks = model.checkpoint.tensors, model.block_keys()
    layers = [_layer(model, index, keys) for index, keys in enumerate(blocks)]
    inside = {key for keys in blocks for key in keys}
    outside = {name: info for name, info in tensors.items() if name not in inside}
    looked_up = _looked_up_bytes(model)
    return {
        "model": str(model.checkpoint.path),
        "family": model.spec.family,
        "parameters": model.checkpoint.num_parameters,
        "bytes": model.checkpoint.num_bytes,
        "components": {
            "decoder blocks": sum(layer["bytes"] for layer in layers),
            **{name: info.num_bytes for name, info in outside.items()},
        },
        "prunable_parameters": sum(o * i for o, i in (linear.shape for _, linear in model.spec.matrices)),
        "decode_bytes_per_token": model.checkpoint.num_bytes - looked_up - _sleeping_expert_bytes(model),
        "flops_per_token": _flops_per_token(model),
        "kv_cache_values_per_token": kv_cache_values(model.config),
        "axes": _axes(model),
        "layers": layers,
    }


def _axes(model: StreamedModel) -> list[dict[str, Any]]:
    """What the architecture lets be made smaller: how many units there are, and how many parameters go with one."""
    axes, refused = find_axes(model.config, trust_remote_code=model.checkpoint.trust_remote_code)
    rows: list[dict[str, Any]] = [
        {
            "axis": axis.name,
            "units": axis.units,
            "parameters_per_unit": sum(n for name, n in axis.elements.items() if model.names.keys_of([name])),
            "config": list(axis.per_unit),
        }
        for axis in axes.values()
    ]
    return rows + [{"axis": name, "refused": reason} for name, reason in refused.items()]


def _layer(model: StreamedModel, index: int, keys: list[str]) -> dict[str, Any]:
    infos = [model.checkpoint.tensors[key] for key in keys]
    projections: dict[str, dict[str, Any]] = {}
    for linear in model.spec.blocks[index].linears:
        row = projections.setdefault(linear.projection, {"shape": list(linear.shape), "matrices": 0})
        row["matrices"] += 1
    return {
        "block": index,
        "name": model.spec.blocks[index].name,
        "parameters": sum(info.num_elements for info in infos),
        "bytes": sum(info.num_bytes for info in infos),
        "projections": projections,
    }


def _looked_up_bytes(model: StreamedModel) -> int:
    """An embedding that is not also the head is read one row per token: nothing, against the rest."""
    names = model.names.keys_of(model.input_embeddings)
    tied = not model.names.keys_of(model.output_head)
    return 0 if tied else sum(model.checkpoint.tensors[name].num_bytes for name in names)


def _active_share(model: StreamedModel) -> float:
    """Share of the experts that one token wakes."""
    config = model.config.get_text_config(decoder=True)
    active = getattr(config, "num_experts_per_tok", None)
    banks = [len(stage.groups) for block in model.spec.blocks for stage in block.stages if stage.weight]
    return min(active / max(banks), 1.0) if banks and active else 1.0


def _sleeping_expert_bytes(model: StreamedModel) -> int:
    banks = {block.full_parameter(linear) for block, linear in model.spec.matrices if linear.expert is not None}
    stored = sum(model.checkpoint.tensors[key].num_bytes for key in model.names.keys_of(banks))
    return int(stored * (1 - _active_share(model)))


def _flops_per_token(model: StreamedModel) -> int:
    """Two per weight that a token meets, attention scores left out (they grow with the context)."""
    share = _active_share(model)
    inside = sum(
        linear.shape[0] * linear.shape[1] * (1.0 if linear.expert is None else share)
        for _, linear in model.spec.matrices
    )
    head = model.config.get_text_config(decoder=True)
    return int(2 * (inside + head.vocab_size * head.hidden_size))
