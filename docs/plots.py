"""Draw docs/sparse_quality.svg from what `sparse_quality.py` and `decode.py` in benchmarks/ measured.

Needs the extra: pip install 'prunus[docs]'. Run by `make docs`, after the tables.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")
from matplotlib import pyplot
from matplotlib.axes import Axes

DOCS = Path(__file__).parent
KINDS = {  # where a row ends -> name, colour and symbol on the figure
    "sparse:bf16": ("bf16, ours", "#4477aa", "o"),
    "sparse:int8": ("int8, ours", "#ee6677", "s"),
    "gguf:q8_0": ("llama.cpp", "#888888", "D"),
    "gguf:q4_0": ("llama.cpp", "#888888", "D"),
}
ABOVE, BELOW = 5, -11  # of a point, where its name stands
AXES = {"bits_per_weight": "bits a weight", "tokens_per_second": "decode, tokens/s of the 1.1B shape"}


def main() -> None:
    matplotlib.rcParams.update({"svg.hashsalt": "prunus", "font.size": 10, "axes.spines.top": False})
    figure, axes = pyplot.subplots(1, len(AXES), figsize=(10, 4.2), sharey=True, layout="constrained")
    points = measured()
    for ax, (name, title) in zip(axes, AXES.items(), strict=True):
        draw(ax, name, points)
        ax.set_xlabel(title)
    axes[0].set_ylabel("perplexity, lower is better")
    axes[0].set_yscale("log")
    axes[0].set_yticks([20, 25, 30, 40, 50, 60], ["20", "25", "30", "40", "50", "60"], minor=False)
    axes[0].minorticks_off()
    axes[1].legend(frameon=False, loc="upper left")
    figure.savefig(DOCS / "sparse_quality.svg", metadata={"Date": None})


def draw(ax: Axes, name: str, points: Iterable[dict[str, Any]]) -> None:
    """Rows that say what is on this axis, each with its pattern beside it."""
    shown = [point for point in points if name in point]
    for label, colour, symbol in dict.fromkeys(KINDS.values()):
        these = [point for point in shown if KINDS[point["kind"]] == (label, colour, symbol)]
        look: dict[str, Any] = {"s": 40, "color": colour, "marker": symbol, "label": label}
        ax.scatter([one[name] for one in these], [one["perplexity"] for one in these], **look)
    for one in shown:
        place = (5, BELOW if one["kind"].startswith("gguf") else ABOVE)
        ax.annotate(one["name"], (one[name], one["perplexity"]), place, textcoords="offset points", fontsize=8)
    ax.set_xlim(left=0)
    ax.spines["right"].set_visible(False)


def measured() -> list[dict[str, Any]]:
    """Perplexity, bits and, where the large shape was timed alike, its speed."""
    speeds = {row["model"]: row["tokens_per_second"] for row in lines("decode")}
    found = []
    for row in lines("sparse_quality"):
        name, _, kind = row["row"].rpartition(" ")
        speed = {"tokens_per_second": speeds[row["speed_of"]]} if row["speed_of"] in speeds else {}
        shown = kind.removeprefix("gguf:") if kind.startswith("gguf") else name
        found.append({**row, **speed, "name": shown, "kind": kind})
    return found


def lines(name: str) -> list[dict[str, Any]]:
    text = (DOCS / "measured" / f"{name}.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


if __name__ == "__main__":
    main()
