"""What runs in ONNX Runtime's environment, and answers as inside/worker_loop.py says: what it can `do` stands below.

Started by prunus with the engine's own Python, so it imports nothing of prunus.

Shapes: T = tokens of a window, V = vocabulary.
"""

import inspect
import json
import os
import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime_genai as engine
from decoder import generate, score
from worker_loop import memory, serve

BY_ROW = {("Gather", 0), ("GatherBlockQuantized", 0), ("GroupQueryAttention", 7), ("GroupQueryAttention", 8)}
"""Inputs of which a decoded token reads one row: the embedding, and the tables of rotary angles."""


class Model:
    """One directory of the model builder, loaded, with the engine's own settings but for threads and context."""

    def __init__(self, directory: str, context: int, threads: int) -> None:
        self.folder = Path(directory)
        self.config = json.loads((self.folder / "genai_config.json").read_text(encoding="utf-8"))["model"]
        config = engine.Config(directory)
        config.overlay(json.dumps({"model": {"decoder": {"session_options": {"intra_op_num_threads": threads}}}}))
        self.model = engine.Model(config)
        self.tokenizer = engine.Tokenizer(self.model)
        self.context = min(context, self.config["context_length"])
        self.generator: Any = None

    def _read(self, tokens: list[int]) -> Any:
        """A generator of its own for each text, which has read it."""
        options = engine.GeneratorParams(self.model)
        options.set_search_options(max_length=self.context, do_sample=False)
        self.generator = None  # its keys and values go before others come
        self.generator = engine.Generator(self.model, options)
        self.generator.append_tokens(np.array(tokens, dtype=np.int32))
        return self.generator

    def window(self, tokens: list[int]) -> Any:
        return self._read(tokens).get_output("logits")[0].astype(np.float32)

    def prompt(self, tokens: list[int]) -> Any:
        return self._read(tokens).get_logits().reshape(-1)

    def step(self, token: int) -> Any:
        assert self.generator is not None
        self.generator.append_tokens(np.array([token], dtype=np.int32))
        return self.generator.get_logits().reshape(-1)


def describe(_model: Model | None, _request: dict[str, Any]) -> dict[str, Any]:
    """The architectures that the model builder knows, as they stand in config.json: it names them in its code."""
    from onnxruntime_genai.models import builder

    names = re.findall(r'architectures\[0\] == "(\w+ForCausalLM)"', inspect.getsource(builder.create_model))
    return {"architectures": sorted(set(names))}


def convert(_model: Model | None, request: dict[str, Any]) -> dict[str, Any]:
    """Write a model directory as ONNX into `target` by the stock model builder, and say what its graph holds."""
    os.environ |= {"HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}
    from onnxruntime_genai.models import builder

    source, target, kind = request["source"], request["target"], request["type"]
    extra = ["hf_token=false", f"hf_remote={str(request['trust']).lower()}"]
    options = builder.parse_extra_options(source, source, target, kind, "cpu", target, extra)
    builder.create_model(source, source, target, kind, "cpu", target, **options)
    return {}


def contents(_model: Model | None, request: dict[str, Any]) -> dict[str, Any]:
    """Parameters, tensors by type, and the bytes that one decoded token reads, off a graph without its weights."""
    import onnx

    graph = onnx.load(str(Path(request["path"], "model.onnx")), load_external_data=False).graph
    uses: dict[str, list[tuple[str, int]]] = {}
    bits, elements, scales = {}, {}, set()
    for node in graph.node:
        for place, name in enumerate(node.input):
            uses.setdefault(name, []).append((node.op_type, place))
        if node.op_type in ("MatMulNBits", "GatherBlockQuantized"):
            told = {one.name: one.i for one in node.attribute}
            scales |= set(node.input[2:])
            if node.op_type == "MatMulNBits":
                bits[node.input[1]], elements[node.input[1]] = told["bits"], told["K"] * told["N"]
    return _count(graph.initializer, uses, bits, elements, scales)


def _count(tensors: Any, uses: Any, bits: Any, elements: Any, scales: Any) -> dict[str, Any]:
    from onnx import TensorProto, helper

    types: Counter[str] = Counter()
    parameters = read = 0
    for tensor in tensors:
        name, size = tensor.name, int(np.prod(tensor.dims))
        width = helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
        whole = not set(uses.get(name, [])) <= BY_ROW
        read += size * width if whole else 0
        if name in bits:
            types[f"int{bits[name]}"] += 1
            parameters += elements[name]
        elif (
            tensor.data_type != TensorProto.INT64
            and name not in scales
            and not name.endswith(("cos_cache", "sin_cache"))
        ):
            types[str(helper.tensor_dtype_to_np_dtype(tensor.data_type))] += 1
            parameters += size
    return {"tensors": dict(types), "parameters": parameters, "decode_bytes_per_token": read}


def facts(model: Model | None, _request: dict[str, Any]) -> dict[str, Any]:
    """What the engine made of the loaded directory."""
    assert model is not None
    return {
        "description": f"{model.config['type']}, {model.model.type}, on {model.model.device_type}",
        "vocabulary": model.config["vocab_size"],
        "layers": model.config["decoder"]["num_hidden_layers"],
        "bos": model.tokenizer.bos_token_id,
        "ends": [int(token) for token in model.tokenizer.eos_token_ids],
        "chat_template": _template(model.folder),
    }


def _template(folder: Path) -> str | None:
    """The chat template from where the engine's tokenizer takes it."""
    if (file := folder / "chat_template.jinja").is_file():
        return file.read_text(encoding="utf-8")
    stated: dict[str, Any] = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    return stated.get("chat_template")


def tokenize(model: Model | None, request: dict[str, Any]) -> dict[str, Any]:
    """Token ids of each text: `bos` lets the tokenizer add what it puts around a text."""
    assert model is not None
    tokens = []
    for one in request["texts"]:
        model.tokenizer.update_options(add_special_tokens=str(one["bos"]).lower())
        tokens.append(model.tokenizer.encode(one["text"]).tolist())
    return {"tokens": tokens}


def load(asked: dict[str, Any]) -> Model:
    """The directory of a request, loaded."""
    return Model(asked["path"], asked["context"], asked["threads"])


if __name__ == "__main__":
    serve(load, {f.__name__: f for f in (describe, convert, contents, facts, tokenize, score, generate, memory)})
