"""What runs in OpenVINO's environment, and answers as inside/worker_loop.py says: what it can `do` stands below.

Started by prunus with the engine's own Python, so it imports nothing of prunus. torch and transformers are imported to
convert only, so that the memory of what is measured is the engine's.

Shapes: T = tokens of a window, V = vocabulary.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import openvino
from decoder import generate, score
from tokenizers import Tokenizer
from worker_loop import memory, serve

GRAPH = "openvino_model.xml"


class Model:
    """One exported directory, compiled for the CPU, with the engine's own settings but for threads and precision.

    It computes in float32: by itself it takes bfloat16 where the processor has it. Its cache stays as it is: 8 bits.
    """

    def __init__(self, directory: str, threads: int) -> None:
        self.folder = Path(directory)
        self.config = json.loads((self.folder / "config.json").read_text(encoding="utf-8"))
        core = openvino.Core()
        settings = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY", "NUM_STREAMS": 1}
        settings |= {"INFERENCE_PRECISION_HINT": "f32", "ENABLE_CPU_PINNING": False}
        self.compiled = core.compile_model(core.read_model(self.folder / GRAPH), "CPU", settings)
        self.tokenizer = Tokenizer.from_file(str(self.folder / "tokenizer.json"))
        self.request = self.compiled.create_infer_request()
        self.vocabulary = int(self.compiled.output("logits").get_partial_shape()[2].get_length())
        self.length = 0

    def _forward(self, tokens: list[int]) -> Any:
        """Logits (T, V) of tokens that follow what has been read. A view: valid until the next call."""
        first, self.length = self.length, self.length + len(tokens)
        inputs = {
            "input_ids": np.array([tokens], dtype=np.int64),
            "attention_mask": np.ones((1, self.length), dtype=np.int64),
            "position_ids": np.arange(first, self.length, dtype=np.int64)[None],
            "beam_idx": np.zeros(1, dtype=np.int32),
        }
        self.request.infer(inputs, share_inputs=True)
        return self.request.get_tensor("logits").data[0]

    def window(self, tokens: list[int]) -> Any:
        self.request.reset_state()
        self.length = 0
        return self._forward(tokens)

    def prompt(self, tokens: list[int]) -> Any:
        return self.window(tokens)[-1]

    def step(self, token: int) -> Any:
        return self._forward([token])[-1]


def describe(_model: Model | None, _request: dict[str, Any]) -> dict[str, Any]:
    """The architectures that are converted: those of transformers whose decoder is a causal language model."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return {
        "architectures": sorted({name for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values() if isinstance(name, str)})
    }


def convert(_model: Model | None, request: dict[str, Any]) -> dict[str, Any]:
    """Write a model directory as OpenVINO's graph into `target`, its weights as `type`."""
    from openvino_conversion import write

    write(request["source"], Path(request["target"], GRAPH), request["type"], trust=request["trust"])
    return {}


def contents(_model: Model | None, request: dict[str, Any]) -> dict[str, Any]:
    """Parameters, tensors by type, and the bytes that one decoded token reads, off the graph."""
    from openvino_conversion import count

    counted: dict[str, Any] = count(openvino.Core().read_model(Path(request["path"], GRAPH)))
    return counted


def facts(model: Model | None, _request: dict[str, Any]) -> dict[str, Any]:
    """What the engine made of the loaded directory. Tokenizer and special tokens are those of the files beside it."""
    assert model is not None
    precision = model.compiled.get_property("INFERENCE_PRECISION_HINT").get_type_name()
    stated = _read(model.folder, "tokenizer_config.json")
    return {
        "description": f"{model.config['architectures'][0]}, computes in {precision}",
        "vocabulary": model.vocabulary,
        "layers": len(model.request.query_state()) // 2,
        "bos": model.tokenizer.token_to_id(_text(stated.get("bos_token")) or ""),
        "ends": _ends(_read(model.folder, "generation_config.json"), model.config),
        "chat_template": _template(model.folder, stated),
    }


def _read(folder: Path, name: str) -> dict[str, Any]:
    return json.loads((folder / name).read_text(encoding="utf-8")) if (folder / name).is_file() else {}


def _text(token: str | dict[str, Any] | None) -> str | None:
    """A special token, which some files write with how it is cut out of a text."""
    return token["content"] if isinstance(token, dict) else token


def _ends(*files: dict[str, Any]) -> list[int]:
    """The tokens that end a text, by the first file that states any."""
    stated: Any = next((told for file in files if (told := file.get("eos_token_id")) is not None), [])
    return stated if isinstance(stated, list) else [stated]


def _template(folder: Path, stated: dict[str, Any]) -> str | None:
    file = folder / "chat_template.jinja"
    return file.read_text(encoding="utf-8") if file.is_file() else stated.get("chat_template")


def tokenize(model: Model | None, request: dict[str, Any]) -> dict[str, Any]:
    """Token ids of each text: `bos` lets the tokenizer add what it puts around a text."""
    assert model is not None
    texts = request["texts"]
    return {"tokens": [model.tokenizer.encode(one["text"], add_special_tokens=one["bos"]).ids for one in texts]}


def load(asked: dict[str, Any]) -> Model:
    """The directory of a request, loaded; its state grows with what it reads, so no room is made beforehand."""
    return Model(asked["path"], asked["threads"])


if __name__ == "__main__":
    serve(load, {f.__name__: f for f in (describe, convert, contents, facts, tokenize, score, generate, memory)})
