"""Numbers as words: what is absent is "not measured", and every quantity has its unit."""

import math
import re
from collections.abc import Callable
from typing import Any

ABSENT = "not measured"
# No-break spaces keep the two numbers on one line.
ARROW = "\N{NO-BREAK SPACE}\N{RIGHTWARDS ARROW}\N{NO-BREAK SPACE}"


def number(value: Any, digits: int = 4) -> str:
    """A plain number with that many significant digits."""
    if value is None:
        return ABSENT
    if isinstance(value, float) and not math.isfinite(value):
        return "infinite" if math.isinf(value) else "not a number"
    return f"{value:,}" if isinstance(value, int) else f"{value:,.{digits}g}"


def fixed(value: float | None, digits: int = 2, unit: str = "") -> str:
    """A number with that many decimals, so that a column of them lines up."""
    if value is None or not math.isfinite(value):
        return number(value)
    return f"{value:,.{digits}f}{unit}"


def size(value: float | None) -> str:
    """Bytes in decimal units, as disks and bandwidths are sold."""
    if value is None:
        return ABSENT
    for unit in ("B", "kB", "MB", "GB"):
        if abs(value) < 1000:
            return f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:,.3g} TB"


def seconds(value: float | None) -> str:
    """A duration: milliseconds below one second, minutes above two."""
    if value is None:
        return ABSENT
    if value < 1:
        return f"{value * 1000:.3g} ms"
    if value < 120:
        return f"{value:.3g} s"
    return f"{int(value // 60)} min {int(value % 60)} s"


def interval(ratio: dict[str, Any] | None) -> str:
    """A speed-up and, in brackets, its 95% interval."""
    if not ratio:
        return ABSENT
    return f"{ratio['median']:.2f}x ({ratio['low']:.2f} to {ratio['high']:.2f})"


def change(before: Any, after: Any, show: Callable[[Any], str] = number) -> str:
    """Two values of one quantity, on one line."""
    return f"{show(before)}{ARROW}{show(after)}".replace(" ", "\N{NO-BREAK SPACE}")


def calibration(sources: Any) -> str:
    """The names of calibration texts, with how many windows were taken of each."""
    if not isinstance(sources, list):
        return ""
    return ", ".join(f"{one.get('source')} ({plain(one.get('windows'))} windows)" for one in sources)


def allocation(facts: Any) -> str:
    """Which of two allocations a step kept and why, in a sentence; empty where none was searched for."""
    if not isinstance(facts, dict):
        return ""
    asked, kls, of = facts.get("asked"), facts.get("held_out_kl") or {}, facts.get("of", "sparsity")
    fate = "kept" if facts.get("used") == asked else f"rejected, so {of} is uniform"
    return (
        f"Allocation {asked} was {fate}: KL to the dense model on {facts.get('held_out_windows')} held-out windows is "
        f"{number(kls.get(asked))}, with uniform {of} {number(kls.get('uniform'))}."
    )


def plain(value: Any) -> str:
    """Any recorded value on one line: lists joined by semicolons, mappings as `key value`, None as a dash, a
    SHA-256 by its first 12 digits."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, dict):
        return ", ".join(f"{key} {plain(item)}" for key, item in value.items())
    if isinstance(value, list | tuple):
        return "; ".join(plain(item) for item in value) or "-"
    if isinstance(value, int):
        return number(value)
    if isinstance(value, float):
        return number(value, 6)
    return f"{value[:12]}..." if re.fullmatch(r"[0-9a-f]{64}", str(value)) else str(value)
