"""The report: what the record holds is on the page, what it lacks is "not measured", and nothing is fetched or run."""

import json
import re
from pathlib import Path

import pytest
from plotly.offline import get_plotlyjs

from prunus.errors import UserError
from prunus.reporting import text, write_report
from report_page import figures, page, words
from report_record import HOSTILE, record, write


def test_the_verdict_comes_first_and_from_the_record(tmp_path: Path):
    seen = words(page(tmp_path, record()))
    expected = [
        "Sparsity 0.500",
        "Smaller by 50.0%",
        "500 MB dense, 250 MB now",
        "Faster by 2.00x",
        "Quality kept 21.16",
    ]
    expected += [
        "28.10",
        "KL 0.310 nats per token",
        "80.1% of places",
        "held-out, 32 windows of 1024 tokens",
        "Conditions",
    ]
    places = [seen.index(one) for one in expected]
    assert places == sorted(places)


def test_weights_as_large_as_before_are_not_smaller_by_less_than_nothing(tmp_path: Path):
    same = record()
    for role in ("model", "dense"):
        same["benchmarks"][-1][role]["bytes_on_disk"] = 500_000_000 + (role == "model")
    assert "Smaller by 0.0%" in words(page(tmp_path, same))


def test_conditions_evaluations_continuations_and_history_appear(tmp_path: Path):
    seen = words(page(tmp_path, record()))
    for expected in (
        "134,515,008",
        "seed 7",
        "A processor",
        "8 GB",
        "0.4 \u00b1 0.02",
        "upon a time",
        "or twice",
        "3 min 2 s",
        "1.42 GB",
        "abababababab...",
        "All 6 matrices as a table",
        "model.layers.2.mlp.down_proj",
    ):
        assert expected in seen
    assert "not measured" in seen  # the energy of a benchmark that does not say it
    assert "Sensitivity: not measured" not in seen


def test_resolved_facts_stand_in_place_of_settings(tmp_path: Path):
    resolved = record()
    step = resolved["history"][0]
    step["settings"] |= {"dtype": "auto", "protect": []}
    step |= {"dtype": "bfloat16", "calibration": [{"source": "news", "windows": 4}, {"source": "self", "windows": 2}]}
    seen = words(page(tmp_path, resolved))
    conditions = seen[seen.index("Conditions") : seen.index("Quality", seen.index("Conditions"))]
    assert "dtype bfloat16" in conditions
    assert "calibration source news, windows 4; source self, windows 2" in conditions
    assert "protect" not in conditions


def test_other_evaluations_and_sensitivity_by_block_are_shown(tmp_path: Path):
    other = record()
    other["evaluations"].append({"kind": "lm-eval", "dataset": "arc", "limit": 10, "metrics": {"acc,none": 0.25}})
    other["sensitivity"] = [{"name": f"layers.{n}", "block": n, "projection": "block", "kl": n / 10} for n in range(3)]
    html = page(tmp_path, other)
    assert "acc,none - 0.25" in words(html)
    bars = [f["data"][0] for f in figures(html) if f["data"][0].get("name") == "KL"]
    assert [(one["x"], one["y"]) for one in bars] == [(["0", "1", "2"], [0.0, 0.1, 0.2])]


def test_heat_maps_hold_the_recorded_values(tmp_path: Path):
    maps = [one["data"][0] for one in figures(page(tmp_path, record())) if one["data"][0]["type"] == "heatmap"]
    assert [one["z"] for one in maps] == [[[0.5] * 3] * 2, [[0.01, 0.02, 0.03]] * 2, [[0.1] * 3] * 2]
    assert all(one["y"] == ["self_attn.q_proj", "mlp.down_proj"] for one in maps)


def test_what_is_absent_is_said_to_be_not_measured(tmp_path: Path):
    seen = words(page(tmp_path, {"format": 1, "prunus": "0.1.0", "history": []}))
    for expected in ("Smaller by", "Faster by", "Quality kept"):
        assert f"{expected} not measured" in seen
    assert "Sparsity and error: not measured" in seen
    assert "Latency, throughput and memory: not measured" in seen
    assert figures(page(tmp_path / "again", {"format": 1, "history": []})) == []


def test_text_of_a_record_cannot_become_markup(tmp_path: Path):
    hostile = record(name=HOSTILE)
    hostile["history"][0]["matrices"][0]["projection"] = HOSTILE
    hostile["evaluations"][2]["items"][0]["sparse"] = HOSTILE
    hostile["benchmarks"][0]["verdict"] = HOSTILE
    html = page(tmp_path, hostile, hostile)
    assert "<script>window" not in html
    assert html.count("<script") - get_plotlyjs().count("<script") == 3
    assert HOSTILE in words(html)
    # plotly reads markup in labels, so they are escaped a second time.
    assert "<b>" not in json.dumps(figures(html)).replace("<br>", "")


def test_the_page_loads_nothing(tmp_path: Path):
    html = page(tmp_path, record(), record("wanda", 0.6))
    assert "default-src 'none'" in html
    own = html.replace(get_plotlyjs(), "")
    assert len(own) < len(html) - 1_000_000
    assert "://" not in own
    assert re.findall(r'\b(?:src|href|action|poster|data)\s*=\s*"(?!#)', own) == []
    assert html.count(get_plotlyjs()) == 1


def test_several_runs_are_compared_like_with_like(tmp_path: Path):
    other = record("wanda", 0.6, 60.0)
    other_text = record("ria", 0.7, 70.0)
    other_text["evaluations"][0]["dataset"] = "another text"
    html = page(tmp_path, record(), record("admm", 0.7, 40.0), other, other_text)
    perplexity = [f for f in figures(html) if f["layout"].get("yaxis", {}).get("title", {}).get("text") == "perplexity"]
    lines = [[(line["name"], line["x"], line["y"]) for line in figure["data"]] for figure in perplexity]
    assert lines == [[("admm", [0.5, 0.7], [28.1, 40.0]), ("wanda", [0.6], [60.0])], [("ria", [0.7], [70.0])]]
    assert "4 runs compared" in words(html)


def test_infinite_and_missing_numbers_do_not_break_the_page(tmp_path: Path):
    broken = record(perplexity=float("inf"))
    broken["history"][0]["matrices"][0]["error"] = float("nan")
    broken["benchmarks"][0]["model"]["peak_memory_bytes"] = None
    html = page(tmp_path, broken, broken)
    assert "infinite" in words(html)
    assert "this model peak memory not measured" in html
    assert any(None in row for f in figures(html) for row in f["data"][0].get("z", []))


def test_the_last_state_of_a_matrix_counts(tmp_path: Path):
    twice = record()
    again = json.loads(json.dumps(twice["history"][0]))
    again["matrices"] = [again["matrices"][0] | {"sparsity": 0.9}]
    twice["history"].append(again)
    heat = figures(page(tmp_path, twice))[0]["data"][0]["z"]
    assert heat == [[0.9, 0.5, 0.5], [0.5, 0.5, 0.5]]


@pytest.mark.parametrize(
    ("content", "message"),
    [("{", "not readable as JSON"), ('{"format": 99}', "has format 99"), ("[]", "has format None")],
)
def test_a_bad_record_is_refused_and_the_old_page_stays(tmp_path: Path, content: str, message: str):
    run = write(tmp_path / "run", {})
    (run / "prunus.json").write_text(content)
    output = tmp_path / "report.html"
    output.write_text("old")
    with pytest.raises(UserError, match=message):
        write_report([run], output)
    assert output.read_text() == "old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.html", "run"]


def test_no_run_no_record_and_a_directory_as_output_are_refused(tmp_path: Path):
    with pytest.raises(UserError, match="no run was given"):
        write_report([], tmp_path / "report.html")
    with pytest.raises(UserError, match=r"has no prunus\.json"):
        write_report([tmp_path], tmp_path / "report.html")
    with pytest.raises(UserError, match="is a directory"):
        write_report([write(tmp_path / "run", record())], tmp_path)


def test_numbers_as_words():
    assert (text.size(538_090_408), text.size(None)) == ("538 MB", "not measured")
    assert (text.seconds(0.0309), text.seconds(90.0), text.seconds(182.3)) == ("30.9 ms", "90 s", "3 min 2 s")
    assert text.plain({"a": [1, 2.5], "b": None, "c": True}) == "a 1; 2.5, b -, c yes"
