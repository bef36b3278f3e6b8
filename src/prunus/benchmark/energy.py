"""Energy, where the machine counts it: RAPL of the processor (Linux, powercap), or NVML of an NVIDIA GPU.

A counter is of the whole processor or GPU, whatever ran on it. Where there is none, or none that this user may read,
energy is "not measured"; nothing is ever estimated.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar

import torch

Done = TypeVar("Done")

NOT_MEASURED = "not measured"
POWERCAP = Path("/sys/class/powercap")


@dataclass(frozen=True, slots=True)
class Counter:
    """`read` tells joules since some moment; `span` is where it begins at zero again, None for never."""

    read: Callable[[], float]
    span: float | None = None

    def between(self, before: float, after: float) -> float:
        """Joules between two readings, of which the counter began again at most once."""
        return after - before if after >= before or self.span is None else after - before + self.span


@dataclass(frozen=True, slots=True)
class Meter:
    """The counters whose sum is the energy of a device, and what they are called in the record."""

    source: str
    counters: tuple[Counter, ...]

    def read(self) -> list[float]:
        return [counter.read() for counter in self.counters]

    def joules_since(self, before: list[float]) -> float:
        """Joules since an earlier `read`."""
        now = zip(self.counters, before, self.read(), strict=True)
        return sum(counter.between(then, after) for counter, then, after in now)


def find_meter(device: str, powercap: Path = POWERCAP) -> Meter | None:
    """The meter of the device that computes; None where energy cannot be measured."""
    return _nvml(device) if device.startswith("cuda") else _rapl(powercap)


def _rapl(powercap: Path) -> Meter | None:
    """One counter for each processor package. Its parts (cores, memory) are counted in it, or are no processor."""
    zones = [zone for zone in sorted(powercap.glob("intel-rapl:*")) if zone.name.count(":") == 1]
    try:
        named = {(zone / "name").read_text().strip(): zone for zone in zones}
        packages = {name: zone for name, zone in named.items() if name.startswith("package")}
        counters = tuple(map(_package, packages.values()))
        [counter.read() for counter in counters]
    except (OSError, ValueError):  # since 2020 only root may read them, by default
        return None
    return Meter(f"RAPL: {', '.join(packages)}", counters) if counters else None


def _package(zone: Path) -> Counter:
    return Counter(
        lambda: int((zone / "energy_uj").read_text()) / 1e6, int((zone / "max_energy_range_uj").read_text()) / 1e6
    )


def _nvml(device: str) -> Meter | None:
    """The GPU that torch calls by this name, where the package nvidia-ml-py is installed and the GPU counts."""
    if find_spec("pynvml") is None:
        return None
    nvml: Any = import_module("pynvml")
    properties = torch.cuda.get_device_properties(torch.device(device))
    try:
        nvml.nvmlInit()
        handle = nvml.nvmlDeviceGetHandleByUUID(f"GPU-{properties.uuid}")
        counter = Counter(lambda: nvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1e3)
        counter.read()
    except nvml.NVMLError:
        return None
    return Meter(f"NVML: {properties.name}", (counter,))


def metered(meter: Meter | None, work: Callable[[], Done]) -> tuple[Done, float | None]:
    """What the work returns, and the joules that it took, None where nothing counts them."""
    before = meter.read() if meter else []
    done = work()
    return done, meter.joules_since(before) if meter else None


def joules_per_token(joules: Sequence[float | None], new_tokens: int) -> dict[str, float]:
    """Energy of whole requests, prompts included, over the tokens that were written; empty where it is not measured."""
    counted = [one for one in joules if one is not None]
    return {"joules_per_token": sum(counted) / new_tokens} if counted else {}
