"""What people read of the advisor: predicted speed by pattern and type, and what it says of each."""

from typing import Any

from rich.table import Table

from prunus.progress import console

MB = 1e6


def show_advice(advice: dict[str, Any]) -> None:
    title = f"Predicted decode speed in {advice['engine']}, batch 1, {advice['threads']} threads"
    table = Table(title=title, title_justify="left")
    for column in ("as", "pattern", "MB a token", "tokens/s"):
        table.add_column(column, justify="left" if column in ("as", "pattern") else "right")
    for row in advice["rows"]:
        pattern = "dense" if row["pattern"] == "0" else row["pattern"]
        table.add_row(row["as"], pattern, f"{row['bytes'] / MB:,.1f}", f"{row['tokens_per_second']:.1f}")
    console.print(table)
    rows, columns = advice["measured_on"]
    console.print(
        f"Rates of a {rows}x{columns} matrix on this machine ({advice['level']}), whose memory gave "
        f"{advice['bandwidth_gigabytes_per_second']:.1f} GB/s; {advice['seconds_outside_products'] * 1e3:.1f} ms of a "
        "token are not products.",
        markup=False,
        soft_wrap=True,
    )
    for sentence in advice["says"]:
        console.print(sentence, markup=False, soft_wrap=True)
