"""Text sources, windows and the model's own samples."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from prunus.errors import UserError
from prunus.text import TextSource, calibration_tokens, evaluation_windows, parse_source, self_generator
from prunus.text.batches import shares
from prunus.text.self_generated import FIRST_TEMPERATURE, sample_tokens, temperature
from prunus.text.sources import read_text, text_sha256


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    path = tmp_path / "corpus.txt"
    path.write_text("".join(f"line {i}: h\u00e9llo world\n" for i in range(200)), encoding="utf-8")
    return path


def calibrate(*sources: str, tokenizer: Any, samples: int = 8, length: int = 16, **settings: Any) -> Any:
    parsed = [parse_source(source) for source in sources]
    return calibration_tokens(parsed, tokenizer, **{"samples": samples, "length": length, "seed": 0, **settings})


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("corpus.txt", TextSource("file", "corpus.txt", 1.0)),
        ("corpus.txt=0.25", TextSource("file", "corpus.txt", 0.25)),
        ("hf:owner/name@config:train:text=2", TextSource("hub", "owner/name@config:train:text", 2.0)),
        ("self", TextSource("self", "", 1.0)),
        ("builtin=3", TextSource("builtin", "", 3.0)),
    ],
)
def test_parse_source(text: str, expected: TextSource) -> None:
    assert parse_source(text) == expected


def test_a_file_with_an_equals_sign_in_its_name_is_a_file(tmp_path: Path) -> None:
    path = tmp_path / "a=1"
    path.write_text("text")
    assert parse_source(str(path)) == TextSource("file", str(path), 1.0)
    assert parse_source(f"{path}=2") == TextSource("file", str(path), 2.0)


@pytest.mark.parametrize("text", ["a.txt=", "a.txt=0", "a.txt=-1", "a.txt=nan", "a.txt=inf", "self=much"])
def test_a_bad_weight_is_refused(text: str) -> None:
    with pytest.raises(UserError, match="a weight is a number above 0"):
        parse_source(text)


@pytest.mark.parametrize("text", ["hf:name", "hf:name:split", "hf::split:column", "hf:a:b:c:d"])
def test_a_malformed_hub_source_is_refused(text: str) -> None:
    with pytest.raises(UserError, match="hf:NAME:split:column"):
        parse_source(text)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b" \n\n ", "is empty"),
        (b"MZ\x00\x01", "is binary"),
        ("caf\u00e9".encode("latin-1"), "is not UTF-8"),
        ("text".encode("utf-16"), "is UTF-16"),
    ],
)
def test_bad_text_files_are_refused(tmp_path: Path, tiny_tokenizer: Any, content: bytes, message: str) -> None:
    path = tmp_path / "bad.txt"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message):
        calibrate(str(path), tokenizer=tiny_tokenizer)


def test_a_missing_file_and_a_folder_are_refused(tmp_path: Path, tiny_tokenizer: Any) -> None:
    with pytest.raises(UserError, match="does not exist"):
        calibrate(str(tmp_path / "none.txt"), tokenizer=tiny_tokenizer)
    with pytest.raises(UserError, match="is a folder"):
        calibrate(str(tmp_path), tokenizer=tiny_tokenizer)


def test_too_few_tokens_says_how_many_there_are(corpus: Path, tiny_tokenizer: Any) -> None:
    tokens = len(corpus.read_bytes())
    with pytest.raises(UserError, match=rf"holds {tokens} tokens, but 1000 x 16 = 16000 were asked for"):
        calibrate(str(corpus), tokenizer=tiny_tokenizer, samples=1000)
    with pytest.raises(UserError, match=rf"holds {tokens} tokens, but 1 x {tokens + 1} ="):
        evaluation_windows(parse_source(str(corpus)), tiny_tokenizer, length=tokens + 1)


@pytest.mark.parametrize(("length", "message"), [(65, "over the model's maximum of 64"), (1, "at least 2 tokens")])
def test_a_bad_length_is_refused(corpus: Path, tiny_tokenizer: Any, length: int, message: str) -> None:
    with pytest.raises(UserError, match=message):
        calibrate(str(corpus), tokenizer=tiny_tokenizer, length=length, max_length=64)


def test_a_share_of_no_window_is_refused(corpus: Path, tiny_tokenizer: Any) -> None:
    with pytest.raises(UserError, match="gets none of 8 windows"):
        calibrate(str(corpus), "builtin=0.001", tokenizer=tiny_tokenizer)


def test_the_hub_without_its_extra_names_the_extra(monkeypatch: pytest.MonkeyPatch, tiny_tokenizer: Any) -> None:
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(UserError, match=r"pip install 'prunus\[data\]'"):
        calibrate("hf:owner/name:train:text", tokenizer=tiny_tokenizer)


def test_a_dataset_is_read_until_there_is_enough(tmp_path: Path, tiny_tokenizer: Any) -> None:
    pytest.importorskip("datasets", reason="needs the extra 'data'")
    (tmp_path / "train.jsonl").write_text(
        "".join(json.dumps({"body": f"document {i}", "n": i}) + "\n" for i in range(9))
    )
    source = parse_source(f"hf:{tmp_path}:train:body")
    assert read_text(source, tiny_tokenizer, max_characters=15) == "document 0\n\ndocument 1"
    with pytest.raises(UserError, match=r"'n' is no column of text; the dataset has \['body', 'n'\]"):
        read_text(parse_source(f"hf:{tmp_path}:train:n"), tiny_tokenizer)
    with pytest.raises(UserError, match=r"test:body could not be read: Bad split: test\. Available splits"):
        read_text(parse_source(f"hf:{tmp_path}:test:body"), tiny_tokenizer)


def test_jsonl_documents(tmp_path: Path, tiny_tokenizer: Any) -> None:
    path = tmp_path / "rows.jsonl"
    rows = [{"text": "plain"}, {"question": "1+1?", "answer": "2"}]
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n\n")
    assert read_text(parse_source(str(path)), tiny_tokenizer) == "plain\n\nQuestion: 1+1?\nAnswer: 2"


def test_jsonl_messages_go_through_the_chat_template(tmp_path: Path, tiny_llama_dir: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_llama_dir)
    path = tmp_path / "chat.jsonl"
    path.write_text(json.dumps({"messages": [{"role": "user", "content": "hi"}, {"role": "bot", "content": "ho"}]}))
    with pytest.raises(UserError, match="no chat template"):
        read_text(parse_source(str(path)), tokenizer)
    tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    assert read_text(parse_source(str(path)), tokenizer) == "<user>hi<bot>ho"


@pytest.mark.parametrize(
    ("line", "message"),
    [("{", "Line 2 .* is not JSON"), ("[1]", "not a JSON object"), ('{"other": 1}', r"has the keys \['other'\]")],
)
def test_bad_jsonl_lines_are_named(tmp_path: Path, tiny_tokenizer: Any, line: str, message: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "fine"}\n' + line)
    with pytest.raises(UserError, match=message):
        read_text(parse_source(str(path)), tiny_tokenizer)


def test_calibration_windows_are_disjoint_pieces_of_the_text(corpus: Path, tiny_tokenizer: Any) -> None:
    ids = tiny_tokenizer(corpus.read_text(encoding="utf-8"))["input_ids"]
    pieces = [ids[start : start + 16] for start in range(0, len(ids) - 15, 16)]
    batch = calibrate(str(corpus), tokenizer=tiny_tokenizer, samples=len(pieces))
    assert sorted(batch.tokens_NT.tolist()) == sorted(pieces)
    assert batch.tokens_NT.dtype == torch.int64
    assert batch.real_NT.all()
    assert batch.real_NT.shape == batch.tokens_NT.shape


def test_calibration_is_seeded(corpus: Path, tiny_tokenizer: Any) -> None:
    first, again = (calibrate(str(corpus), tokenizer=tiny_tokenizer) for _ in range(2))
    other = calibrate(str(corpus), tokenizer=tiny_tokenizer, seed=1)
    assert torch.equal(first.tokens_NT, again.tokens_NT)
    assert not torch.equal(first.tokens_NT, other.tokens_NT)


def test_a_mix_has_exact_counts_and_says_where_it_came_from(corpus: Path, tiny_tokenizer: Any) -> None:
    own_NT = torch.full((2, 16), 7)
    batch = calibrate(
        f"{corpus}=3", "builtin=2", "self=2", tokenizer=tiny_tokenizer, samples=7, generate=lambda *_: own_NT
    )
    assert [part["windows"] for part in batch.description] == [3, 2, 2]
    assert [part["source"] for part in batch.description] == [str(corpus), "builtin", "self"]
    assert batch.description[0]["sha256"] == text_sha256(corpus.read_text(encoding="utf-8"))
    assert torch.equal(batch.tokens_NT[5:], own_NT)


def test_self_without_a_model_is_refused(tiny_tokenizer: Any) -> None:
    with pytest.raises(UserError, match="needs a model to sample from"):
        calibrate("self", tokenizer=tiny_tokenizer)
    with pytest.raises(UserError, match="own samples"):
        evaluation_windows(parse_source("self"), tiny_tokenizer, length=16)


@given(weights=st.lists(st.floats(0.1, 10), min_size=1, max_size=6), samples=st.integers(700, 2000))
def test_shares_add_up_and_stay_within_one_of_exact(weights: list[float], samples: int) -> None:
    counts = shares([TextSource("file", "x", weight) for weight in weights], samples)
    assert sum(counts) == samples
    for count, weight in zip(counts, weights, strict=True):
        assert abs(count - samples * weight / sum(weights)) < 1


def test_evaluation_takes_the_first_windows_in_order(corpus: Path, tiny_tokenizer: Any) -> None:
    ids = tiny_tokenizer(corpus.read_text(encoding="utf-8"))["input_ids"]
    batch = evaluation_windows(parse_source(str(corpus)), tiny_tokenizer, length=32, windows=3)
    assert batch.tokens_NT.flatten().tolist() == ids[:96]
    everything = evaluation_windows(parse_source(str(corpus)), tiny_tokenizer, length=32)
    assert everything.tokens_NT.flatten().tolist() == ids[: len(ids) // 32 * 32]


def test_scored_bytes_are_those_of_the_predicted_tokens(tmp_path: Path, tiny_tokenizer: Any) -> None:
    path = tmp_path / "ascii.txt"
    path.write_text("0123456789" * 10)
    batch = evaluation_windows(parse_source(str(path)), tiny_tokenizer, length=10, windows=4)
    assert batch.description[0]["scored_bytes"] == 4 * 9


@pytest.fixture
def tiny_llama(tiny_llama_dir: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(tiny_llama_dir).eval()


def test_own_samples_go_on_past_the_end_of_a_text(tiny_llama: Any) -> None:
    """A model that is sure of </s> gives nothing else: sampling neither stops there nor pads."""
    end = tiny_llama.config.eos_token_id

    def certain(_module: Any, _inputs: Any, logits_NTV: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(logits_NTV).index_fill(-1, torch.tensor(end), 1e4)

    tiny_llama.lm_head.register_forward_hook(certain)
    tokens_NT = sample_tokens(tiny_llama, 0, samples=2, length=12, seed=0)
    assert tokens_NT.tolist() == [[0] + [end] * 11] * 2


def test_own_samples_equal_a_slow_loop_without_cache(tiny_llama: Any) -> None:
    tokens_NT = sample_tokens(tiny_llama, 0, samples=3, length=20, seed=5)
    generator = torch.Generator().manual_seed(5)
    slow_NT = torch.zeros(3, 1, dtype=torch.int64)
    for position in range(1, 20):
        with torch.no_grad():
            logits_NV = tiny_llama(slow_NT).logits[:, -1] / temperature(position)
        slow_NT = torch.cat([slow_NT, torch.multinomial(logits_NV.softmax(-1), 1, generator=generator)], dim=1)
    assert torch.equal(tokens_NT, slow_NT)


def test_the_temperature_falls_to_one() -> None:
    schedule = [temperature(position) for position in range(1, 30)]
    assert schedule[0] == FIRST_TEMPERATURE
    assert schedule == sorted(schedule, reverse=True)
    assert schedule[-1] == 1.0


def test_own_samples_are_cached(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_llama: Any, tiny_tokenizer: Any
) -> None:
    monkeypatch.setenv("PRUNUS_CACHE", str(tmp_path))
    loads = []

    def load_model() -> Any:
        loads.append(1)
        return tiny_llama

    generate = self_generator(load_model, tiny_tokenizer, identity="a")
    first_NT = generate(2, 12, 0)
    assert torch.equal(generate(2, 12, 0), first_NT)
    assert len(loads) == 1
    assert not torch.equal(generate(2, 12, 1), first_NT)
    self_generator(load_model, tiny_tokenizer, identity="b")(2, 12, 0)
    assert len(loads) == 3
