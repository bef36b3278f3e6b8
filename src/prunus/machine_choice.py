"""What this machine is best asked to do: which device, which forward dtype, how much memory."""

import re
import time
from typing import Any, Literal

import psutil
import torch
import transformers

from prunus.errors import UserError

GIB = 1 << 30
UNITS = {"": 1, "kib": 1 << 10, "mib": 1 << 20, "gib": GIB, "tib": 1 << 40}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

DtypeName = Literal["auto", "float32", "bfloat16"]


def choose_device(name: str) -> str:
    """Resolve "auto" to cuda where there is one. Raises UserError for a device that is not there."""
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"device {name!r} is unknown; use auto, cpu or cuda.") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"device {name!r} was asked for, but this machine has no CUDA device; use cpu or auto.")
    return name


def choose_dtype(name: str, device: str, hidden_size: int) -> torch.dtype:
    """Resolve "auto" by timing one matrix product of the model's width in fp32 and bf16 on the device.

    bf16 is taken only where it is clearly (1.2 x) faster: many CPUs compute it through fp32, slower than fp32 itself.
    """
    if name in DTYPES:
        return DTYPES[name]
    if name != "auto":
        raise UserError(f"dtype {name!r} is unknown; use auto, {' or '.join(DTYPES)}.")
    seconds = {dtype: product_seconds(dtype, device, hidden_size) for dtype in DTYPES.values()}
    return torch.bfloat16 if seconds[torch.float32] > 1.2 * seconds[torch.bfloat16] else torch.float32


def product_seconds(dtype: torch.dtype, device: str, width: int) -> float:
    """Seconds of one (512, width) x (width, width) product, the best of five: the first ones pay for set-up."""
    x = torch.ones(512, width, dtype=dtype, device=device)
    weight = torch.ones(width, width, dtype=dtype, device=device)
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        (x @ weight.T)[0, 0].item()  # item() waits for the device
        best = min(best, time.perf_counter() - start)
    return best


def half_of_free_memory() -> int:
    """In bytes: what may be used where the user sets no limit."""
    return int(psutil.virtual_memory().available // 2)


def parse_memory(text: str | int | None) -> int | None:
    """Return bytes from "4GiB", "800MiB" or a number of bytes; None, no limit, stays None."""
    if text is None:
        return None
    match = re.fullmatch(r"\s*([\d.]+)\s*([A-Za-z]*)\s*", str(text))
    unit = match[2].lower() if match else "?"
    unit = unit if unit in UNITS else f"{unit[:1]}ib"  # 4G, 4GB and 4GiB all mean binary units here
    try:
        assert match is not None
        return int(float(match[1]) * UNITS[unit])
    except (AssertionError, KeyError, ValueError) as error:
        raise UserError(f"memory {text!r} is not understood; write it like 4GiB or 800MiB.") from error


def in_transformers(dtype: torch.dtype) -> dict[str, Any]:
    """The conditions of a forward pass in transformers."""
    return {
        "engine": "transformers",
        "dtype": str(dtype).removeprefix("torch."),
        "batch": 1,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
