"""The command line, run; for mistakes a model and a text to spoil, and the one sentence that must come of them."""

import shutil
from pathlib import Path

import pytest

from prunus import cli
from prunus.checkpoint.directory import INDEX_NAME

TEXT = "The quick brown fox jumps over the lazy dog and goes home. " * 400


@pytest.fixture
def model(tmp_path, tiny_llama_dir):
    return Path(shutil.copytree(tiny_llama_dir, tmp_path / "model"))


@pytest.fixture
def text(tmp_path):
    file = tmp_path / "text.txt"
    file.write_text(TEXT)
    return file


@pytest.fixture
def prunus(capsys, monkeypatch):
    """Run one command; returns (exit code, stdout, stderr)."""

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["prunus", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        captured = capsys.readouterr()
        return int(stop.value.code or 0), captured.out, captured.err

    return run


@pytest.fixture
def refused(tmp_path, prunus):
    """Run the command line; returns the one sentence it must end with."""

    def run(*arguments: object, out: Path | None = tmp_path / "out") -> str:
        code, printed, errors = prunus(*arguments)
        assert code == 2
        assert "Traceback" not in errors
        assert printed == ""
        if out is not None:
            assert not out.exists()
            assert not (out.with_name(out.name + ".partial") / INDEX_NAME).exists()
        sentence = errors[errors.index("error: ") :].strip()
        assert "\n" not in sentence
        return sentence

    return run
