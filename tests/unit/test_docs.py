"""The pages are those that the code makes, cover every method, and link to files that exist."""

import ast
import importlib.util
import json
import re
import sys
from pathlib import Path

import pytest

from prunus.sparsity import METHODS

ROOT = Path(__file__).parents[2]
PAGES = [*sorted((ROOT / "docs").glob("*.md")), *sorted(ROOT.glob("*.md"))]


@pytest.fixture(scope="module")
def tables():
    sys.path.insert(0, str(ROOT / "docs"))  # as Python does for a script
    spec = importlib.util.spec_from_file_location("tables", ROOT / "docs" / "tables.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.path.remove(str(ROOT / "docs"))
    return module


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_made_parts_are_up_to_date(page, tables):
    text = page.read_text(encoding="utf-8")
    assert tables.render(text) == text, "run `make docs`"


def test_every_made_part_stands_on_a_page(tables):
    pages = "".join(page.read_text(encoding="utf-8") for page in PAGES)
    assert sorted(tables.MADE.findall(pages)) == sorted(tables.PARTS)


@pytest.fixture
def measured(tables, tmp_path, monkeypatch):
    """Put rows in the place of those that `benchmarks/methods.py` measured."""

    def write(*rows: dict[str, object]) -> None:
        (tmp_path / "measured").mkdir()
        (tmp_path / "measured" / "methods.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
        monkeypatch.setattr(sys.modules["rows"], "MEASURED", tmp_path / "measured")

    return write


def test_patterns_are_in_order_and_a_missing_pair_is_a_dash(tables, measured):
    pairs = {("wanda", "4x4:0.5"): 1, ("admm", "2:4"): 1234.5, ("admm", "4:8"): 1, ("wanda", "0.5"): 3}
    measured(*({"method": m, "pattern": p, "perplexity": value, "seconds": 59.6} for (m, p), value in pairs.items()))
    assert tables.seconds().splitlines()[2:] == [
        "| `0.5` | - | 60 | - | - | - |",
        "| `4:8` | - | - | - | - | 60 |",
        "| `2:4` | - | - | - | - | 60 |",
        "| `4x4:0.5` | - | 60 | - | - | - |",
    ]


def test_rows_of_different_conditions_are_no_table(tables, measured):
    row = tables.rows_of("methods")[0]
    measured(row, row | {"torch": "another"})
    with pytest.raises(ValueError, match="unpack"):
        tables.perplexities()


@pytest.mark.parametrize("method", METHODS.values(), ids=list(METHODS))
def test_every_method_has_its_section(method):
    page = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")
    section = re.search(rf"^## {re.escape(method.title)}\n(.*?)^## ", page, re.DOTALL | re.MULTILINE)[1]
    for part in ("**Idea.**", "```math", "**Cost.**", "**Use it**", "**Do not use it**", "**Traps.**", "**Source.**"):
        assert part in section


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text(encoding="utf-8")):
        assert link.startswith("https://") or (page.parent / link).exists(), link


def test_imports_point_down_the_list_of_rooms():
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (`.*?`) \| ", page.partition("## Rooms")[2].partition("\n## ")[0], re.MULTILINE)
    rank = {name: number for number, row in enumerate(rows) for name in re.findall(r"`(\w+)", row)}
    package = ROOT / "src" / "prunus"
    upward = [
        f"{path.relative_to(package)} imports {found}"
        for path in package.glob("**/*.py")
        if path.parent != package or path.stem != "__init__"
        for found in _imported_rooms(path)
        if rank[found] < rank[path.relative_to(package).parts[0].removesuffix(".py")]
    ]
    assert upward == []


def _imported_rooms(path: Path) -> set[str]:
    imports = [
        node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.ImportFrom)
    ]
    return {node.module.split(".")[1] for node in imports if (node.module or "").startswith("prunus.")}
