"""A causal language model run one decoder block at a time, straight from its safetensors.

Memory is the parts outside the blocks plus one block, whatever the size of the model.

Shapes: N = sequences, T = tokens, H = hidden, V = vocabulary.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from transformers import AutoTokenizer, PretrainedConfig

from prunus.checkpoint.directory import Checkpoint, open_checkpoint
from prunus.errors import UserError
from prunus.models.outer import BlockCall, blocks_replaced
from prunus.models.rounded_inputs import round_inputs
from prunus.models.skeleton import build_skeleton, restore_buffers
from prunus.models.spec import ModelSpec
from prunus.models.sublayers import Sublayer, find_sublayers
from prunus.models.tensor_names import TensorNames
from prunus.models.trace import find_blocks, trace_model


class _HeadReached(Exception):  # noqa: N818 it is no error: it ends a forward pass whose rest nobody needs
    def __init__(self, x_TH: Tensor) -> None:
        self.x_TH = x_TH


class StreamedModel:
    """The model of one checkpoint. `dtype` is that of the forward pass; `device` is where it runs."""

    def __init__(self, checkpoint: Checkpoint, *, dtype: torch.dtype, device: str = "cpu") -> None:
        self.checkpoint = checkpoint
        self.dtype = dtype
        self.device = torch.device(device)
        self._model: Any = build_skeleton(checkpoint.config, trust_remote_code=checkpoint.trust_remote_code)
        restore_buffers(self._model, self.device)
        self.spec: ModelSpec = trace_model(self._model)
        self._list_name, self.blocks = find_blocks(self._model)
        self.names = TensorNames(self._model, checkpoint.tensors)
        self._round_inputs()
        self._calls: dict[int, list[BlockCall]] = {}  # length -> the call of each block

    def _round_inputs(self) -> None:
        """Where the checkpoint's scheme says so, of the matrices that are quantized."""
        scheme, tensors = self.checkpoint.scheme, self.checkpoint.tensors
        if scheme is None or not scheme.rounds_inputs:
            return
        for number, block in enumerate(self.spec.blocks):
            for linear in block.linears:
                keys = self.names.keys_of([block.full_parameter(linear)])
                if linear.expert is None and tensors[keys[0]].stored_bytes is not None:
                    round_inputs(self.blocks[number].get_submodule(linear.name), scheme.grid)

    @property
    def config(self) -> PretrainedConfig:
        return self.checkpoint.config

    @property
    def tokenizer(self) -> Any:
        return load_tokenizer(self.checkpoint)

    def block_parameters(self, index: int) -> list[str]:
        """Full names of everything block `index` keeps in the checkpoint: parameters and persistent buffers."""
        prefix = self.spec.blocks[index].name
        return [f"{prefix}.{name}" for name in self.blocks[index].state_dict()]

    def outer_parameters(self) -> list[str]:
        """Full names of everything outside the blocks."""
        return [name for name in self._model.state_dict() if not name.startswith(f"{self._list_name}.")]

    @property
    def input_embeddings(self) -> list[str]:
        """Parameter names of the token embedding."""
        return self._names_within(self._model.get_input_embeddings())

    @property
    def output_head(self) -> list[str]:
        """Parameter names of the output head, which have no tensors of their own when it is tied."""
        return self._names_within(self._model.get_output_embeddings())

    def linear_layers(self) -> list[tuple[str, str]]:
        """Every `Linear` of the model, the head included: its module's name and its weight's."""
        modules = self._model.named_modules()
        return [(name, f"{name}.weight") for name, module in modules if isinstance(module, nn.Linear)]

    def _names_within(self, module: nn.Module) -> list[str]:
        prefix = next(name for name, candidate in self._model.named_modules() if candidate is module)
        return [f"{prefix}.{name}" for name in module.state_dict()]

    def sublayers(self) -> list[dict[str, Sublayer]]:
        """Attention and MLP of each block. Raises UserError for blocks that do not hold them in a module each."""
        return find_sublayers(self._model)

    def block_keys(self) -> list[list[str]]:
        """For each block, the checkpoint's names of its tensors."""
        return [self.names.keys_of(self.block_parameters(i)) for i in range(len(self.spec.blocks))]

    def load_block(self, index: int) -> dict[str, Tensor]:
        """Fill block `index` from the checkpoint, in the forward dtype, on the device.

        Returns its tensors as the checkpoint has them, under the model's parameter names. Where dtype and device are
        the same, they share memory with the block.
        """
        state = self.names.load(self.block_parameters(index), self.checkpoint.read)
        self._assign(state)
        return state

    def free_block(self, index: int) -> None:
        """Give the memory of block `index` back."""
        self.blocks[index].to("meta")

    def free_outer(self) -> None:
        """Give the memory of embedding, final norm and head back; they load again when they are needed."""
        for name in self.outer_parameters():
            self._set(name, self._model.get_parameter_or_buffer(name).to("meta"))

    def embed(self, tokens_1T: Tensor) -> Tensor:
        """Return the hidden states (1, T, H) that the first block receives, and learn how blocks are called.

        Raises UserError when blocks are called with other tensors than for the sequences of this length before.
        """
        first: list[Tensor] = []
        calls: list[BlockCall] = []

        def stand_in(index: int, call: BlockCall) -> Any:
            first.append(call.hidden_BTH)
            calls.append(BlockCall(torch.empty(0), call.args, call.kwargs))
            return self._as_output(index, call.hidden_BTH)

        self._load_outer()
        with torch.no_grad(), blocks_replaced(self.blocks, stand_in):
            self._model.base_model(input_ids=tokens_1T.to(self.device), use_cache=False)
        self._learn_calls(tokens_1T.shape[1], calls)
        return first[0]

    def _learn_calls(self, length: int, calls: list[BlockCall]) -> None:
        """One sequence's calls stand for those of all: only the hidden states may tell sequences apart."""
        pairs = zip(_tensors(self._calls.setdefault(length, calls)), _tensors(calls), strict=True)
        distinct = {(id(known), id(new)): (known, new) for known, new in pairs}  # blocks share most of them
        if not all(known is new or torch.equal(known, new) for known, new in distinct.values()):
            raise UserError(
                f"architecture {self.spec.family!r} is not supported: its blocks read more of the tokens than the "
                "hidden states."
            )

    def run_block(self, index: int, hidden_1TH: Tensor) -> Tensor:
        """Run the loaded block on (1, T, H) hidden states; `embed` was called before on a sequence of that length.

        No graph is recorded, as neither weights nor hidden states ask for one. There must be no `no_grad` in here: it
        sets a mode of the whole thread, and greenlets that run this in turns would restore it in the wrong order.
        """
        call = self._calls[hidden_1TH.shape[1]][index]
        output = call.run(self.blocks[index], hidden_1TH.to(self.device))
        hidden: Tensor = output[0] if isinstance(output, tuple) else output
        return hidden

    def logits(self, tokens_1T: Tensor, hidden_1TH: Tensor) -> Tensor:
        """Return fp32 logits (1, T, V) from the last block's output: final norm, head, scaling and capping.

        A graph is recorded only where the hidden states ask for one.
        """

        def stand_in(index: int, _call: BlockCall) -> Any:
            return self._as_output(index, hidden_1TH.to(self.device))

        self._load_outer()
        with blocks_replaced(self.blocks, stand_in):
            output = self._model(input_ids=tokens_1T.to(self.device), use_cache=False)
        logits: Tensor = output.logits.float()
        return logits

    def head_inputs(self, tokens_1T: Tensor, hidden_1TH: Tensor) -> Tensor:
        """Return what the output head reads (T, H): the last block's output after the final norm."""

        def stop(_module: nn.Module, args: tuple[Any, ...]) -> None:
            raise _HeadReached(args[0].flatten(0, -2))

        handle = self._model.get_output_embeddings().register_forward_pre_hook(stop)
        try:
            self.logits(tokens_1T, hidden_1TH)
        except _HeadReached as reached:
            return reached.x_TH
        finally:
            handle.remove()
        raise AssertionError("the model did not use its output head")

    def _as_output(self, index: int, hidden: Tensor) -> Any:
        return (hidden,) if self.spec.blocks[index].returns_tuple else hidden

    def _load_outer(self) -> None:
        """Load embedding, final norm and head once; they stay."""
        names = self.outer_parameters()
        if not any(self._model.get_parameter_or_buffer(name).is_meta for name in names):
            return
        self._assign(self.names.load(names, self.checkpoint.read))
        self._model.tie_weights()

    def _assign(self, state: dict[str, Tensor]) -> None:
        for name, tensor in state.items():
            self._set(name, tensor.to(self.device, self.dtype if tensor.is_floating_point() else None))

    def _set(self, name: str, value: Tensor) -> None:
        owner, _, leaf = name.rpartition(".")
        module = self._model.get_submodule(owner)
        if leaf in module._parameters:
            module._parameters[leaf] = nn.Parameter(value, requires_grad=False)
        else:
            module._buffers[leaf] = value


def _tensors(calls: list[BlockCall]) -> list[Tensor]:
    return [leaf for leaf in tree_leaves([(call.args, call.kwargs) for call in calls]) if isinstance(leaf, Tensor)]


def load_tokenizer(checkpoint: Checkpoint) -> Any:
    """The model's own tokenizer. Raises UserError when the directory has none."""
    try:
        return AutoTokenizer.from_pretrained(
            checkpoint.path, config=checkpoint.config, trust_remote_code=checkpoint.trust_remote_code
        )
    except Exception as error:  # transformers raises many types here, all of them meaning: no usable tokenizer
        reason = " ".join(str(error).split())
        message = f"{checkpoint.path} has no usable tokenizer ({reason}); add the model's tokenizer files."
        raise UserError(message) from error


def open_model(
    model: str | Path, *, dtype: torch.dtype = torch.float32, device: str = "cpu", trust_remote_code: bool = False
) -> StreamedModel:
    """Open a model directory or hub name for streamed running. Raises UserError when it is not understood."""
    return StreamedModel(open_checkpoint(model, trust_remote_code=trust_remote_code), dtype=dtype, device=device)
