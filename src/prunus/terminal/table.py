"""A table as all of prunus draws it: names on the left, figures on the right."""

from rich.table import Table


def empty_table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left")
    for number, column in enumerate(columns):
        table.add_column(column, justify="left" if number == 0 else "right")
    return table
