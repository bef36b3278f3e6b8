"""Draw docs/sparse_quality.svg from what `sparse_quality.py` and `decode.py` in benchmarks/ measured.

Needs the extra: pip install 'prunus[docs]'. Run by `make docs`, after the tables.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")
from matplotlib import pyplot
from matplotlib.axes import Axes
from rows import rows_of

DOCS = Path(__file__).parent
KINDS = {  # format, of ours with the type -> name, colour and symbol on the figure
    "sparse:bf16": ("bf16, ours", "#4477aa", "o"),
    "sparse:int8": ("int8, ours", "#ee6677", "s"),
    "gguf": ("llama.cpp", "#888888", "D"),
}
BESIDE, ABOVE, BELOW = 5, 5, -11  # of a point, where its name stands
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
    """Rows that say what is on this axis, each with its pattern beside it; trained ones are hollow."""
    shown = [point for point in points if name in point]
    for kind, (label, colour, symbol) in KINDS.items():
        for trained in (False, True):
            these = [point for point in shown if point["kind"] == kind and point["trained"] == trained]
            fill, title = ("white", f"{label}, trained") if trained else (colour, label)
            if these:
                x, y = ([one[key] for one in these] for key in (name, "perplexity"))
                ax.scatter(x, y, 40, marker=symbol, facecolor=fill, edgecolor=colour, linewidth=1.5, label=title)
    for one in shown:
        left = one["name"] == "dense"
        below = left or one["trained"]
        ax.annotate(
            one["name"],
            (one[name], one["perplexity"]),
            (-BESIDE if left else BESIDE, BELOW if below else ABOVE),
            textcoords="offset points",
            fontsize=8,
            horizontalalignment="right" if left else "left",
        )
    ax.set_xlim(left=0)
    ax.spines["right"].set_visible(False)


def measured() -> list[dict[str, Any]]:
    """Perplexity, bits and, where the large shape was timed alike, its speed."""
    speeds = {row["model"]: row["tokens_per_second"] for row in rows_of("decode")}
    found = []
    for row in rows_of("sparse_quality"):
        name, _, kind = row["row"].rpartition(" ")
        speed = {"tokens_per_second": speeds[row["speed_of"]]} if row["speed_of"] in speeds else {}
        form, _, type_ = kind.partition(":")
        shown = {"name": type_, "kind": form} if form in KINDS else {"name": name.split()[0], "kind": kind}
        found.append({**row, **speed, **shown, "trained": name.endswith(" trained")})
    return found


if __name__ == "__main__":
    main()
