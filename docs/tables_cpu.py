"""The tables of docs/sparse-cpu.md: what `cpu_kernels.py`, `decode.py`, `loading.py`, `advice.py` and
`sparse_quality.py` in benchmarks/ measured.

They are parts of `tables.py`, which writes them.
"""

from typing import Any

from rows import rows_of, table

PATTERN_NAMES = {"torch": "torch, dense", "0": "ours, dense"}


def kernel_speeds() -> str:
    """Time of the dense kernel over that of each pattern, in each state of the memory, and the ceiling by bytes."""
    rows = rows_of("cpu_kernels")
    first, probes = rows[0], [row["probe"] for row in rows]
    about = (
        f"{first['shape'][0]} x {first['shape'][1]}, {first['inputs']} inputs, {first['cpu']} ({first['level']}), "
        f"{first['threads']} threads, torch {first['torch']}; {min(row['passes'] for row in rows)} to "
        f"{max(row['passes'] for row in rows)} passes each"
    )
    middle = (min(probes) + max(probes)) / 2
    states = [[row for row in rows if row["probe"] < middle], [row for row in rows if row["probe"] >= middle]]
    told = (
        f"The memory alone gave {min(row['probe'] for row in state):.0f} to {max(row['probe'] for row in state):.0f} "
        f"GB/s:\n\n{_kernels_in(state)}"
        for state in states
        if state
    )
    return "\n\n".join((f"{about}.", *told))


def _kernels_in(rows: list[dict[str, Any]]) -> str:
    """The rows of one state: patterns down, batches across."""
    batches = sorted({row["batch"] for row in rows})
    names = list(dict.fromkeys((row["type"], row["pattern"]) for row in rows))
    cells = {(row["type"], row["pattern"], row["batch"]): row for row in rows}
    head = ("type", "pattern", "ceiling", "of the bandwidth", *(f"batch {batch}" for batch in batches))
    lines = (
        (
            kind,
            PATTERN_NAMES.get(pattern, pattern),
            f"{cells[kind, pattern, 1]['ceiling']:.2f}",
            f"{cells[kind, pattern, 1]['share']:.0%}",
            *(
                f"{cells[kind, pattern, batch]['over_dense']:.2f}" if (kind, pattern, batch) in cells else "-"
                for batch in batches
            ),
        )
        for kind, pattern in names
    )
    return table(head, lines)


def decode_speeds() -> str:
    """Decode speed of the 1.1-billion shape, packed and not, in one run."""
    rows = rows_of("decode")
    lines = (
        (
            row["model"],
            f"{row['bytes'] / 1e6:,.0f}",
            f"{row['tokens_per_second']:.1f}",
            *(f"{row[f'over_{name}']:.2f}" if f"over_{name}" in row else "" for name in ("dense", "q8_0", "q4_0")),
            f"{row['share']:.0%}",
            f"{row['outside'] * 1e3:.1f}" if "outside" in row else "",
        )
        for row in rows
    )
    first = rows[0]
    about = (
        f"{first['prompt_tokens']} prompt and {first['new_tokens']} new tokens, {first['rounds']} rounds, "
        f"{first['cpu']} ({first['level']}), {first['threads']} threads, torch {first['torch']}, "
        f"transformers {first['transformers']}"
    )
    head = ("model", "MB a token", "tokens/s", "over dense", "over Q8_0", "over Q4_0", "of the bandwidth", "ms outside")
    return f"{about}:\n\n{table(head, lines)}"


def loading() -> str:
    """Bytes of the 1.1-billion shape on disk and in memory, dense and packed."""
    rows = rows_of("loading")
    names = ("disk", "opened", "decoded", "own")
    lines = ((row["model"], *(f"{row[name] / 1e9:.2f}" for name in names)) for row in rows)
    head = ("model", "GB on disk", "peak until it is open", "peak after 8 tokens", "of that not mapped, at the end")
    idle = max(row["idle"] for row in rows) / 1e9
    return f"Torch, transformers and prunus alone take {idle:.2f} GB:\n\n{table(head, lines)}"


def advice() -> str:
    """Predicted speeds of the 1.1-billion shape beside those of whole models in the same minute."""
    rows = rows_of("advice")
    lines = ((row["model"], f"{row['predicted']:.1f}", f"{row['measured']:.1f}", f"{row['ratio']:.2f}") for row in rows)
    head = ("model", "predicted tokens/s", "measured", "predicted / measured")
    return f"{rows[0]['cpu']}, torch {rows[0]['torch']}, {rows[0]['rounds']} rounds:\n\n{table(head, lines)}"


def sparse_quality() -> str:
    """Quality of SmolLM2 as each pattern and type, beside its bytes and the speed of the large shape."""
    speeds = {row["model"]: row["tokens_per_second"] for row in rows_of("decode")}
    lines = (
        (
            row["row"],
            f"{row['bits_per_weight']:.2f}",
            f"{row['perplexity']:.2f}",
            f"{row['kl']:.3f}",
            f"{row['bytes'] / 1e6:.1f}",
            f"{speeds[row['speed_of']]:.1f}" if row.get("speed_of") in speeds else "-",
        )
        for row in rows_of("sparse_quality")
    )
    head = ("model", "bits a weight", "perplexity", "KL", "MB on disk", "tokens/s of the 1.1B shape")
    return table(head, lines)
