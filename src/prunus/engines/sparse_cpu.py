"""Packed models on the CPU: transformers, with prunus's own module where each linear layer was."""

from pathlib import Path

from prunus.engines.engine import Engine, Installed
from prunus.engines.worker import Worker

NAME = "sparse-cpu"
WORKER = Path(__file__).with_name("sparse_cpu_worker.py")


class SparseCpu(Worker):
    """A process with transformers and the packed model in it; see sparse_cpu_worker.py for what it can be asked.

    It imports torch and transformers before it answers, which takes minutes on a machine that is busy.
    """

    start = 300.0

    def __init__(self, installed: Installed) -> None:
        super().__init__(installed.python, WORKER, name=NAME)


SPARSE_CPU = Engine(
    name=NAME,
    title="transformers with packed matrices, on the CPU: comes with prunus",
    takes="every model of transformers that prunus prunes, experts as they are; by `prunus export --to sparse`",
    zeros="file size, memory and decode time: zeros are neither stored nor read",
    shapes="file size, memory and time, as the shapes go",
    tested={"transformers": "5.23.*", "torch": "2.13.*"},
    worker=SparseCpu,
)
