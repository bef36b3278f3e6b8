"""What a benchmark asks: prompts of the user's own, mixes that come along, several requests at the same time."""

import json

import pytest

import prunus
from prunus.benchmark import energy, measurement
from prunus.benchmark.energy import Counter, Meter
from prunus.benchmark.prompts import MIXES, chosen_prompts, read_prompts
from prunus.benchmark.requests import Asked, check_same, tokenised
from prunus.errors import UserError
from prunus.reporting.record import Run
from prunus.reporting.tables import benchmark, parts

QUICK = {"prompt_tokens": 40, "new_tokens": 3, "repetitions": 2, "threads": 1, "device": "cpu"}


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Without the processes that measure peak memory."""
    peaks = {"peak_memory_bytes": 1, "peak_gpu_memory_bytes": None}
    monkeypatch.setattr(measurement, "peak_memory", lambda _directory, _work: peaks)


@pytest.fixture
def lines(tmp_path):
    def write(name, *rows):
        file = tmp_path / name
        file.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
        return file

    return write


def test_a_text_file_has_a_prompt_a_line(lines):
    found = read_prompts(lines("mine.txt", "Hello there.", "", "  Who is it? "))
    assert [(one.mix, one.text, one.new_tokens) for one in found] == [
        ("mine", "Hello there.", None),
        ("mine", "Who is it?", None),
    ]


def test_a_line_of_json_may_say_its_tokens_and_its_mix(lines, tiny_tokenizer):
    file = lines("m.jsonl", {"prompt": "abc", "new_tokens": 7, "mix": "code"}, {"prompt": "de"})
    found = tokenised(read_prompts(file), tiny_tokenizer, prompt_tokens=1, new_tokens=4)
    assert [(one.mix, one.new_tokens) for one in found] == [("code", 7), ("m", 4)]
    assert [one.prompt for one in found] == [tiny_tokenizer(text)["input_ids"] for text in ("abc", "de")]


@pytest.mark.parametrize(
    ("name", "row", "message"),
    [
        ("m.jsonl", {"text": "abc"}, r"Line 1 .* has the keys \['text'\]: a line needs 'prompt'"),
        ("m.jsonl", {"prompt": ""}, "a line needs 'prompt'"),
        ("m.jsonl", {"prompt": "a", "new_tokens": 1}, "new_tokens 1: give a whole number of at least 2"),
        ("m.jsonl", {"prompt": "a", "new_tokens": True}, "new_tokens True"),
        ("m.jsonl", "nothing", "Line 1 .* is not JSON"),
        ("m.txt", "  ", r"holds no prompt: write one a line"),
    ],
)
def test_what_is_no_prompt_is_refused(lines, name, row, message):
    with pytest.raises(UserError, match=message):
        read_prompts(lines(name, row))


def test_a_file_that_is_not_there_is_refused_first(tmp_path, monkeypatch):
    monkeypatch.setattr("prunus.steps.bench.open_checkpoint", None)
    with pytest.raises(UserError, match=r"is no file: give a text file with one prompt a line"):
        prunus.bench(tmp_path, prompts=str(tmp_path / "none.txt"))


def test_a_recipe_asks_for_its_prompts_before_the_work(tiny_llama_dir, tmp_path):
    recipe = {"version": 1, "model": str(tiny_llama_dir), "steps": [{"sparsify": {"method": "magnitude"}}]}
    recipe["steps"].append({"bench": {"prompts": str(tmp_path / "none.txt")}})
    file = tmp_path / "recipe.yaml"
    file.write_text(json.dumps(recipe))
    with pytest.raises(UserError, match=r"none\.txt is no file"):
        prunus.run(file, tmp_path / "out")
    assert not list(tmp_path.glob("out*"))


def test_the_mixes_are_short_long_and_as_long_as_asked(tiny_tokenizer):
    found = tokenised(chosen_prompts(None, list(MIXES)), tiny_tokenizer, prompt_tokens=500, new_tokens=2)
    lengths = {name: [len(one.prompt) for one in found if one.mix == name] for name in MIXES}
    assert max(lengths["short"]) < 100 < min(lengths["long-question"])
    assert lengths["long-context"] == [500]


def test_each_mix_is_told_apart_and_both_models_do_the_same(tiny_llama_dir, lines):
    file = lines("m.jsonl", {"prompt": "one two", "mix": "a"}, {"prompt": "three", "mix": "b", "new_tokens": 5})
    told = prunus.bench(tiny_llama_dir, against=str(tiny_llama_dir), prompts=str(file), mix=("short",), **QUICK)
    assert [(one["mix"], one["prompts"], one["new_tokens"]) for one in told["mixes"]] == [
        ("short", 4, 3),
        ("a", 1, 3),
        ("b", 1, 5),
    ]
    short, _, b = told["mixes"]
    for side in ("model", "dense"):
        assert short[side]["ttft_seconds"]["count"] == 4 * 2
        assert b[side]["tpot_seconds"]["count"] == 4 * 2
    assert len(b["speedup"]["decode"]["pairs"]) == 2
    assert len(told["speedup"]["decode"]["pairs"]) == 6 * 2
    assert (told["prompt"], told["new_tokens"]) == ("6 prompts", "3 to 5")
    assert parts({"mixes": told["mixes"]})[-1][:2] == ["mix b", "this model"]


def test_random_tokens_are_no_mix(tiny_llama_dir):
    told = prunus.bench(tiny_llama_dir, **QUICK)
    assert (told["mixes"], told["concurrency"], told["prompt_tokens"]) == ([], [], 40)


def test_other_tokens_are_not_the_same_work(tiny_tokenizer):
    def read(text):
        return tokenised(chosen_prompts(None, ["short"]), text, prompt_tokens=1, new_tokens=2)

    class Other:
        def __call__(self, text, **_options):
            return {"input_ids": [1] * len(text)}

    check_same(read(tiny_tokenizer), read(tiny_tokenizer), "dense")
    with pytest.raises(UserError, match="dense cuts the prompts into other tokens than the model does"):
        check_same(read(tiny_tokenizer), read(Other()), "dense")


def test_a_prompt_that_a_model_cannot_read_is_refused(tiny_llama_dir, lines):
    file = lines("m.txt", "x" * 600)
    with pytest.raises(
        UserError, match=r"600 prompt and 3 new tokens are 603, and .* reads at most 512: ask for fewer"
    ):
        prunus.bench(tiny_llama_dir, prompts=str(file), **QUICK)


def test_requests_at_the_same_time_are_counted_together(tiny_llama_dir):
    told = prunus.bench(tiny_llama_dir, against=str(tiny_llama_dir), concurrency=(1, 3), **QUICK)
    (row,) = told["concurrency"]
    assert row["requests"] == 3
    for side in ("model", "dense"):
        assert row[side]["ttft_seconds"]["count"] == 3 * 2
        assert row[side]["tpot_seconds"]["count"] == 3 * 2 * 2
        slowest = row[side]["ttft_seconds"]["p99"] + 2 * row[side]["tpot_seconds"]["p99"]
        assert row[side]["tokens_per_second"] > 3 * 3 / (2 * slowest)
    assert len(row["speedup"]["pairs"]) == 2


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mix": ("long",)}, "unknown mix 'long'; allowed are short, long-question, long-context"),
        ({"concurrency": (1, 0)}, "greater than or equal to 1"),
        ({"concurrency": ("many",)}, "concurrency.0='many' is not allowed"),
        ({"concurrency": ()}, "concurrency"),
        ({"concurrency": (4,), "mix": ("short",)}, "concurrency 4 runs random prompts of one length"),
    ],
)
def test_what_cannot_be_is_refused(tiny_llama_dir, settings, message):
    with pytest.raises(UserError, match=message):
        prunus.bench(tiny_llama_dir, **{**QUICK, **settings})


def test_the_prompts_file_is_part_of_what_was_measured(lines):
    from prunus.settings import BenchSettings
    from prunus.steps.identity import identity

    file = lines("m.txt", "one")
    before = identity(BenchSettings(prompts=str(file)))
    lines("m.txt", "two")
    assert identity(BenchSettings(prompts=str(file))) != before


def test_energy_goes_into_the_record_and_the_report(tiny_llama_dir, monkeypatch):
    joules = iter(range(0, 1000, 3))
    meter = Meter("RAPL: package-0", (Counter(lambda: float(next(joules))),))
    monkeypatch.setattr(measurement, "find_meter", lambda _device: meter)
    told = prunus.bench(tiny_llama_dir, **QUICK)
    assert (told["energy"], told["model"]["joules_per_token"]) == ("RAPL: package-0", 1.0)  # 3 J for 3 tokens
    assert benchmark(told)[-1] == ["energy", "not measured", "1 J a new token (RAPL: package-0)"]
    monkeypatch.setattr(measurement, "find_meter", lambda _device: energy.find_meter("cpu", tiny_llama_dir))
    told = prunus.bench(tiny_llama_dir, **QUICK)
    assert told["energy"] == "not measured"
    assert benchmark(told)[-1] == ["energy", "not measured", "not measured"]


def test_the_counts_are_checked_wherever_they_come_from():
    with pytest.raises(UserError, match="concurrency is 0: give a whole number of at least 1"):
        Asked(prompt_tokens=1, new_tokens=2, repetitions=1, concurrency=(0,)).check(threads=1)


def test_an_old_record_has_no_parts():
    assert parts(Run("old", {}).record) == []
