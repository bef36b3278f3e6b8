"""What the demo says about itself follows from what it does; tests/slow runs the whole of it."""

from prunus import demo
from prunus.result import Run
from report_record import record, write


def test_it_says_how_it_calibrated(tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "CALIBRATION", {"calibration": ("self",), "samples": 3, "length": 50})
    made = Run.open(write(tmp_path / "made", record()))
    text = {**made.record["evaluations"][0], "dtype": "float32"}
    figures = demo._figures(made, [text], {"verdict": "none"})
    assert figures["calibration"] == "the model's own samples, 3 x 50 tokens"
