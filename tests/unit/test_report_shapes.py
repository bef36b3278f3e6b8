"""The report of runs that were shrunk: a real tiny run, read back from its weights, and records with round numbers."""

import json
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
from safetensors import safe_open

from families import TINY, save_tiny
from prunus.models.families import Family
from prunus.reporting.record import Run, read_runs
from prunus.reporting.shape_figures import shape_figures
from prunus.reporting.shapes import shape_rows
from prunus.reporting.verdict import verdict
from prunus.steps.shrink import shrink
from prunus.steps.shrink_step import from_hex
from report_page import figures, page, words
from report_record import HOSTILE, record, shrink_step, shrunk


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Any) -> tuple[Path, Path]:
    """(a tiny model with experts, the same with fewer experts, KV groups and channels)."""
    root = tmp_path_factory.mktemp("shapes")
    (root / "text.txt").write_text("The quick brown fox jumps over the lazy dog and goes home. " * 40)
    family = TINY["mixtral"]
    sizes = {**family.sizes, "vocab_size": len(tiny_tokenizer)}
    dense = save_tiny(Family(family.family, family.name, "", sizes, family.own_names), root / "dense")
    tiny_tokenizer.save_pretrained(dense)
    text = {"calibration": (str(root / "text.txt"),), "samples": 4, "length": 32}
    return dense, shrink(dense, root / "smaller", experts=2, kv_groups=1, ffn=0.5, multiple_of=1, **text).path


@pytest.fixture(scope="module")
def run(made: tuple[Path, Path]) -> Run:
    return read_runs([made[1]])[0]


def num_parameters(directory: Path) -> int:
    total = 0
    for path in directory.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            total += sum(file.get_tensor(name).numel() for name in file.keys())  # noqa: SIM118
    return total


def test_the_first_card_is_what_the_weights_say(made: tuple[Path, Path], run: Run):
    before, after = map(num_parameters, made)
    card = verdict(run)[0]
    assert (card.question, card.answer) == ("Smaller by", f"{after / before:.2f}x")
    meaning = card.meaning.replace("\N{NO-BREAK SPACE}", " ")
    assert f"parameters {before:,} \N{RIGHTWARDS ARROW} {after:,}" in meaning
    assert "expert score reap" in card.conditions
    assert [one.question for one in verdict(run)] == ["Smaller by", "Faster by", "Quality kept"]


def test_the_table_of_shapes_is_what_the_configs_say(made: tuple[Path, Path], run: Run):
    fields = {"experts": "num_local_experts", "KV groups": "num_key_value_heads", "FFN channels": "intermediate_size"}
    before, after = (json.loads((path / "config.json").read_text()) for path in made)
    rows = {row[0]: row[1:] for row in shape_rows(run)}
    for axis, field in fields.items():
        old, new = before[field], after[field]
        assert new < old
        assert rows[axis][:3] == [str(old), str(new), f"{new / old:.3f}"]
    assert [rows[axis][3] for axis in fields] == ["2", "1", "0.5"]
    assert rows["parameters"][:2] == [f"{num_parameters(path):,}" for path in made]


def test_history_is_in_words_and_each_part_says_its_own(tmp_path: Path, run: Run):
    seen = words(page(tmp_path, run.record)).replace("\N{NO-BREAK SPACE}", " ")
    history = seen[seen.rindex("History") :]
    first, second = history.split("shrink")[1:]
    assert "experts 4 \N{RIGHTWARDS ARROW} 2 (asked 2)" in first
    assert "experts 4" not in second
    assert "(asked 0.5)" in second
    between, after = (step["after"]["parameters"] for step in run.history)
    assert f"parameters {between:,} \N{RIGHTWARDS ARROW} {after:,}" in second
    assert run.history[1]["groups"][-1]["kept"] not in history
    assert run.history[1]["request"][:12] not in history


def test_conditions_are_those_of_the_whole_call(tmp_path: Path, made: tuple[Path, Path], run: Run):
    seen = words(page(tmp_path, run.record))
    conditions = seen[seen.index("Conditions") : seen.index("Quality", seen.index("Conditions"))]
    assert f"made from {made[0]}" in conditions
    assert "smaller.steps" not in conditions
    for asked in ("experts 2", "kv groups 1", "ffn 0.5"):
        assert asked in conditions


@pytest.mark.parametrize(("axis", "title"), [("kv_groups", "Head importance"), ("experts", "Expert importance")])
def test_heat_maps_hold_the_recorded_scores_and_mark_what_stays(run: Run, axis: str, title: str):
    rows = [row for step in run.history for row in step["groups"] if row["axis"] == axis]
    (figure,) = (one for one in shape_figures(run) if one.title == title)
    (trace,) = figure.data
    assert trace["x"] == [str(row["block"]) for row in rows]
    assert [list(column) for column in zip(*trace["z"], strict=True)] == [row["scores"] for row in rows]
    for column, row in zip(zip(*trace["text"], strict=True), rows, strict=True):
        assert [unit for unit, dot in enumerate(column) if dot] == from_hex(row["kept"]).tolist()
    assert "text.txt (4 windows)" in figure.caption


def test_errors_are_means_over_the_experts_of_a_block(run: Run):
    (figure,) = (one for one in shape_figures(run) if one.title == "Error of what reads the cut")
    lines = {line["name"]: dict(zip(line["x"], line["y"], strict=True)) for line in figure.data}
    assert list(lines) == [f"{axis}, {how}" for axis in ("KV groups", "FFN channels") for how in ("cut", "refitted")]
    rows = [row for row in run.history[1]["groups"] if row["axis"] == "ffn" and row["block"] == 1]
    assert len(rows) == 2
    assert lines["FFN channels, cut"]["1"] == pytest.approx(fmean(row["error_plain"] for row in rows))
    assert lines["FFN channels, refitted"]["1"] == pytest.approx(fmean(row["error"] for row in rows))
    assert "mean over the experts" in figure.caption


def as_run(*steps: dict[str, Any]) -> Run:
    return Run("run", record() | {"history": list(steps)})


def test_scores_over_decades_are_coloured_by_their_logarithm():
    step = shrink_step()
    step["groups"][0]["scores"] = [0.0, 1.0]
    trace = shape_figures(as_run(step))[0].data[0]
    assert trace["z"] == [[-3.0] * 3, [0.0, 1.0, 1.0]]
    assert (trace["zmin"], trace["zmax"]) == (-3.0, 1.0)
    assert trace["colorbar"]["ticktext"] == ["0.001", "0.01", "0.1", "1", "10"]
    assert trace["customdata"][0][0] == "0, goes"


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        ({"refit": True, "score": "magnitude"}, "output on the calibration text, of the matrix"),
        ({"refit": False, "score": "flap"}, "estimated from input norms alone"),
        ({"refit": False, "score": "magnitude"}, "weights; no text was looked at"),
        ({"refit": False, "score": "tomorrow"}, "does not know the method"),
    ],
)
def test_an_error_is_called_what_it_is(settings: dict[str, Any], error: str):
    figure = shape_figures(as_run(shrink_step(**settings)))[-1]
    assert error in figure.caption
    assert len(figure.data) == 1 + settings["refit"]


def test_shrunk_runs_are_compared_by_the_parameters_left(tmp_path: Path):
    runs = [shrunk(30.0, after=900), shrunk(45.0, after=500), shrunk(60.0, after=500, refit=False), record()]
    drawn = figures(page(tmp_path, *runs))
    left = [one for one in drawn if one["layout"].get("xaxis", {}).get("title", {}).get("text", "").endswith("before")]
    lines = [[(line["name"], line["x"], line["y"]) for line in one["data"]] for one in left]
    plain, no_refit = "KV groups, second-order", "KV groups, second-order, no refit"
    assert lines[0] == [(plain, [0.5, 0.9], [45.0, 30.0]), (no_refit, [0.5], [60.0])]
    assert [x for _, x, _ in lines[1]] == [[0.5, 0.9], [0.5]]
    assert len(left) == 2
    against_sparsity = [
        one for one in drawn if "sparsity" in one["layout"].get("xaxis", {}).get("title", {}).get("text", "")
    ]
    assert [[line["name"] for line in one["data"]] for one in against_sparsity] == [["admm"], ["admm"]]


def test_zeros_and_smaller_shapes_have_a_card_each(tmp_path: Path):
    both = record()
    both["history"].append(shrink_step())
    run = Run("both", both)
    assert [card.question for card in verdict(run)] == ["Smaller by", "Sparsity", "Faster by", "Quality kept"]
    assert "not counted again after the model was shrunk" in verdict(run)[1].meaning
    assert "500\N{NO-BREAK SPACE}MB" in verdict(run)[0].meaning
    assert "admm, shrunk" in page(tmp_path, both, both)


def test_two_calls_along_one_axis_count_from_the_first_to_the_last():
    again = shrink_step(750, 600) | {"request": "ef" * 32}
    again["axes"]["kv_groups"] = {"asked": 0.5, "before": 1, "after": 1}
    rows = shape_rows(as_run(shrink_step(), again))
    assert rows[0] == ["KV groups", "2", "1", "0.500", "1; 0.5"]
    assert rows[1] == ["parameters", "1,000", "600", "0.600", "-"]


def test_runs_that_were_not_shrunk_have_no_shapes(tmp_path: Path):
    assert shape_rows(as_run()) == []
    assert "Shapes" not in words(page(tmp_path, record()))


def test_a_step_that_says_little_is_shown(tmp_path: Path):
    seen = words(page(tmp_path, {"format": 1, "history": [{"step": "shrink"}]}))
    assert "Smaller by not measured" in seen


def test_names_of_a_record_cannot_become_markup(tmp_path: Path):
    hostile = shrunk(axis=HOSTILE)
    hostile["history"][0]["calibration"][0]["source"] = HOSTILE
    html = page(tmp_path, hostile, hostile)
    assert "<script>window" not in html
    assert HOSTILE in words(html)
    assert "<b>" not in json.dumps(figures(html)).replace("<br>", "")
