"""The tables of docs/engines.md, from what `benchmarks/engine_matrix.py` measured. They are parts of `tables.py`."""

import re
from typing import Any

from rows import rows_of, table


def engine_matrix() -> str:
    """Family by variant: what each engine made of it; from what `benchmarks/engine_matrix.py` measured."""
    rows = rows_of("engine_matrix")
    engines = list(dict.fromkeys(row["engine"] for row in rows))
    notes: dict[str, int] = {}
    cells = {(row["family"], row["variant"], row["engine"]): _verdict(row, notes) for row in rows}
    named = list(dict.fromkeys((row["family"], row["variant"]) for row in rows))
    lines = ((f, v, *(cells.get((f, v, engine), "not run") for engine in engines)) for f, v in named)
    verdicts = table(("family", "variant", *engines), lines)
    said = "\n".join(f"{number}. {sentence}" for sentence, number in notes.items())
    return f"{verdicts}\n\n{_versions(rows)}\n\n{said}".rstrip()


def _verdict(row: dict[str, Any], notes: dict[str, int]) -> str:
    """What loaded and agreed, in which type and how closely; else the number of the sentence that says why not."""
    why = row.get("refused") or row.get("failed")
    if why is None:
        return f"{'agrees' if row['agrees'] else 'loads, differs'}: `{row['to']}`, KL {_kl(row['kl'])}"
    general = re.sub(rf"{row['family']}/[\w-]+", "the model", why)
    sentence, _, last = general.partition("; it said last:")
    if last.strip() in sentence:
        general = sentence
    number = notes.setdefault(general, len(notes) + 1)
    return f"{'refused' if 'refused' in row else 'loads, differs' if row['loads'] else 'fails'} ({number})"


def _kl(value: float) -> str:
    """Rounding makes the smallest ones negative."""
    return f"{value:.1g}" if value >= 1e-6 else "under 1e-6"


def _versions(rows: list[dict[str, Any]]) -> str:
    """Of every engine, as the rows have them, and the machines."""
    engines = {f"{name} {v}" for row in rows for name, v in row.get("engine_versions", {}).items()}
    machines = {f"{e['cpu']}, torch {e['torch']}" for row in rows if (e := row["environment"])}
    return f"{', '.join(sorted(engines))}; {'; '.join(sorted(machines))}."


def engine_speeds() -> str:
    """Speed-ups over the dense model in the same engine; from what `benchmarks/engine_matrix.py` timed."""
    rows = [row for row in rows_of("engine_matrix") if "speedup" in row]
    if not rows:
        return "Not measured yet."
    cells = (
        (
            row["engine"],
            row["variant"],
            f"`{row['to']}`",
            f"{row['perplexity']['engine']:.2f}" if "perplexity" in row else "",
            " → ".join(f"{row['decode_tokens_per_second'][role]:.1f}" for role in ("dense", "model")),
            *(_ratio(row["speedup"][phase]) for phase in ("decode", "prefill")),
        )
        for row in rows
    )
    head = (
        "engine",
        "variant",
        "type",
        "perplexity",
        "decode, tokens/s",
        "decode speed-up (95%)",
        "prefill speed-up (95%)",
    )
    return table(head, cells)


def _ratio(ratio: dict[str, Any]) -> str:
    return f"{ratio['median']:.2f} ({ratio['low']:.2f} to {ratio['high']:.2f})"
