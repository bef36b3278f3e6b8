"""Engines that people run models in: installed apart, spoken to as processes, one file and one line for each."""

from prunus.engines.engine import Engine, Installed
from prunus.engines.environment import find, install, require
from prunus.engines.llama_cpp import LLAMA_CPP
from prunus.engines.onnxruntime import ONNXRUNTIME
from prunus.engines.openvino import OPENVINO
from prunus.engines.sparse_cpu import SPARSE_CPU
from prunus.engines.transformers import TRANSFORMERS
from prunus.engines.vllm import VLLM
from prunus.errors import UserError

_TABLE = (TRANSFORMERS, SPARSE_CPU, LLAMA_CPP, VLLM, ONNXRUNTIME, OPENVINO)
ENGINES: dict[str, Engine] = {engine.name: engine for engine in _TABLE}

__all__ = [
    "ENGINES",
    "LLAMA_CPP",
    "ONNXRUNTIME",
    "OPENVINO",
    "SPARSE_CPU",
    "VLLM",
    "Engine",
    "Installed",
    "engine_named",
    "find",
    "install",
    "require",
]


def engine_named(name: str) -> Engine:
    """One line of the table. Raises UserError with the names there are."""
    if name not in ENGINES:
        raise UserError(f"unknown engine {name!r}; allowed are {', '.join(ENGINES)}.")
    return ENGINES[name]
