"""A model directory as a graph of OpenVINO with a state; run by the engine's own Python, without prunus.

transformers' model is traced once, with keys and values going in and coming out. These become state inside the graph,
re-ordered by `beam_idx` as OpenVINO's own runtimes expect it, so that a step is given one token and no cache.
"""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import openvino
import openvino.opset13 as ops
import torch
from transformers import AutoModelForCausalLM, DynamicCache
from transformers.cache_utils import DynamicLayer

QUANTIZED = {"int8": "INT8_ASYM", "int4": "INT4_ASYM"}
GROUPS = (64, 32, 16)  # weights of a row that share a scale in int4: the largest that divides all rows
UNPACKING = ("Convert", "Subtract", "Multiply", "Reshape")  # and norms multiply: they end elsewhere than in Gather
PARAMETERS = ["prunus", "parameters"]
WIDTHS = {"f32": 4.0, "f16": 2.0, "bf16": 2.0, "i8": 1.0, "u8": 1.0, "i4": 0.5, "u4": 0.5}


class Decoder(torch.nn.Module):
    """The model with its cache as plain tensors: past keys and values in, all keys and values out."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Any, attention_mask: Any, position_ids: Any, past: Any) -> Any:
        cache = DynamicCache()
        for keys, values in past:
            layer = DynamicLayer()
            layer.keys, layer.values, layer.is_initialized = keys, values, True
            layer.dtype, layer.device = keys.dtype, keys.device
            cache.layers.append(layer)
        named = {"attention_mask": attention_mask, "position_ids": position_ids}
        told = self.model(input_ids=input_ids, past_key_values=cache, use_cache=True, **named)
        return (told.logits, *(one for layer in told.past_key_values.layers for one in (layer.keys, layer.values)))


def write(source: str, target: Path, kind: str, *, trust: bool) -> None:
    """Trace, make the cache a state, compress the weights to `kind` (f32, f16, int8, int4), save."""
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, trust_remote_code=trust).eval()
    graph = _stateful(_traced(model))
    if kind in QUANTIZED:
        import nncf

        rows = min((one.shape[1] for one in model.parameters() if one.ndim == 2), key=_largest_group)
        grouped = {"group_size": _largest_group(rows), "ratio": 1.0} if kind == "int4" else {}
        graph = nncf.compress_weights(graph, mode=nncf.CompressWeightsMode[QUANTIZED[kind]], **grouped)
    graph.set_rt_info(str(model.num_parameters()), PARAMETERS)
    target.parent.mkdir(parents=True, exist_ok=True)
    openvino.save_model(graph, target, compress_to_fp16=kind == "f16")


def _largest_group(row: int) -> int:
    """Scales go along whole rows (-1) where no group divides them."""
    return next((size for size in GROUPS if row % size == 0), -1)


def _traced(model: Any) -> Any:
    """The graph with named inputs and outputs, any batch and length."""
    config = model.config
    heads, size = (
        getattr(config, "num_key_value_heads", None) or config.num_attention_heads,
        getattr(config, "head_dim", None),
    )
    size = size or config.hidden_size // config.num_attention_heads
    past = [(torch.zeros(1, heads, 3, size), torch.zeros(1, heads, 3, size)) for _ in range(config.num_hidden_layers)]
    example: dict[str, Any] = {
        "input_ids": torch.ones(1, 2, dtype=torch.long),
        "attention_mask": torch.ones(1, 5, dtype=torch.long),
    }
    example |= {"position_ids": torch.tensor([[3, 4]]), "past": past}
    with torch.no_grad():
        graph = openvino.convert_model(Decoder(model), example_input=example)
    names = [f"{layer}.{what}" for layer in range(config.num_hidden_layers) for what in ("key", "value")]
    inputs = ["input_ids", "attention_mask", "position_ids", *(f"past_key_values.{name}" for name in names)]
    for port, name in zip(graph.inputs, inputs, strict=True):
        port.get_tensor().set_names({name})
        shape = [-1, heads, -1, size] if name.startswith("past") else [-1, -1]
        port.get_node().set_partial_shape(openvino.PartialShape(shape))
    for port, name in zip(graph.outputs, ["logits", *(f"present.{name}" for name in names)], strict=True):
        port.get_tensor().set_names({name})
    graph.validate_nodes_and_infer_types()
    return graph


def _stateful(graph: Any) -> Any:
    """Make keys and values a state that begins empty and follows `beam_idx`."""
    from openvino._offline_transformations import apply_make_stateful_transformation

    beams = ops.parameter([-1], dtype=np.int32, name="beam_idx")
    beams.output(0).get_tensor().add_names({"beam_idx"})
    graph.add_parameters([beams])
    past = [port.get_any_name() for port in graph.inputs if port.get_any_name().startswith("past_key_values.")]
    for name in past:
        port = graph.input(name).get_node().output(0)
        users = port.get_target_inputs()
        reordered = ops.gather(port, beams, ops.constant(0))
        for user in users:
            user.replace_source_output(reordered.output(0))
    graph.validate_nodes_and_infer_types()
    apply_make_stateful_transformation(graph, {name: name.replace("past_key_values", "present") for name in past})
    _begin_empty(graph)
    return graph


def _begin_empty(graph: Any) -> None:
    batch = ops.gather(ops.shape_of(graph.input("input_ids")), ops.constant(np.array([0])), ops.constant(0))
    for node in graph.get_ops():
        if node.get_type_name() == "ReadValue":
            shape = node.get_output_partial_shape(0)
            rest = np.array([shape[1].get_length(), 0, shape[3].get_length()])
            empty = ops.broadcast(ops.constant(np.float32(0)), ops.concat([batch, ops.constant(rest)], axis=0))
            node.set_arguments([empty])
    graph.validate_nodes_and_infer_types()


def count(graph: Any) -> dict[str, Any]:
    """Parameters, tensors by type, and the bytes that one decoded token reads: of an embedding of its own, one row."""
    types: Counter[str] = Counter()
    read = 0.0
    for node in graph.get_ops():
        if node.get_type_name() != "Constant" or (kind := node.get_element_type().get_type_name()) not in WIDTHS:
            continue
        if (size := int(np.prod(node.get_output_shape(0)))) == 1:
            continue  # a number of a formula
        read += 0 if _users(node) == {"Gather"} else size * WIDTHS[kind]
        types[kind] += not node.get_friendly_name().endswith(("/scale", "/zero_point"))
    parameters = int(graph.get_rt_info(PARAMETERS).astype(str))
    return {"tensors": dict(+types), "parameters": parameters, "decode_bytes_per_token": int(read)}


def _users(node: Any) -> set[str]:
    """The operations that a constant ends in, past those that only unpack it."""
    found: set[str] = set()
    for user in node.output(0).get_target_inputs():
        name = user.get_node().get_type_name()
        found |= _users(user.get_node()) if name in UNPACKING else {name}
    return found
