"""A dry run refuses what the run would refuse, promises what the run keeps, and writes nothing."""

import json
import shutil

import pytest

import prunus
from prunus import cli
from prunus.checkpoint import Checkpoint
from prunus.steps.notices import ZEROS_ALONE

SMALL = ("--samples", "4", "--length", "32", "--dtype", "float32", "--device", "cpu")


@pytest.fixture
def rehearse(model, text, tmp_path, capsys, monkeypatch):
    """A dry run on the calibration text; returns its JSON object, and checks that it wrote nothing."""

    def run(*wishes: object, out: object = tmp_path / "out") -> dict:
        before = sorted(tmp_path.rglob("*"))
        command = ["prunus", "sparsify", model, out, "--dry-run", "--calibration", text, *SMALL, *wishes]
        monkeypatch.setattr("sys.argv", [str(part) for part in command])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        assert stop.value.code == 0
        assert sorted(tmp_path.rglob("*")) == before
        return json.loads(capsys.readouterr().out.splitlines()[-1])

    return run


def test_it_counts_the_zeros(rehearse):
    result = rehearse()
    assert result["dry_run"] is True
    assert result["zeros"] == result["weights"] // 2
    assert result["remarks"] == [ZEROS_ALONE]


@pytest.mark.parametrize(
    ("pattern", "said"),
    [
        ("0.5", ()),
        ("2:4", ()),
        ("4x1:0.5", ("train afterwards",)),
        ("0.7", ("much in one shot",)),
        ("16x16:0.5", ("train afterwards",)),
    ],
)
def test_it_says_what_the_run_will_say(rehearse, model, tmp_path, capsys, pattern, said):
    remarks = rehearse("--method", "magnitude", "--pattern", pattern)["remarks"]
    assert remarks[0] == ZEROS_ALONE
    assert len(remarks) == 1 + len(said)
    assert all(words in remark for words, remark in zip(said, remarks[1:], strict=True))
    run = prunus.sparsify(model, tmp_path / "done", method="magnitude", pattern=pattern, device="cpu")
    assert run.last_step["notices"] == remarks
    heard = capsys.readouterr().err
    assert all(f"note: {remark}" in heard for remark in remarks)


def test_no_weights_are_read_for_a_new_out(rehearse, monkeypatch):
    def never(_self: object) -> str:
        raise AssertionError("weights were read")

    monkeypatch.setattr(Checkpoint, "sha256", property(never))
    rehearse()


def test_samples_of_the_model_itself_are_not_made(rehearse, monkeypatch):
    monkeypatch.setattr("prunus.text.self_generated.sample_tokens", None)
    rehearse("--calibration", "self")


def test_what_is_done_is_said(rehearse, model, text, tmp_path):
    settings = {"samples": 4, "length": 32, "dtype": "float32", "device": "cpu", "calibration": (str(text),)}
    prunus.sparsify(model, tmp_path / "out", **settings)
    assert "would return at once" in rehearse()["remarks"][0]


@pytest.mark.parametrize("allocation", ["owl", "sensitivity"])
def test_an_allocation_makes_two_runs(rehearse, monkeypatch, allocation):
    monkeypatch.setattr("prunus.steps.estimate.product_seconds", lambda *_: 10.0)
    uniform, allocated = rehearse(), rehearse("--allocation", allocation)
    assert allocated["seconds"] >= 2 * uniform["seconds"] > 0
    assert allocated["disk_bytes"] > uniform["disk_bytes"]
    assert "two complete runs" in allocated["remarks"][0]


@pytest.fixture
def refused_both(refused, model, text, tmp_path):
    """The sentence that ends the dry run, which must end the run too."""

    def run(*wishes: object, out: object = tmp_path / "out", made: object = tmp_path / "out") -> str:
        calibration = () if "--calibration" in wishes else ("--calibration", text)
        command = ("sparsify", model, out, *calibration, *SMALL, *wishes)
        sentence = refused(*command, "--dry-run", out=made)
        refused(*command, out=made)
        return sentence

    return run


def test_out_that_is_something_else(refused_both, tmp_path):
    (tmp_path / "out").mkdir()
    assert "exists and is not the result" in refused_both(made=None)


def test_out_of_other_settings(refused_both, model, tmp_path):
    prunus.sparsify(model, tmp_path / "out", method="magnitude")
    assert "exists and is not the result" in refused_both(made=None)


def test_unfinished_out_of_other_settings(refused_both, tmp_path):
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "progress.json").write_text('{"fingerprint": "another"}')
    assert "unfinished run with other settings" in refused_both()


def test_out_inside_model(refused_both, model):
    assert "lies inside MODEL" in refused_both(out=model / "out")


def test_out_below_a_file(refused_both, text):
    assert "cannot write" in refused_both(out=text / "out", made=None)


def test_a_disk_that_is_too_small(refused_both, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    assert "no space" in refused_both()


@pytest.mark.parametrize(
    ("wishes", "expected"),
    [
        (("--calibration", "/no/text.txt"), "/no/text.txt"),
        (("--calibration", "builtin=0.001", "--calibration", "self"), "gets none of 4 windows"),
        (("--samples", "100000"), "give more text"),
        (("--length", "4096"), "over the model's maximum of 512"),
        (("--allocation", "owl", "--pattern", "2:4"), "allocation 'owl' decides"),
        (("--allocation", "dlp", "--override", "*.q_proj=dense"), "with 1 overrides"),
        (("--allocation", "model", "--method", "magnitude", "--calibration", "/no/text.txt"), "/no/text.txt"),
        (("--max-memory", "1MiB"), "too small"),
        (("--method", "magnitude", "--pattern", "2:5"), "2:5"),
    ],
)
def test_wishes_that_cannot_be_met(refused_both, wishes, expected):
    assert expected in refused_both(*wishes)


def test_an_allocation_needs_text_to_be_judged_on(refused_both, tmp_path):
    enough_for_one_run = tmp_path / "short.txt"
    enough_for_one_run.write_text("x" * 32 * 4)
    assert "give more text" in refused_both("--allocation", "owl", "--calibration", enough_for_one_run)
