"""What the tests of the report read off its page."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from prunus.reporting import write_report
from report_record import write


def page(tmp_path: Path, *records: dict[str, Any]) -> str:
    runs = [write(tmp_path / f"run{number}", one) for number, one in enumerate(records)]
    return write_report(runs, tmp_path / "report.html").read_text(encoding="utf-8")


def words(html: str) -> str:
    """The visible text, whitespace collapsed."""

    class Text(HTMLParser):
        hidden, parts = False, ()

        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            self.hidden = tag in ("script", "style")

        def handle_endtag(self, tag: str) -> None:
            self.hidden = False

        def handle_data(self, data: str) -> None:
            self.parts = self.parts if self.hidden else (*self.parts, data)

    parser = Text()
    parser.feed(html)
    return re.sub(r"\s+", " ", " ".join(parser.parts))


def figures(html: str) -> list[dict[str, Any]]:
    found = re.search(r'<script type="application/json" id="figures">(.*?)</script>', html, re.DOTALL)
    assert found is not None
    return list(json.loads(found[1], parse_constant=lambda name: pytest.fail(f"{name} is not JSON")).values())
