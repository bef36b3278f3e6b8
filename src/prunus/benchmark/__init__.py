"""Latency, throughput and memory of a model on a named engine."""

from prunus.benchmark.engine_process import measure_exported
from prunus.benchmark.machine import machine, peak_resident_bytes
from prunus.benchmark.measurement import measure

__all__ = ["machine", "measure", "measure_exported", "peak_resident_bytes"]
