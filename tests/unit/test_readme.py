"""What the README shows is true: its code runs on a tiny model, its folder tree is the one that is there."""

import json
import re
import shlex
from pathlib import Path

import pytest

from prunus import cli
from prunus.checkpoint import read_record
from prunus.models.families import FAMILIES

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"


def code_block(language: str) -> str:
    """The README's only block in that language."""
    blocks = re.findall(rf"^```{language}\n(.*?)^```", README, re.DOTALL | re.MULTILINE)
    assert len(blocks) == 1
    return blocks[0]


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """A directory of its own to work in, with a cache of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PRUNUS_CACHE", str(tmp_path / "cache"))
    return tmp_path


def test_the_python_example_runs(workplace, tiny_llama_dir, capsys):
    code = code_block("python")
    assert MODEL in code
    exec(compile(code.replace(MODEL, str(tiny_llama_dir)), "README.md", "exec"), {})
    assert re.search(r"^perplexity [\d.]+ -> [\d.]+, .*report\.html$", capsys.readouterr().out, re.MULTILINE)
    assert read_record(workplace / "smol-50")["history"][-1]["sparsity"]["pruned_matrices"] == pytest.approx(0.5)


def test_the_command_runs(workplace, tiny_llama_dir, capsys, monkeypatch):
    command = code_block("sh").strip()
    assert MODEL in command
    monkeypatch.setattr("sys.argv", shlex.split(command.replace(MODEL, str(tiny_llama_dir))))
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["sparsity"]["pruned_matrices"] == 0.5


def test_the_tree_shows_what_is_there():
    tree = re.search(r"^src/prunus/\n(.*?)^```", README, re.DOTALL | re.MULTILINE)[1].splitlines()
    inside = {line.split()[0] for line in tree if line.startswith("  ")}
    package = ROOT / "src" / "prunus"
    there = {
        f"{path.name}/" if path.is_dir() else path.name
        for path in package.iterdir()
        if not path.name.startswith((".", "__pycache__"))
    }
    assert inside == there
    for line in tree:
        name, comment = line.split(maxsplit=1)
        assert comment
        assert line.startswith("  ") or (ROOT / name).is_dir()


def test_the_number_of_families_is_right():
    assert f"{len(FAMILIES)} families tested" in README


def test_commands_of_make_exist():
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    used = {
        target
        for page in (README, (ROOT / "CONTRIBUTING.md").read_text())
        for target in re.findall(r"make ([a-z-]+) ", page)
    }
    assert {"demo", "test"} <= used <= set(targets)
