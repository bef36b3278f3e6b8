"""Write the parts of the pages that are made from the code. Run by `make docs`; a test checks that it was.

A made part stands between `<!-- made: NAME -->` and `<!-- end -->`. Everything else on a page is written by hand.
"""

import ast
import re
from collections.abc import Callable, Iterable
from dataclasses import fields
from pathlib import Path
from typing import Any

from rows import rows_of, table
from tables_cpu import advice, decode_speeds, kernel_speeds, loading, sparse_quality
from tables_engines import engine_matrix, engine_speeds

from prunus.models.families import FAMILIES
from prunus.quantizing import SCHEMES
from prunus.shrinking import LAYER_SCORES, WIDTH_SCORES
from prunus.shrinking.expert_scores import EXPERT_SCORES
from prunus.sparsity import METHODS, NM, Tile, Unstructured, parse_pattern
from prunus.sparsity.methods import Method

DOCS = Path(__file__).parent
PACKAGE = DOCS.parent / "src" / "prunus"
MADE = re.compile(r"<!-- made: (\w+) -->\n.*?<!-- end -->", re.DOTALL)
KINDS = (Unstructured, NM, Tile)


def methods() -> str:
    """One line per method: what it is, what it needs and costs."""
    rows = ((m.title, f"`{name}`", m.idea, _paper(m.paper), _needs(m), m.cost, m.when) for name, m in METHODS.items())
    return table(("method", "name", "idea", "paper", "needs", "cost", "when to use"), rows)


def width_scores() -> str:
    """One line per score of channels and KV groups."""
    rows = ((s.title, f"`{name}`", s.idea, _paper(s.paper), s.cost, s.when) for name, s in WIDTH_SCORES.items())
    return table(("score", "name", "idea", "paper", "cost", "when to use"), rows)


def layer_scores() -> str:
    """One line per score of layers."""
    rows = ((s.title, f"`{name}`", s.idea, _paper(s.paper), s.cost, s.when) for name, s in LAYER_SCORES.items())
    return table(("score", "name", "idea", "paper", "cost", "when to use"), rows)


def expert_scores() -> str:
    """One line per score of experts."""
    rows = ((s.title, f"`{name}`", s.idea, _paper(s.paper), s.when) for name, s in EXPERT_SCORES.items())
    return table(("score", "name", "idea", "paper", "when to use"), rows)


def options() -> str:
    """One line per setting of each method, with its default and the group its scores are ranked in."""
    rows = (
        (
            f"`{name}`",
            m.compare,
            "kept weights change" if m.updates else "kept weights stay",
            ", ".join(f"`{field.name}={field.default}`" for field in fields(m.options)) or "none",
        )
        for name, m in METHODS.items()
    )
    return table(("method", "scores ranked within", "weights", "options and defaults"), rows)


def families() -> str:
    """One line per tested family."""
    return table(("model type", "models", "its blocks"), ((f"`{f.family}`", f.name, f.shape) for f in FAMILIES))


def files() -> str:
    """Every file of the package with the first sentence of its docstring."""
    paths = sorted(path for path in PACKAGE.rglob("*.py") if path.name != "__init__.py")
    rows = ((f"`{path.relative_to(PACKAGE).as_posix()}`", _first_sentence(path)) for path in paths)
    return table(("file", "what it is"), rows)


def mixes() -> str:
    """What the calibration text does to two kinds of text; from what `benchmarks/mixes.py` measured."""
    rows = rows_of("mixes")
    cells = ((row["mix"], f"{row['prose']:.2f}", f"{row['arithmetic']:.2f}") for row in rows)
    made = table(("calibrated on", "perplexity, prose", "perplexity, arithmetic"), cells)
    first = rows[0]
    return (
        f"{first['model']}, {first['method']} at {first['pattern']}, {first['samples']} x {first['length']} "
        f"calibration tokens, the first {first['windows']} windows of {first['length']} tokens of each test text, "
        f"{first['dtype'].removeprefix('torch.')} forward, torch {first['torch']}:\n\n{made}"
    )


def perplexities() -> str:
    """Perplexity of every pattern and method, and the conditions of all rows that `benchmarks/methods.py` measured."""
    names = ("model", "calibration", "test", "dense_perplexity", "dtype", "cpu", "threads", "torch")
    (conditions,) = {tuple(row[name] for name in names) for row in rows_of("methods")}
    model, calibration, test, dense, dtype, cpu, threads, torch = conditions
    return (
        f"{model}, calibrated on {calibration}, perplexity on {test} (dense: {dense:.2f}), {dtype} forward, "
        f"{cpu}, {threads} threads, torch {torch}:\n\n{_pivot('perplexity', _short)}"
    )


def divergences() -> str:
    """KL to the dense model of every pattern and method, in nats per token; measured as the perplexities."""
    return _pivot("kl", "{:.3f}".format)


def seconds() -> str:
    """Seconds of pruning of every pattern and method; measured as the perplexities."""
    return _pivot("seconds", "{:.0f}".format)


def one_shot_widths() -> str:
    """What every score of channels and KV groups costs; from what `benchmarks/smaller.py` measured."""
    return _conditions() + _smaller("ffn ", "kv ")


def one_shot_layers() -> str:
    """What every score of layers costs, with and without the fold; measured as the widths."""
    return _smaller("layers ")


def recoveries() -> str:
    """What training brings back, by what it is trained on; measured as the widths."""
    return _smaller("width-20", "zeros-50", "depth-20")


def rounds() -> str:
    """One large cut, and the same in rounds with the same tokens of training in all; measured as the widths."""
    return _smaller("width-40", "depth-37")


def speeds() -> str:
    """Decode speed of shrunk models beside the bytes they save; from what `benchmarks/shrink_speed.py` measured."""
    rows = rows_of("shrink_speed")
    cells = (
        (
            row["shrunk"],
            f"{row['parameters'] / row['dense_parameters']:.2f}",
            f"{row['bytes_ratio']:.2f}",
            f"{row['speedup']['median']:.2f} ({row['speedup']['low']:.2f} to {row['speedup']['high']:.2f})",
            f"{row['kept']:.2f}",
            f"{row['prefill_speedup']:.2f}",
        )
        for row in rows
    )
    columns = ("removed, %", "parameters", "bytes, dense / shrunk", "decode speed-up (95%)", "of the bytes", "prefill")
    return table(columns, cells)


def schemes() -> str:
    """One line per scheme of quantization, with its bits in a matrix of 4096 x 4096 with 16-bit scales."""
    rows = (
        (f"`{name}`", s.title, f"{s.num_bytes((4096, 4096), 2) * 8 / 4096**2:.2f}", s.storage, s.loads_in, s.when)
        for name, s in SCHEMES.items()
    )
    return table(("scheme", "what", "bits a weight", "format", "loads in", "when to use"), rows)


def quantized() -> str:
    """What schemes, methods and orders cost; from what `benchmarks/quantized.py` measured."""
    rows = [row for row in rows_of("quantized") if "refused" not in row]
    cells = (
        (
            row["row"],
            _short(row["perplexity"]),
            f"{row['kl']:.4f}",
            f"{row['bytes'] / 1e6:.1f}",
            f"{row['sparsity']:.1%}",
            ", ".join(f"{seconds:.0f}" for seconds in row["seconds"]),
        )
        for row in rows
    )
    return table(("row", "perplexity", "KL", "MB", "zeros in the matrices", "seconds of each step"), cells)


def _conditions() -> str:
    """Of all rows that `benchmarks/smaller.py` measured."""
    rows = rows_of("smaller")
    dense = next(row["perplexity"] for row in rows if row["row"] == "dense")
    machines = {f"{e['cpu']}, {e['threads']} threads, torch {e['torch']}" for row in rows if (e := row["environment"])}
    return f"Dense: {dense:.2f}. {'; '.join(sorted(machines))}.\n\n"


def _smaller(*prefixes: str) -> str:
    """The rows whose names begin with one of these; columns that no row fills are left out."""
    rows = [row for row in rows_of("smaller") if row["row"].startswith(prefixes)]
    columns: dict[str, Callable[[dict[str, Any]], str]] = {
        "row": lambda row: row["row"],
        "perplexity": lambda row: _short(row["perplexity"]),
        "other text": lambda row: _short(row["perplexity_other"]) if "perplexity_other" in row else "",
        "KL": lambda row: f"{row['kl']:.3f}" if "kl" in row else "",
        "came back": lambda row: f"{row['recovered']:.0%}" if "recovered" in row else "",
        "tokens trained": lambda row: f"{row['tokens']:,}" if row["tokens"] else "",
        "zeros before, after": lambda row: (
            f"{row['zeros_before']:,}, {row['zeros_after']:,}" if row.get("zeros_before") else ""
        ),
        "seconds of each step": lambda row: ", ".join(f"{seconds:.0f}" for seconds in row.get("seconds", ())),
        "peak GiB": lambda row: f"{max(row['peak_gib']):.2f}" if "peak_gib" in row else "",
    }
    cells = {name: [cell(row) for row in rows] for name, cell in columns.items()}
    filled = {name: column for name, column in cells.items() if any(column)}
    return table(filled, zip(*filled.values(), strict=True))


def _pivot(column: str, form: Callable[[float], str]) -> str:
    """One figure of every measured pair: patterns down, methods across."""
    rows = rows_of("methods")
    cells = {(row["pattern"], row["method"]): form(row[column]) for row in rows}
    lines = ((f"`{pattern}`", *(cells.get((pattern, name), "-") for name in METHODS)) for pattern in _patterns(rows))
    return table(("pattern", *(method.title for method in METHODS.values())), lines)


def _patterns(rows: Iterable[dict[str, Any]]) -> list[str]:
    """Unstructured, then N:M, then tiles; among each the mildest first, by the lowest perplexity that was reached."""
    lowest: dict[str, float] = {}
    for row in rows:
        lowest[row["pattern"]] = min(row["perplexity"], lowest.get(row["pattern"], row["perplexity"]))
    return sorted(lowest, key=lambda pattern: (KINDS.index(type(parse_pattern(pattern))), lowest[pattern]))


def _short(perplexity: float) -> str:
    return f"{perplexity:.2f}" if perplexity < 1000 else f"{perplexity:,.0f}"


def _paper(text: str) -> str:
    return re.sub(r"arXiv:(\d+\.\d+)", r"[arXiv:\1](https://arxiv.org/abs/\1)", text)


def _needs(method: Method) -> str:
    names = {"input_sq_norm": "calibration text (input norms)", "gram": "calibration text (Gram matrices)"}
    return ", ".join(names[need] for need in method.needs) or "nothing"


def _first_sentence(path: Path) -> str:
    docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    assert docstring, f"{path} has no docstring"
    paragraph = " ".join(docstring.split("\n\n")[0].split())
    return re.split(r"(?<=[.!?]) (?=[A-Z])", paragraph)[0]


PARTS: dict[str, Callable[[], str]] = {
    "methods": methods,
    "options": options,
    "width_scores": width_scores,
    "expert_scores": expert_scores,
    "layer_scores": layer_scores,
    "perplexities": perplexities,
    "divergences": divergences,
    "seconds": seconds,
    "mixes": mixes,
    "one_shot_widths": one_shot_widths,
    "one_shot_layers": one_shot_layers,
    "recoveries": recoveries,
    "rounds": rounds,
    "speeds": speeds,
    "schemes": schemes,
    "quantized": quantized,
    "kernel_speeds": kernel_speeds,
    "decode_speeds": decode_speeds,
    "loading": loading,
    "advice": advice,
    "sparse_quality": sparse_quality,
    "engine_matrix": engine_matrix,
    "engine_speeds": engine_speeds,
    "families": families,
    "files": files,
}


def render(page: str) -> str:
    """The same page with every made part made anew."""
    return MADE.sub(lambda found: f"<!-- made: {found[1]} -->\n{PARTS[found[1]]()}\n<!-- end -->", page)


if __name__ == "__main__":
    for path in DOCS.glob("*.md"):
        path.write_text(render(path.read_text(encoding="utf-8")), encoding="utf-8")
