"""Quality against measured speed, engine by engine, and what the cheapest dense quantized model does in the same place.

A pruned model that a dense one in fewer bits beats in both is no gain, however it compares with full precision.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from prunus.reporting.figures import DENSE, MODEL, SECOND, Figure, dotted, plottable
from prunus.reporting.record import Run, evaluation_text

QUANTIZED_BITS = 12  # a weight, at most: below the types of 16 bits, above those of 8
BENCH = ("engine", "device", "threads", "batch", "prompt_tokens", "new_tokens")
TEXT = ("window", "windows")
KINDS = {  # (pruned, quantized) -> name, colour and symbol on the figure
    (False, False): ("dense", DENSE, "circle"),
    (False, True): ("dense, quantized", DENSE, "diamond"),
    (True, False): ("pruned", MODEL, "circle"),
    (True, True): ("pruned, quantized", SECOND, "diamond"),
}
BASELINES = {  # engine -> how a dense quantized model comes to run in it
    "llama.cpp": "`prunus export DENSE OUT --to gguf:q4_k_m`",
    "transformers": "`prunus quantize DENSE OUT --scheme int8`",
    "vllm": "`prunus quantize DENSE OUT --scheme int4-g32`",
}


@dataclass(frozen=True, slots=True)
class Point:
    """One model in one engine: decode tokens/s, perplexity, bytes on disk."""

    name: str
    pruned: bool
    quantized: bool
    speed: float
    perplexity: float
    size: float

    def beats(self, other: "Point") -> bool:
        """Neither slower nor worse, and better in one."""
        no_worse = self.speed >= other.speed and self.perplexity <= other.perplexity
        return no_worse and (self.speed, self.perplexity) != (other.speed, other.perplexity)


@dataclass(frozen=True, slots=True)
class Plane:
    """The points that may be compared: one engine, machine and length of work, one text and origin."""

    engine: str
    conditions: str
    points: list[Point]

    @property
    def baseline(self) -> Point | None:
        """The dense quantized model with the fewest bytes."""
        found = [point for point in self.points if point.quantized and not point.pruned]
        return min(found, key=lambda point: point.size, default=None)


def pareto_figures(runs: Sequence[Run]) -> list[Figure]:
    """One for each plane; the dotted lines cross at the baseline: it beats what is above and left of them."""
    return [_figure(plane) for plane in _planes(runs)]


def pareto_verdicts(runs: Sequence[Run]) -> list[str]:
    """A sentence for each pruned model in each engine, or for the baseline that is missing."""
    return [sentence for plane in _planes(runs) for sentence in _verdicts(plane)]


def _verdicts(plane: Plane) -> list[str]:
    pruned = [point for point in plane.points if point.pruned]
    if not pruned:
        return []
    if plane.baseline is None:
        how = BASELINES.get(plane.engine, "export the dense model in the engine's type of the fewest bits")
        return [
            f"{plane.engine}: no dense quantized model is among these runs, so nothing says whether fewer bits alone "
            f"do better. Make one with {how}, evaluate and bench it in the same way, and report it too."
        ]
    return [_verdict(plane, point) for point in pruned]


def _verdict(plane: Plane, point: Point) -> str:
    """Against every dense quantized model; the one that leaves it furthest behind in speed is named."""
    dense = [one for one in plane.points if one.quantized and not one.pruned]
    better = max((one for one in dense if one.beats(point)), key=lambda one: one.speed, default=None)
    if better is None:
        return f"{plane.engine}: no dense quantized model here is both as fast and as good as {_said(point)}."
    return (
        f"{plane.engine}: do not take {_said(point)}: dense and quantized, {_said(better)} is at least as fast and as "
        "good."
    )


def _said(point: Point) -> str:
    return f"{point.name} ({point.speed:.1f} tokens/s, perplexity {point.perplexity:.4g})"


def _planes(runs: Sequence[Run]) -> list[Plane]:
    """Only planes with two points or more are worth drawing."""
    found: dict[tuple[Any, ...], Plane] = {}
    for run in runs:
        for benchmark in {one.get("engine"): one for one in run.benchmarks}.values():
            for evaluation in _by_text(run).values():
                key = (_origin(run), *_bench_key(benchmark), *_text_key(evaluation))
                plane = found.setdefault(key, Plane(str(benchmark.get("engine")), _words(benchmark, evaluation), []))
                plane.points.extend(_points(run, benchmark, evaluation, plane.points))
    return [plane for plane in found.values() if len(plane.points) > 1]


def _by_text(run: Run) -> dict[tuple[Any, ...], dict[str, Any]]:
    """The last perplexity on each text: the dtype belongs to the model here, and not to the conditions."""
    return {_text_key(one): one for one in run.perplexities.values() if plottable(one.get("perplexity"))}


def _points(run: Run, benchmark: dict[str, Any], evaluation: dict[str, Any], known: list[Point]) -> list[Point]:
    """The run itself; and the dense model, where both were measured in transformers and it is not there yet."""
    points = [_point(run.name, run, benchmark["model"], evaluation["perplexity"])]
    against, dense = evaluation.get("against") or {}, benchmark.get("dense") or {}
    told = benchmark["engine"] == "transformers" and plottable(against.get("perplexity"))
    if dense and told and all(point.pruned or point.quantized for point in known):
        points.append(_point("the dense model", None, dense, against["perplexity"]))
    return points


def _point(name: str, run: Run | None, side: dict[str, Any], perplexity: float) -> Point:
    bits = 8 * side["bytes_on_disk"] / side["parameters"]
    steps = {step.get("step") for step in run.history} if run else set()
    return Point(
        name=name,
        pruned=run.pruned if run else False,
        quantized="quantize" in steps or bits <= QUANTIZED_BITS,
        speed=side["decode_tokens_per_second"],
        perplexity=perplexity,
        size=side["bytes_on_disk"],
    )


def _origin(run: Run) -> Any:
    return run.origin.get("sha256") or run.origin.get("path")


def _bench_key(benchmark: dict[str, Any]) -> tuple[Any, ...]:
    return ((benchmark.get("environment") or {}).get("cpu"), *(str(benchmark.get(name)) for name in BENCH))


def _text_key(evaluation: dict[str, Any]) -> tuple[Any, ...]:
    text = evaluation.get("dataset_sha256") or evaluation.get("dataset")
    return (text, *(evaluation.get(name) for name in TEXT))


def _words(benchmark: dict[str, Any], evaluation: dict[str, Any]) -> str:
    cpu = (benchmark.get("environment") or {}).get("cpu")
    work = ", ".join(f"{name.replace('_', ' ')} {benchmark.get(name)}" for name in BENCH[2:])
    return f"{cpu or 'processor not recorded'}, {work}; {evaluation_text(evaluation)}"


def _figure(plane: Plane) -> Figure:
    traces = []
    for (pruned, quantized), (kind, colour, symbol) in KINDS.items():
        points = [one for one in plane.points if (one.pruned, one.quantized) == (pruned, quantized)]
        if points:
            traces.append(_trace(kind, points, {"color": colour, "symbol": symbol, "size": 12}))
    title = f"Quality against measured speed in {plane.engine}"
    said = "; ".join(f"{_said(one)}, {KINDS[one.pruned, one.quantized][0]}" for one in plane.points)
    layout: dict[str, Any] = {
        "xaxis": {"title": {"text": "decode, tokens/s"}, "rangemode": "tozero"},
        "yaxis": {"title": {"text": "perplexity, lower is better"}},
    }
    if max(one.perplexity for one in plane.points) > 2 * min(one.perplexity for one in plane.points):
        layout["yaxis"]["type"] = "log"
    if (cheapest := plane.baseline) is not None:
        across = dotted(xref="paper", x0=0, x1=1, y0=cheapest.perplexity, y1=cheapest.perplexity)
        layout["shapes"] = [across, dotted(yref="paper", y0=0, y1=1, x0=cheapest.speed, x1=cheapest.speed)]
    lines = "The dotted lines cross at the cheapest dense quantized model. " if cheapest else ""
    caption = (
        f"Right is faster, down is better. {lines}Each speed is from that run's own bench: only those of one bench "
        f"were timed in turn. {plane.conditions}."
    )
    return Figure(title, f"{title}: {said}.", traces, layout, caption, height=380)


def _trace(kind: str, points: list[Point], marker: dict[str, Any]) -> dict[str, Any]:
    return {
        "type": "scatter",
        "mode": "markers+text",
        "name": kind,
        "x": [one.speed for one in points],
        "y": [one.perplexity for one in points],
        "text": [escape(one.name) for one in points],
        "textposition": "top center",
        "marker": marker,
        "hovertemplate": "%{text}<br>%{x:.1f} tokens/s, perplexity %{y:.4g}",
    }
