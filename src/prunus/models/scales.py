"""Where a model's numbers depend on its width, found by asking its own code.

Norms: most multiply by their weight w, some by 1 + w. Embeddings: some families scale them by the root of the width.
"""

from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

from prunus.models.outer import BlockCall, blocks_replaced
from prunus.models.trace import find_blocks, outer_parameters_as


def added_by_norms(model: nn.Module) -> dict[str, float]:
    """The weight of every norm of a model on the meta device -> what the norm adds to it before it multiplies."""
    known: dict[tuple[type, int], float] = {}
    found = {}
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if "norm" in type(module).__name__.lower() and isinstance(weight, nn.Parameter) and weight.ndim == 1:
            kind = (type(module), len(weight))
            if kind not in known:
                known[kind] = _added(module)
            found[f"{name}.weight"] = known[kind]
    return found


@torch.no_grad()
def _added(module: nn.Module) -> float:
    """The norm's output is u (w + a) + bias: w = 0 gives u a, w = 1 gives u (1 + a), so their ratio tells a."""
    own = deepcopy(module).to_empty(device="cpu").float()
    x_1H = torch.linspace(1, 2, len(own.weight))[None]  # type: ignore[arg-type]
    outputs = []
    for value in (0.0, 1.0):
        for parameter in own.parameters():
            parameter.zero_()
        own.weight.fill_(value)  # type: ignore[operator, union-attr]
        outputs.append(own(x_1H))
    unit_1H = outputs[1] - outputs[0]
    return round(float(outputs[0].abs().sum() / unit_1H.abs().sum()), 3)


class _FirstBlock(Exception):  # noqa: N818 it is no error: it ends a forward pass whose rest nobody needs
    def __init__(self, hidden_BTH: Tensor) -> None:
        self.hidden_BTH = hidden_BTH


def embedding_scale(model: Any) -> float:
    """What the first block receives of an embedding of ones, everything else outside the blocks being zero."""
    list_name, blocks = find_blocks(model)
    table = model.get_input_embeddings().weight

    def stop(_index: int, call: BlockCall) -> Any:
        raise _FirstBlock(call.hidden_BTH)

    with outer_parameters_as(model, list_name, lambda p: float(p is table)), blocks_replaced(blocks, stop):
        try:
            model.base_model(input_ids=torch.zeros(1, 1, dtype=torch.long), use_cache=False)
        except _FirstBlock as reached:
            return float(reached.hidden_BTH.mean())
    raise AssertionError("the model did not call its blocks")
