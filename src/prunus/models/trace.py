"""Read a ModelSpec off the model itself: run its blocks on the meta device and watch which matrices read which tensors.

A meta forward computes shapes only, so this takes a second and no memory for any size of model. Watching it tells
in which order each block uses its matrices and which of them share an input. Any family with the usual decoder
shape is understood without a table; what is not understood is refused by name.
"""

from collections.abc import Callable, Iterator, MutableMapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only
from transformers.pytorch_utils import Conv1D

from prunus.errors import UserError
from prunus.models.experts import fused_weights
from prunus.models.outer import BlockCall, blocks_replaced
from prunus.models.spec import BlockSpec, Group, LinearSpec, ModelSpec, Stage


@dataclass
class _Call:
    module: str  # full module name
    weight: str | None  # fused tensor of experts
    source: Tensor | None  # the input tensor itself: identity tells shared inputs, keeping it alive keeps ids unique


@dataclass
class _Seen:
    calls: list[_Call] = field(default_factory=list)
    returns_tuple: bool = False


def trace_model(model: Any) -> ModelSpec:
    """Return the spec of a causal language model that lives on the meta device, buffers excepted.

    Raises UserError naming what was not understood.
    """
    family = str(model.config.model_type)
    list_name, blocks = find_blocks(model)
    seen = _watch_forward(model, list_name, blocks, family)
    specs = [_block_spec(f"{list_name}.{i}", block, seen[i], family) for i, block in enumerate(blocks)]
    return ModelSpec(family=family, blocks=tuple(specs), head=_head_spec(model))


def find_blocks(model: Any) -> tuple[str, nn.ModuleList]:
    """Return (name, list) of the decoder blocks: the outermost ModuleList as long as the config says."""
    depth = model.config.get_text_config(decoder=True).num_hidden_layers
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == depth:
            return name, module
    raise UserError(
        f"architecture {model.config.model_type!r} is not supported: it has no list of {depth} decoder blocks."
    )


def _watch_forward(model: Any, list_name: str, blocks: nn.ModuleList, family: str) -> list[_Seen]:
    seen: list[_Seen] = []
    hiddens: list[Tensor] = []

    def stand_in(index: int, call: BlockCall) -> Any:
        if index != len(seen) or (hiddens and call.hidden_BTH is not hiddens[-1]):
            raise UserError(f"architecture {family!r} is not supported: its blocks do not simply feed each other.")
        seen.append(_Seen())
        args, kwargs, hidden = tree_map_only(Tensor, lambda t: t.to("meta"), (call.args, call.kwargs, call.hidden_BTH))
        output = type(blocks[index]).forward(blocks[index], hidden, *args, **kwargs)
        _check_nothing_shared(args, kwargs, family)
        seen[-1].returns_tuple = isinstance(output, tuple)
        hiddens.append(call.hidden_BTH.clone())
        return (hiddens[-1],) if seen[-1].returns_tuple else hiddens[-1]

    with _notes(model, list_name, seen), outer_parameters_as(model, list_name), blocks_replaced(blocks, stand_in):
        try:
            model.base_model(input_ids=torch.zeros(1, 8, dtype=torch.long), use_cache=False)
        except UserError:
            raise
        except Exception as error:  # whatever fails inside the model's own code means: not understood
            raise UserError(f"architecture {family!r} is not supported: it cannot be traced ({error}).") from error
    if len(seen) != len(blocks):
        raise UserError(f"architecture {family!r} is not supported: {len(seen)} of its {len(blocks)} blocks were run.")
    return seen


def _check_nothing_shared(args: Any, kwargs: Any, family: str) -> None:
    """Refuse blocks that leave something for later ones: a block alone would not find what another sequence left."""
    if left := [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, MutableMapping) and leaf]:
        raise UserError(
            f"architecture {family!r} is not supported: its blocks share state ({type(left[0]).__name__}) beside the "
            "hidden states."
        )


@contextmanager
def _notes(model: Any, list_name: str, seen: list[_Seen]) -> Iterator[None]:
    """Within the context, every use of a matrix inside a block is noted on the last entry of `seen`."""
    handles = []

    def note(name: str, weight: str | None, source: Tensor | None) -> None:
        seen[-1].calls.append(_Call(name, weight, source))

    for name, module in model.named_modules():
        if not name.startswith(f"{list_name}."):
            continue
        if isinstance(module, nn.Linear | Conv1D):
            handles.append(module.register_forward_pre_hook(lambda _m, args, name=name: note(name, None, args[0])))
        elif fused_weights(module):
            module.observe_experts = lambda weight, _inputs, name=name: note(name, weight, None)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for module in model.modules():
            module.__dict__.pop("observe_experts", None)


@contextmanager
def outer_parameters_as(
    model: nn.Module, list_name: str, value_of: Callable[[nn.Parameter], float] = lambda _parameter: 0.0
) -> Iterator[None]:
    """Within the context, each parameter outside the blocks is one value that takes no memory (stride 0)."""
    outer = {name: p for name, p in model.named_parameters() if not name.startswith(f"{list_name}.")}
    for name, parameter in outer.items():
        _set_parameter(model, name, torch.full((), value_of(parameter), dtype=parameter.dtype).expand(parameter.shape))
    try:
        yield
    finally:
        for name, parameter in outer.items():
            _set_parameter(model, name, parameter)


def _set_parameter(model: nn.Module, name: str, value: Tensor) -> None:
    owner, _, leaf = name.rpartition(".")
    model.get_submodule(owner)._parameters[leaf] = (
        value if isinstance(value, nn.Parameter) else nn.Parameter(value, requires_grad=False)
    )


def _block_spec(name: str, block: Any, seen: _Seen, family: str) -> BlockSpec:
    called = [(call.module, call.weight) for call in seen.calls]
    if len(set(called)) != len(called):
        raise UserError(f"architecture {family!r} is not supported: {name} uses one of its matrices twice.")
    deciders = _deciders(block)
    stages: list[Stage] = []
    previous: Tensor | None = None
    for call in seen.calls:
        inner = call.module.removeprefix(f"{name}.")
        if call.weight is not None:
            stages.append(_experts_stage(inner, call.weight, block))
        elif (linear := _plain_linear(inner, block)).parameter in deciders:
            continue
        elif previous is not None and previous is call.source and stages[-1].weight is None:
            last = stages[-1]
            stages[-1] = Stage(module=last.module, weight=None, groups=(Group((*last.groups[0].linears, linear)),))
        else:
            stages.append(Stage(module=inner, weight=None, groups=(Group((linear,)),)))
        previous = call.source
    spec = BlockSpec(name=name, stages=tuple(stages), returns_tuple=seen.returns_tuple)
    _check_coverage(spec, block, deciders, family)
    return spec


def _deciders(block: Any) -> set[str]:
    """Parameters that decide and do not compute, so they are never pruned: routers, gates of shared experts.

    They lie beside a bank of experts, each alone in its module, with a row per expert or a single one; a narrow
    projection of an attention is never alone. Biases of experts are matrices in shape only.
    """
    names: set[str] = set()
    for bank_name, bank in block.named_modules():
        if not fused_weights(bank):
            continue
        names |= {f"{bank_name}.{name}" for name, parameter in bank.named_parameters() if parameter.ndim == 2}
        owner = bank_name.rpartition(".")[0]
        for child_name, child in block.get_submodule(owner).named_children():
            matrices = [(name, len(p)) for name, p in child.named_parameters(f"{owner}.{child_name}") if p.ndim > 1]
            if len(matrices) == 1 and matrices[0][1] in (1, bank.num_experts):
                names.add(matrices[0][0].removeprefix("."))
    return names


def _head_spec(model: Any) -> BlockSpec | None:
    """The output head, where it is a linear layer with weights of its own."""
    head = model.get_output_embeddings()
    name = next((name for name, module in model.named_modules() if module is head), "")
    if not isinstance(head, nn.Linear) or f"{name}.weight" in model.all_tied_weights_keys:
        return None
    stage = Stage(module=name, weight=None, groups=(Group((_plain_linear(name, model),)),))
    return BlockSpec(name="", stages=(stage,), returns_tuple=False)


def _plain_linear(name: str, block: Any) -> LinearSpec:
    module = block.get_submodule(name)
    transposed = isinstance(module, Conv1D)
    rows, columns = module.weight.shape
    shape = (columns, rows) if transposed else (rows, columns)
    bias = None if module.bias is None else f"{name}.bias"
    return LinearSpec(name=name, parameter=f"{name}.weight", shape=shape, transposed=transposed, bias=bias)


def _experts_stage(name: str, weight: str, block: Any) -> Stage:
    module = block.get_submodule(name)
    num_experts, rows, columns = getattr(module, weight).shape
    shape = (columns, rows) if module.is_transposed else (rows, columns)
    groups = [
        Group(
            (
                LinearSpec(
                    name=f"{name}.{expert}.{weight}",
                    parameter=f"{name}.{weight}",
                    shape=shape,
                    transposed=module.is_transposed,
                    expert=expert,
                    bias=f"{name}.{weight}_bias" if module.has_bias else None,
                ),
            )
        )
        for expert in range(num_experts)
    ]
    return Stage(module=name, weight=weight, groups=tuple(groups))


def _check_coverage(spec: BlockSpec, block: Any, deciders: set[str], family: str) -> None:
    """Refuse a block with a matrix that nobody understood: it must never be half pruned."""
    understood = deciders | {linear.parameter for linear in spec.linears}
    for name, parameter in block.named_parameters():
        if parameter.ndim >= 2 and name not in understood:
            owner = type(block.get_submodule(name.rpartition(".")[0])).__name__
            raise UserError(
                f"architecture {family!r} is not supported: {spec.name} holds {name} {tuple(parameter.shape)} in a "
                f"{owner}, which is neither a Linear, a Conv1D nor a bank of experts."
            )
    if not spec.stages:
        raise UserError(f"architecture {family!r} is not supported: {spec.name} has no matrix to prune.")
