"""Killed at any moment, the same command goes on; two processes cannot write one output; a full disk says so."""

import contextlib
import errno
import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import prunus
from families import TINY, save_tiny
from prunus import cli
from prunus.calibration import staged_run
from prunus.checkpoint import open_checkpoint
from prunus.checkpoint import output as output_module
from prunus.errors import UserError
from prunus.models.families import Family
from prunus.steps import memory_plan

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["prunus.steps.sparsify"])
SETTINGS = {"method": "admm", "pattern": "0.5", "samples": 12, "length": 48, "dtype": "float32", "device": "cpu"}


def sparsify_once(model: Path, out: Path, text: Path) -> None:
    torch.set_num_threads(1)
    prunus.sparsify(model, out, calibration=(str(text),), **SETTINGS)


def add_tokenizer(directory: Path, size: int = 128) -> Path:
    """One token for each word w0 .. wN."""
    words = {f"w{i}": i for i in range(size)}
    tokenizer = Tokenizer(models.WordLevel(vocab=words, unk_token="w3"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w3").save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def deep_model(tmp_path_factory):
    family = Family("llama", "deep", "", {**TINY["llama"].sizes, "num_hidden_layers": 12})
    return add_tokenizer(save_tiny(family, tmp_path_factory.mktemp("deep") / "model"))


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    file = tmp_path_factory.mktemp("text") / "words.txt"
    numbers = random.Random(0)
    file.write_text(" ".join(f"w{numbers.randrange(128)}" for _ in range(4000)))
    return file


def start(model, out, text, target=sparsify_once):
    process = SERVER.Process(target=target, args=(model, out, text))
    process.start()
    return process


def weights(directory: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(directory.glob("*.safetensors*"))}


def test_killed_at_ten_random_moments_gives_the_same_bytes(deep_model, text, tmp_path):
    start(deep_model, tmp_path / "warm-up", text).join()
    begun = time.monotonic()
    start(deep_model, tmp_path / "whole", text).join()
    seconds = time.monotonic() - begun
    moments, partial, kills = random.Random(1), tmp_path / "killed.partial", 0
    while kills < 10:
        if (tmp_path / "killed").exists():  # it was through before its time came: begin again
            shutil.rmtree(tmp_path / "killed")
        process = start(deep_model, tmp_path / "killed", text)
        time.sleep(moments.uniform(0.1, 0.7) * seconds)
        before, killed = blocks_done(partial), process.is_alive()
        process.kill()
        process.join()
        kills += killed and partial.exists()
        assert blocks_done(partial) >= before or (tmp_path / "killed").exists()
    last = start(deep_model, tmp_path / "killed", text)
    last.join()
    assert last.exitcode == 0
    assert not partial.exists()
    assert weights(tmp_path / "killed") == weights(tmp_path / "whole")
    names = {file.name for file in (tmp_path / "killed").iterdir()}
    assert names == {file.name for file in (tmp_path / "whole").iterdir()}


# --- killed by itself at one chosen moment; each of these is the target of a process of its own ---


def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)


def killed_while_sequences_wait_on_disk(model, out, text):
    memory_plan.WAITING_BYTES = 1
    spilled, seen = staged_run.Spilled, []

    def spill_then_die(held, file):
        seen.append(spilled(held, file))
        return die() if len(seen) == 200 else seen[-1]

    staged_run.Spilled = spill_then_die
    sparsify_once(model, out, text)


def with_head(model, out, text):
    torch.set_num_threads(1)
    prunus.sparsify(model, out, calibration=(str(text),), head=True, **SETTINGS)


def killed_after_the_head(model, out, text):
    output_module.OutputDirectory.finish = die
    with_head(model, out, text)


def killed_before_the_first_block(model, out, text):
    output_module.OutputDirectory.save_progress = die
    sparsify_once(model, out, text)


def killed_between_name_and_clearing(model, out, text):
    output_module.sync_directory = die
    sparsify_once(model, out, text)


def killed_inside_safetensors(model, out, text):
    """After three blocks, with the file half written that safetensors makes for itself before it renames it."""
    written = []

    def save_then_die(tensors, file, metadata):
        written.append(file)
        if len(written) == 5:  # embedding and head come first
            (file.parent / ".tmpAbCdEf").write_bytes(b"half")
            die()
        real(tensors, file, metadata=metadata)

    real, output_module.save_file = output_module.save_file, save_then_die
    sparsify_once(model, out, text)


def kill_one(model, out, text, target):
    process = start(model, out, text, target)
    process.join()
    assert process.exitcode == -signal.SIGKILL


@pytest.mark.parametrize(
    ("killed", "whole"),
    [
        (killed_while_sequences_wait_on_disk, sparsify_once),
        (killed_after_the_head, with_head),
        (killed_before_the_first_block, sparsify_once),
        (killed_between_name_and_clearing, sparsify_once),
        (killed_inside_safetensors, sparsify_once),
    ],
)
def test_killed_at_a_delicate_moment_gives_the_same_bytes(killed, whole, deep_model, text, tmp_path):
    whole(deep_model, tmp_path / "whole", text)
    kill_one(deep_model, tmp_path / "killed", text, killed)
    whole(deep_model, tmp_path / "killed", text)
    assert weights(tmp_path / "killed") == weights(tmp_path / "whole")
    names = {file.name for file in (tmp_path / "killed").iterdir()}
    assert names == {file.name for file in (tmp_path / "whole").iterdir()}
    assert {file.name for file in tmp_path.iterdir()} == {"whole", "killed"}


def test_nothing_of_a_model_killed_early_gets_into_another(deep_model, text, tmp_path):
    kill_one(deep_model, tmp_path / "out", text, killed_before_the_first_block)
    assert list((tmp_path / "out.partial").glob("*.safetensors"))
    other = add_tokenizer(save_tiny(TINY["llama"], tmp_path / "model"))
    sparsify_once(other, tmp_path / "out", text)
    written = {file.name for file in (tmp_path / "out").glob("*.safetensors")}
    assert written == {info.file.name for info in open_checkpoint(tmp_path / "out").tensors.values()}


def blocks_done(partial: Path) -> int:
    try:
        return json.loads((partial / "progress.json").read_text())["blocks_done"]
    except FileNotFoundError:
        return 0


def test_an_interrupted_run_repeats_no_finished_block(deep_model, text, tmp_path, monkeypatch):
    interrupt_after_block(monkeypatch, 5)
    with pytest.raises(KeyboardInterrupt):
        sparsify_once(deep_model, tmp_path / "out", text)
    shards = {file.name: file.stat().st_mtime_ns for file in (tmp_path / "out.partial").glob("*.safetensors")}
    assert not (tmp_path / "out").exists()
    monkeypatch.undo()
    sparsify_once(deep_model, tmp_path / "out", text)
    after = {file.name: file.stat().st_mtime_ns for file in (tmp_path / "out").glob("*.safetensors")}
    assert {name: after[name] for name in shards} == shards


def interrupt_after_block(monkeypatch, number):
    original = output_module.OutputDirectory.save_progress

    def save_then_stop(self, state):
        original(self, state)
        if state["blocks_done"] == number:
            raise KeyboardInterrupt

    monkeypatch.setattr(output_module.OutputDirectory, "save_progress", save_then_stop)


def test_sequences_that_wait_on_disk_change_nothing(deep_model, text, tmp_path, monkeypatch):
    sparsify_once(deep_model, tmp_path / "all", text)
    monkeypatch.setattr(memory_plan, "WAITING_BYTES", 1)
    sparsify_once(deep_model, tmp_path / "one", text)
    assert weights(tmp_path / "all") == weights(tmp_path / "one")


def refused_by_the_command_line(model, out, text):
    options = ["--calibration", text, "--samples", "12", "--length", "48", "--method", "admm"]
    sys.argv = [str(word) for word in ["prunus", "sparsify", model, out, *options]]
    with out.with_name("stderr").open("w") as stderr, contextlib.redirect_stderr(stderr):
        cli.main()


def test_of_two_real_processes_the_second_is_refused(deep_model, text, tmp_path):
    first = start(deep_model, tmp_path / "out", text)
    while not blocks_done(tmp_path / "out.partial"):
        time.sleep(0.01)
    os.kill(first.pid, signal.SIGSTOP)  # it holds its lock for as long as it takes
    second = start(deep_model, tmp_path / "out", text, refused_by_the_command_line)
    second.join()
    os.kill(first.pid, signal.SIGCONT)
    first.join()
    assert (first.exitcode, second.exitcode) == (0, 2)
    assert "another process is writing" in (tmp_path / "stderr").read_text()
    assert (tmp_path / "out" / "prunus.json").exists()


def test_other_settings_do_not_continue_a_partial_run(deep_model, text, tmp_path, monkeypatch):
    interrupt_after_block(monkeypatch, 2)
    with pytest.raises(KeyboardInterrupt):
        sparsify_once(deep_model, tmp_path / "out", text)
    monkeypatch.undo()
    with pytest.raises(UserError, match="other settings"):
        prunus.sparsify(deep_model, tmp_path / "out", calibration=(str(text),), **{**SETTINGS, "pattern": "2:4"})


def test_a_damaged_partial_run_is_noticed(deep_model, text, tmp_path, monkeypatch):
    interrupt_after_block(monkeypatch, 2)
    with pytest.raises(KeyboardInterrupt):
        sparsify_once(deep_model, tmp_path / "out", text)
    monkeypatch.undo()
    hidden = tmp_path / "out.partial" / "hidden-0"
    hidden.write_bytes(b"\0" * hidden.stat().st_size)
    with pytest.raises(UserError, match="was damaged"):
        sparsify_once(deep_model, tmp_path / "out", text)


def test_a_full_disk_leaves_nothing_that_looks_finished(deep_model, text, tmp_path, monkeypatch):
    original, written = output_module.save_file, []

    def disk_fills_up(tensors, path, metadata):
        if len(written) == 4:
            raise OSError(errno.ENOSPC, "No space left on device")
        written.append(path)
        original(tensors, path, metadata=metadata)

    monkeypatch.setattr(output_module, "save_file", disk_fills_up)
    with pytest.raises(UserError, match="no space left"):
        sparsify_once(deep_model, tmp_path / "out", text)
    assert not (tmp_path / "out").exists()
    monkeypatch.undo()
    sparsify_once(deep_model, tmp_path / "out", text)
    assert (tmp_path / "out" / "prunus.json").exists()


def test_a_full_disk_while_sequences_wait_says_so(deep_model, text, tmp_path, monkeypatch):
    def disk_is_full(_storages, _folder):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(memory_plan, "WAITING_BYTES", 1)
    monkeypatch.setattr(staged_run, "Spilled", disk_is_full)
    with pytest.raises(UserError, match="no space left on the disk"):
        sparsify_once(deep_model, tmp_path / "out", text)
    assert not (tmp_path / "out").exists()


def test_too_small_a_disk_is_said_before_the_work(deep_model, text, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(UserError, match="no space"):
        sparsify_once(deep_model, tmp_path / "out", text)
    assert not (tmp_path / "out").exists()


def test_a_run_that_goes_on_needs_no_second_room_for_hidden_states(deep_model, text, tmp_path, monkeypatch):
    interrupt_after_block(monkeypatch, 5)
    with pytest.raises(KeyboardInterrupt):
        sparsify_once(deep_model, tmp_path / "out", text)
    monkeypatch.undo()
    partial, usage = tmp_path / "out.partial", shutil.disk_usage(tmp_path)
    written = json.loads((partial / "progress.json").read_text())["files"]
    missing = sum(info.num_bytes for name, info in open_checkpoint(deep_model).tensors.items() if name not in written)
    for free, goes_on in ((missing - 1, False), (missing, True)):
        monkeypatch.setattr(shutil, "disk_usage", lambda _, free=free: usage._replace(free=free))
        with contextlib.nullcontext() if goes_on else pytest.raises(UserError, match="no space"):
            sparsify_once(deep_model, tmp_path / "out", text)


def test_the_same_call_again_does_nothing(deep_model, text, tmp_path):
    sparsify_once(deep_model, tmp_path / "out", text)
    again = prunus.sparsify(deep_model, tmp_path / "out", calibration=(str(text),), **SETTINGS)
    assert again.reused


def test_a_run_on_a_run_continues_the_history(deep_model, text, tmp_path):
    sparsify_once(deep_model, tmp_path / "one", text)
    two = prunus.sparsify(tmp_path / "one", tmp_path / "two", method="magnitude", pattern="0.7")
    assert [step["settings"]["pattern"] for step in two.record["history"]] == ["0.5", "0.7"]


def test_a_directory_that_prunus_did_not_make_is_left_alone(deep_model, text, tmp_path):
    mine = tmp_path / "out.partial" / "notes.txt"
    mine.parent.mkdir()
    mine.write_text("mine")
    with pytest.raises(UserError, match="was not made by prunus"):
        sparsify_once(deep_model, tmp_path / "out", text)
    assert mine.read_text() == "mine"
    assert not (tmp_path / "out").exists()
