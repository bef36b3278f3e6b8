"""What people read of a profile: where bytes are, what can be smaller, what bears pruning, what packing would gain."""

from typing import Any

from prunus.progress import console
from prunus.terminal.table import empty_table

MB = 1e6


def show_profile(result: dict[str, Any]) -> None:
    table = empty_table(f"{result['model']} ({result['family']})", "component", "MB", "share")
    for name, size in result["components"].items():
        table.add_row(name, f"{size / MB:,.1f}", f"{size / result['bytes']:.1%}")
    console.print(table)
    console.print(
        f"{result['parameters']:,} parameters, {result['prunable_parameters']:,} in matrices that can be pruned; "
        f"{result['decode_bytes_per_token'] / MB:,.1f} MB read and {result['flops_per_token'] / 1e9:.2f} GFLOP per "
        f"token at batch 1; {result['kv_cache_values_per_token']:,} cached values per token of context."
    )
    _show_axes(result["axes"])
    _show_layers(result["layers"])
    if "sensitivity" in result:
        _show_sensitivity(result["sensitivity"])
    if "advice" in result:
        _show_advice(result["advice"])


def _show_axes(axes: list[dict[str, Any]]) -> None:
    table = empty_table("What the architecture lets be smaller", "axis", "units", "parameters in one", "config")
    for row in axes:
        if "refused" in row:
            table.add_row(row["axis"], "-", "-", f"not here: {row['refused']}")
        else:
            table.add_row(row["axis"], str(row["units"]), f"{row['parameters_per_unit']:,}", ", ".join(row["config"]))
    console.print(table)


def _show_layers(layers: list[dict[str, Any]]) -> None:
    table = empty_table("Decoder blocks", "block", "parameters", "MB", "matrices")
    for layer in layers:
        parts = (f"{n} {'x'.join(map(str, row['shape']))}" for n, row in layer["projections"].items())
        table.add_row(layer["name"], f"{layer['parameters']:,}", f"{layer['bytes'] / MB:,.1f}", ", ".join(parts))
    console.print(table)


def _show_sensitivity(rows: list[dict[str, Any]]) -> None:
    worst = max(1e-12, *(row["kl"] for row in rows))
    table = empty_table(f"Sensitivity: KL when pruned alone to {rows[0]['pattern']}", "unit", "KL (nats)", "")
    for row in rows:
        table.add_row(row["name"], f"{row['kl']:.5f}", "█" * max(1, round(30 * row["kl"] / worst)))
    console.print(table)


def _show_advice(advice: dict[str, Any]) -> None:
    title = f"Predicted decode speed in {advice['engine']}, batch 1, {advice['threads']} threads"
    table = empty_table(title, "as", "pattern", "MB a token", "tokens/s", "slow to fast")
    for row in advice["rows"]:
        pattern = "dense" if row["pattern"] == "0" else row["pattern"]
        slow, fast = row["range"]
        size, speed = f"{row['bytes'] / MB:,.1f}", f"{row['tokens_per_second']:.1f}"
        table.add_row(row["as"], pattern, size, speed, f"{slow:.1f} to {fast:.1f}")
    console.print(table)
    console.print(
        f"Some blocks of each timed in turn, {advice['rounds']} rounds ({advice['level']}); the memory alone gave "
        f"{advice['bandwidth_gigabytes_per_second']:.1f} GB/s. Slow to fast: all rounds but a tenth at either end.",
        markup=False,
        soft_wrap=True,
    )
    for sentence in advice["says"]:
        console.print(sentence, markup=False, soft_wrap=True)
