"""Latency, throughput and memory of a model directory on a named engine."""

from prunus.benchmark.machine import machine, peak_resident_bytes
from prunus.benchmark.measurement import measure

__all__ = ["machine", "measure", "peak_resident_bytes"]
