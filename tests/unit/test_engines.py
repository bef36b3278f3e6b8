"""Engines as processes: what they answer, and what is left of them when they do not. No engine is needed here."""

import json
import re
import sys
import time
import zipfile
from pathlib import Path

import pytest

from fake_engine import write_script
from prunus.engines import ENGINES, Engine, environment, find, install, require, sparse_cpu
from prunus.engines.process import EngineProcess
from prunus.errors import EngineError, UserError


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("PRUNUS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def start(folder, **text):
    return EngineProcess(Path(sys.executable), write_script(folder, **text), name="fake")


def is_alive(pid):
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def gone(pid):
    deadline = time.monotonic() + 10
    while is_alive(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not is_alive(pid)


# --- processes ---


def test_an_engine_answers_and_is_gone_afterwards(tmp_path):
    with start(tmp_path) as process:
        first, second = (process.ask({"do": what}, timeout=60) for what in ("a", "b"))
        assert (first["did"], second["did"]) == ("a", "b")
    assert gone(first["me"])


def test_prunus_s_packages_come_after_the_engine_s_own(tmp_path):
    with start(tmp_path) as process:
        paths = process.ask({"do": "say"}, timeout=60)["paths"]
    borrowed = [path for path in sys.path if Path(path).name == "site-packages"]
    assert paths[-len(borrowed) :] == borrowed
    assert paths[0] == str(tmp_path)


def test_what_an_engine_starts_borrows_them_too(tmp_path):
    ask = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import sys; print(*sys.path, sep=chr(10))'])"
    with start(tmp_path, text=ask) as process:
        paths = process.run_to_end("say", timeout=60).splitlines()
    borrowed = [path for path in sys.path if Path(path).name == "site-packages"]
    assert paths[-len(borrowed) :] == borrowed


def test_what_does_not_end_after_its_answers_is_not_said_to_have_been_killed(tmp_path, monkeypatch):
    monkeypatch.setattr("prunus.engines.process.GRACE", 0.2)
    closes = "import os, time; os.close(1); time.sleep(600)"
    with (
        start(tmp_path, text=closes) as process,
        pytest.raises(EngineError, match="fake died while asked to a; it said"),
    ):
        process.ask({"do": "a"}, timeout=60)


def test_a_worker_answers_whatever_goes_wrong_in_it(tmp_path):
    asked = "from worker_loop import memory, serve\nserve(dict, {'read': lambda _m, r: {}[r['key']], 'memory': memory})"
    with start(tmp_path, text=asked) as process:
        assert process.ask({"do": "memory"}, timeout=60)["peak_memory_bytes"] > 2**20
        with pytest.raises(
            EngineError, match=r"failed to read: KeyError: 'seven'; it said last:\n  Traceback"
        ) as error:
            process.ask({"do": "read", "key": "seven"}, timeout=60)
    assert "worker_loop.py" in str(error.value)


def test_a_crash_is_told_with_the_last_lines(tmp_path):
    with start(tmp_path) as process:
        with pytest.raises(EngineError, match=r"fake died while asked to crash \(signal SIGSEGV\)") as error:
            process.ask({"do": "crash"}, timeout=60)
        assert "tensor 7 is torn" in str(error.value)
        with pytest.raises(EngineError, match="was gone when asked to go"):
            process.ask({"do": "go"}, timeout=60)


def test_a_time_out_leaves_no_process_behind(tmp_path):
    with start(tmp_path) as process:
        me = process.ask({"do": "say"}, timeout=60)["me"]
        with pytest.raises(EngineError, match="had not finished to hang after 2 s") as error:
            process.ask({"do": "hang"}, timeout=2)
    child = int(re.search(r"child (\d+)", str(error.value))[1])
    assert gone(me)
    assert gone(child)


def test_an_exception_here_ends_the_engine_too(tmp_path):
    def interrupted():
        with start(tmp_path) as process:
            seen.append(process.ask({"do": "say"}, timeout=60)["me"])
            raise KeyboardInterrupt

    seen: list[int] = []
    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert gone(seen[0])


@pytest.mark.parametrize(
    ("what", "message"),
    [("garbage", "what is no answer: 'ggml 3 4 5'"), ("fail", "failed to fail: no such file; it said nothing")],
)
def test_what_is_no_good_answer_is_an_error(tmp_path, what, message):
    with start(tmp_path) as process, pytest.raises(EngineError, match=message):
        process.ask({"do": what}, timeout=60)


def test_a_program_runs_to_its_end(tmp_path):
    with start(tmp_path, text="print('one'); print('two')") as process:
        assert process.run_to_end("count", timeout=60) == "one\ntwo\n"


@pytest.mark.parametrize(
    ("text", "seconds", "message"),
    [
        ("raise SystemExit('no tokenizer.json')", 60, "failed to convert; it said last:\n  no tokenizer.json"),
        ("import time; time.sleep(600)", 1, "had not finished to convert after 1 s; it said nothing"),
    ],
)
def test_a_program_that_fails_or_hangs_is_an_error(tmp_path, text, seconds, message):
    with start(tmp_path, text=text) as process, pytest.raises(EngineError, match=message):
        process.run_to_end("convert", timeout=seconds)


# --- installing ---


def wheel(folder, name, version, content="WORD = 'here'\n"):
    """A package of one module, as a file that pip installs without any network."""
    info = f"{name}-{version}.dist-info"
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as archive:
        archive.writestr(f"{name}.py", content)
        archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        archive.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr(f"{info}/RECORD", "")


def fake(probe, version="1.0"):
    pins = {"packages": (f"fakeengine=={version}",), "apart": ("fakesources==2.0",)}
    return Engine(name="fake", title="a fake", takes="all", zeros="no", shapes="no", tested={}, probe=probe, **pins)


def test_an_installation_goes_on_where_it_stopped(cache, tmp_path, monkeypatch):
    (tmp_path / "wheels").mkdir()
    for name, version in (("fakeengine", "1.0"), ("fakeengine", "1.1"), ("fakesources", "2.0")):
        wheel(tmp_path / "wheels", name, version)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "wheels"))

    def broken(_installed):
        raise EngineError("cannot be started")

    def works(installed):
        script = write_script(tmp_path, "import fakeengine; print(fakeengine.WORD)")
        with EngineProcess(installed.python, script, name="fake") as process:
            return {"word": process.run_to_end("say", timeout=60).strip()}

    with pytest.raises(EngineError, match="cannot be started"):
        install(fake(broken))
    assert find(fake(broken)) is None
    installed = install(fake(works))
    assert installed.versions == {"fakeengine": "1.0", "fakesources": "2.0"}
    assert installed.facts == {"word": "here"}
    assert installed.untested == ()
    assert install(fake(broken)) == installed  # ready: nothing is done again
    assert require(fake(broken, "1.1")).untested == ("fakeengine 1.0 (tested: 1.1)",)
    assert install(fake(works, "1.1")).untested == ()


def test_what_cannot_be_installed_is_said_in_one_sentence(cache, monkeypatch):
    def made(_command, _extra, what):
        if what != "fakeengine==1.0":
            (environment.home_of(fake(None)) / "bin").mkdir()
            (environment.home_of(fake(None)) / "bin" / "python").symlink_to(sys.executable)
            return
        call(_command, _extra, what)

    call = environment._call
    monkeypatch.setattr(environment, "_call", made)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(
        UserError, match=r"fakeengine==1\.0 could not be installed \(ERROR: .*run the same command again"
    ):
        install(fake(lambda _installed: {}))
    assert find(fake(None)) is None


def test_the_engine_of_prunus_itself_is_not_installed():
    with pytest.raises(UserError, match="comes with prunus itself"):
        install(Engine(name="x", title="", takes="", zeros="", shapes="", tested={"torch": "0.0"}))


def test_a_compiler_is_asked_for_before_anything_is_made(cache, monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(UserError, match=r"no C\+\+ compiler: install g\+\+ or clang"):
        install(ENGINES["llama.cpp"])
    assert not cache.exists() or not list(cache.glob("engines/*"))


def test_vllm_asks_for_its_release_of_torch_before_anything_is_made(cache, monkeypatch):
    monkeypatch.setattr("prunus.engines.vllm.TORCH", "2.12.7")
    with pytest.raises(UserError, match=r"compiled for torch 2\.12\.7, which it borrows, and yours is \d"):
        install(ENGINES["vllm"])
    assert not list(cache.glob("engines/*"))


# --- the command line ---


def test_the_list_says_what_is_there_and_what_is_gained(cache, prunus):
    code, printed, _ = prunus("engines")
    rows = {row["engine"]: row for row in json.loads(printed.splitlines()[-1])["engines"]}
    assert code == 0
    assert list(rows) == list(ENGINES)
    assert rows["transformers"]["installed"]
    assert not rows["llama.cpp"]["installed"]
    assert rows["llama.cpp"]["install"] == "prunus engines install llama.cpp"
    assert all(row[f"gains from {what}"] for row in rows.values() for what in ("zeros", "smaller shapes"))


def test_an_unknown_engine_is_refused(cache, refused):
    sentence = refused("engines", "install", "vlm", out=None)
    assert "allowed are transformers, sparse-cpu, llama.cpp, vllm, onnxruntime, openvino." in sentence


def test_an_engine_that_fails_ends_the_command_with_code_1(prunus, monkeypatch):
    def fails():
        raise EngineError("fake died while asked to load; it said last:\n  torn")

    monkeypatch.setattr("prunus.terminal.engines.engine_rows", fails)
    code, printed, errors = prunus("engines")
    assert (code, printed) == (1, "")
    assert errors == "error: fake died while asked to load; it said last:\n  torn\n"


def test_pins_are_exact():
    for engine in ENGINES.values():
        assert all(re.fullmatch(r"[\w-]+==[\w.]+", pin) for pin in (*engine.packages, *engine.apart))


def test_scripts_for_an_engine_import_nothing_of_prunus():
    folder = Path(environment.__file__).parent
    workers = [file for file in folder.glob("*_worker.py") if file != sparse_cpu.WORKER]  # that engine is prunus
    scripts = [folder / "launcher.py", *workers, *(folder / "inside").glob("*.py")]
    assert len(scripts) >= 6
    for script in scripts:
        assert "import prunus" not in script.read_text()
        assert "from prunus" not in script.read_text()
