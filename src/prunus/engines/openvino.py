"""OpenVINO on the CPU: traced by its own front end, the cache a state of the graph, weights compressed by NNCF.

torch, transformers and tokenizers are borrowed (inside/sitecustomize.py). optimum-intel, the usual converter, takes no
transformers as new as that.
"""

from pathlib import Path
from typing import Any

from prunus.engines.engine import Engine, Installed
from prunus.engines.worker import Worker

NAME = "openvino"
WORKER = Path(__file__).with_name("openvino_worker.py")


class OpenVino(Worker):
    """A process with OpenVINO in it; see openvino_worker.py for what it can be asked."""

    def __init__(self, installed: Installed) -> None:
        super().__init__(installed.python, WORKER, name=NAME)


def _probe(installed: Installed) -> dict[str, Any]:
    """The architectures that are converted, as they stand in config.json."""
    with OpenVino(installed) as worker:
        return worker.ask({"do": "describe"}, timeout=OpenVino.start)


OPENVINO = Engine(
    name=NAME,
    title="OpenVINO graphs, on the CPU",
    takes="dense shapes, the same width in every layer, fewer layers; by `prunus export --to openvino`",
    zeros="nothing: they are stored dense and multiplied",
    shapes="file size, memory and time, as the shapes go",
    packages=(
        "natsort==8.4.0",
        "tabulate==0.10.0",
        "pydot==4.0.1",
        "scipy==1.17.1",
        "psutil==7.2.2",
        "openvino-telemetry==2025.2.0",
        "nncf==3.4.0",
        "openvino==2026.4.1",
    ),
    tested={},
    probe=_probe,
    worker=OpenVino,
)
