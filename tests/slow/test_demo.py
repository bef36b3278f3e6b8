"""The main job on the real model, as `make demo` runs it; the second call finds every step done."""

import time

import pytest

from prunus.demo import run_demo
from prunus.demo_model import fetch_demo_model
from prunus.errors import UserError

pytestmark = pytest.mark.slow


def test_the_demo_and_its_second_call(tmp_path):
    try:
        fetch_demo_model()
    except UserError as error:
        pytest.skip(f"the demo's model cannot be fetched: {error}")
    first = run_demo(tmp_path / "demo")
    assert first["sparsity"]["pruned_matrices"] == pytest.approx(0.5)
    assert first["dense_perplexity"] < first["perplexity"] < 4 * first["dense_perplexity"]
    assert (tmp_path / "demo" / "report.html").stat().st_size > 100_000
    begun = time.monotonic()
    second = run_demo(tmp_path / "demo")
    assert time.monotonic() - begun < 60
    assert second["reused"]
    assert second["perplexity"] == first["perplexity"]
