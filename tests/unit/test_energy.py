"""Energy: from counters in a folder that looks like the kernel's, and "not measured" where there are none."""

import sys
from types import SimpleNamespace

import pytest
import torch

from prunus.benchmark.energy import find_meter, joules_per_token, metered


@pytest.fixture
def powercap(tmp_path):
    """Writes zones of counters; returns a function that moves one of them on."""

    def write(zone, name, microjoules, span=1_000_000):
        folder = tmp_path / zone
        folder.mkdir(exist_ok=True)
        for file, content in (("name", name), ("energy_uj", microjoules), ("max_energy_range_uj", span)):
            (folder / file).write_text(f"{content}\n")
        return lambda more: (folder / "energy_uj").write_text(f"{more}\n")

    write.folder = tmp_path
    return write


def test_packages_are_added_up_and_their_parts_are_not(powercap):
    first, second = powercap("intel-rapl:0", "package-0", 100), powercap("intel-rapl:1", "package-1", 500)
    part, board = powercap("intel-rapl:0:0", "core", 0), powercap("intel-rapl:2", "psys", 0)
    meter = find_meter("cpu", powercap.folder)

    def work():
        for move, value in ((first, 300_100), (second, 400_500), (part, 200_000), (board, 900_000)):
            move(value)
        return "done"

    assert meter.source == "RAPL: package-0, package-1"
    assert metered(meter, work) == ("done", pytest.approx(0.7))


def test_a_counter_that_began_again_is_understood(powercap):
    move = powercap("intel-rapl:0", "package-0", 900_000, span=1_000_000)
    meter = find_meter("cpu", powercap.folder)
    before = meter.read()
    move(200_000)
    assert meter.joules_since(before) == pytest.approx(0.3)


def test_without_counters_nothing_is_measured(powercap, monkeypatch):
    assert find_meter("cpu", powercap.folder) is None
    assert find_meter("cpu", powercap.folder / "nowhere") is None
    assert metered(None, lambda: 7) == (7, None)
    assert joules_per_token([None, None], 8) == {}
    powercap("intel-rapl:0", "package-0", "no number")
    assert find_meter("cpu", powercap.folder) is None
    monkeypatch.setitem(sys.modules, "pynvml", None)
    monkeypatch.setattr("prunus.benchmark.energy.find_spec", lambda _name: None)
    assert find_meter("cuda:0") is None


def test_joules_are_those_of_all_requests_over_all_tokens():
    assert joules_per_token([3.0, 1.0], 8) == {"joules_per_token": 0.5}


def test_a_gpu_s_counter_is_read_by_its_identity(monkeypatch):
    counts = iter((1000, 4000, 9000))  # millijoules; the first is read to see whether it counts
    nvml = SimpleNamespace(
        NVMLError=RuntimeError,
        nvmlInit=lambda: None,
        nvmlDeviceGetHandleByUUID={"GPU-abc": 7}.__getitem__,
        nvmlDeviceGetTotalEnergyConsumption=lambda handle: next(counts) if handle == 7 else None,
    )
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    monkeypatch.setattr("prunus.benchmark.energy.find_spec", lambda _name: object())
    found = SimpleNamespace(uuid="abc", name="H9")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _device: found)
    meter = find_meter("cuda")
    assert (meter.source, metered(meter, lambda: None)[1]) == ("NVML: H9", 5.0)
