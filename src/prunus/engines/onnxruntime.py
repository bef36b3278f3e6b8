"""ONNX Runtime on the CPU: its generate() package, whose stock model builder writes a model directory as a graph.

The builder writes attention as one operator with its cache of keys and values, and quantizes as it writes; nothing is
traced. torch and transformers, which it reads models with, are borrowed (inside/sitecustomize.py).
"""

from pathlib import Path
from typing import Any

from prunus.engines.engine import Engine, Installed
from prunus.engines.worker import Worker

NAME = "onnxruntime"
WORKER = Path(__file__).with_name("onnxruntime_worker.py")


class OnnxRuntime(Worker):
    """A process with ONNX Runtime in it; see onnxruntime_worker.py for what it can be asked."""

    def __init__(self, installed: Installed) -> None:
        super().__init__(installed.python, WORKER, name=NAME)


def _probe(installed: Installed) -> dict[str, Any]:
    """The architectures that the model builder knows, as they stand in config.json."""
    with OnnxRuntime(installed) as worker:
        return worker.ask({"do": "describe"}, timeout=OnnxRuntime.start)


ONNXRUNTIME = Engine(
    name=NAME,
    title="ONNX graphs, on the CPU",
    takes="dense shapes, the same width in every layer, fewer layers; by `prunus export --to onnx`",
    zeros="nothing: they are stored dense and multiplied",
    shapes="file size, memory and time, as the shapes go",
    packages=(
        "flatbuffers==25.12.19",
        "protobuf==7.36.2",
        "ml_dtypes==0.6.0",
        "onnx==1.23.2",
        "onnx_ir==1.1.0",
        "onnxruntime==1.32.0",
        "onnxruntime-genai==0.18.0",
    ),
    tested={},
    probe=_probe,
    worker=OnnxRuntime,
)
