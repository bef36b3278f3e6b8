"""The description of one architecture: its decoder blocks and, inside each, the prunable matrices in execution order.

Nothing here is written down per family: `models/trace.py` reads it off the Hugging Face model itself.

Shapes: O = out_features, I = in_features.
"""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class LinearSpec:
    """One prunable matrix of a block: a whole `Linear` or `Conv1D`, or one expert's slice of a fused 3-D tensor."""

    name: str  # inside the block, e.g. "self_attn.q_proj" or "mlp.experts.3.down_proj"
    parameter: str  # the module parameter that holds it, e.g. "self_attn.q_proj.weight"
    shape: tuple[int, int]  # (O, I), whatever the storage order
    transposed: bool = False  # stored (I, O): Conv1D, and experts of some families
    expert: int | None = None  # index into the first axis of a fused (experts, ., .) tensor
    bias: str | None = None  # the module parameter that holds its bias

    @property
    def projection(self) -> str:
        """The name without the expert's number, e.g. "mlp.experts.down_proj": one column of a per-layer table."""
        return self.name if self.expert is None else self.name.replace(f".{self.expert}.", ".", 1)

    def view(self, stored: Tensor) -> Tensor:
        """Return the matrix as an (O, I) view of the parameter that holds it: writing to it edits the parameter."""
        weight = stored if self.expert is None else stored[self.expert]
        return weight.T if self.transposed else weight

    def bias_view(self, stored: Tensor) -> Tensor:
        """Return the bias (O) as a view of the parameter that holds it."""
        return stored if self.expert is None else stored[self.expert]


@dataclass(frozen=True, slots=True)
class Group:
    """Matrices that read the same input tensor, so they share one set of statistics (q, k, v; gate, up)."""

    linears: tuple[LinearSpec, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Stage:
    """A point of the block's forward pass that needs every earlier matrix solved: qkv, then o, then gate/up, then down.

    A stage has one group, except that experts give one group per expert.
    """

    module: str  # the module whose input is observed, inside the block
    weight: str | None  # for experts: which of its fused tensors; None for a plain linear
    groups: tuple[Group, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class BlockSpec:
    """One decoder block."""

    name: str  # e.g. "model.layers.0"
    stages: tuple[Stage, ...]
    returns_tuple: bool  # some families return (hidden, ...) instead of hidden

    @property
    def linears(self) -> tuple[LinearSpec, ...]:
        return tuple(linear for stage in self.stages for group in stage.groups for linear in group.linears)

    def full_name(self, linear: LinearSpec) -> str:
        return self.full(linear.name)

    def full_parameter(self, linear: LinearSpec) -> str:
        return self.full(linear.parameter)

    def full(self, name: str) -> str:
        """The model's name of what the block calls `name`."""
        return f"{self.name}.{name}" if self.name else name


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelSpec:
    """A causal language model as the block pass sees it."""

    family: str  # config.model_type
    blocks: tuple[BlockSpec, ...]
    head: BlockSpec | None  # the output head as a block of one matrix; None when it is tied to the embedding

    @property
    def matrices(self) -> list[tuple[BlockSpec, LinearSpec]]:
        return [(block, linear) for block in self.blocks for linear in block.linears]
