"""One self-contained HTML page from the records of one or more runs."""

from prunus.reporting.page import write_report

__all__ = ["write_report"]
