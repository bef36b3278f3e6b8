"""Text sources: what a user names on the command line, and the text behind the name.

    PATH[=weight]                           .txt (UTF-8, one document) or .jsonl (one document a line)
    hf:NAME[@CONFIG]:split:column[=weight]  a dataset of the Hugging Face hub, or a local folder of
                                            .jsonl or .parquet files (extra `data`)
    builtin[=weight]                        the English help topics that every Python carries
    self[=weight]                           samples of the model itself, see self_generated.py

A .jsonl line is an object with `text`, with `question` and `answer`, or with `messages` (a conversation, written out by
the tokenizer's own chat template). Documents are joined by an empty line, the papers' convention.
"""

import hashlib
import json
import math
import pydoc_data.topics
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from prunus.errors import UserError

FORMS = "a path to a .txt or .jsonl file, hf:NAME[@CONFIG]:split:column, builtin or self, each with an optional =weight"


@dataclass(frozen=True, slots=True)
class TextSource:
    """One source: `spec` is the path, the hub address without `hf:`, or empty; `weight` its share of the windows."""

    kind: Literal["file", "hub", "builtin", "self"]
    spec: str = ""
    weight: float = 1.0

    def __str__(self) -> str:
        return {"file": self.spec, "hub": f"hf:{self.spec}"}.get(self.kind, self.kind)


def parse_source(text: str) -> TextSource:
    """Read one source; raises UserError for a bad weight or a malformed hub address.

    A file whose own name holds `=` wins over the reading as a weight.
    """
    name, separator, number = text.rpartition("=")
    if not separator or Path(text).exists():
        name, number = text, "1"
    weight = _weight(number, text)
    if name in ("builtin", "self"):
        return TextSource("builtin" if name == "builtin" else "self", weight=weight)
    if name.startswith("hf:"):
        if len(name.split(":")) != 4 or "" in name.split(":"):
            raise UserError(f"'{text}' is not a hub source: write hf:NAME:split:column or hf:NAME@CONFIG:split:column.")
        return TextSource("hub", name.removeprefix("hf:"), weight)
    if not name:
        raise UserError(f"'{text}' names no text source: give {FORMS}.")
    return TextSource("file", name, weight)


def _weight(number: str, text: str) -> float:
    try:
        weight = float(number)
    except ValueError:
        weight = math.nan
    if not (math.isfinite(weight) and weight > 0):
        raise UserError(f"'{text}' has the weight '{number}': a weight is a number above 0, as in corpus.txt=0.5.")
    return weight


def check_exists(source: TextSource) -> None:
    """Raise UserError when a file is not there: for checks that come long before the text is read."""
    if source.kind == "file" and not Path(source.spec).is_file():
        raise UserError(f"{source.spec} is no text file: give {FORMS}.")


def read_text(source: TextSource, tokenizer: Any, *, max_characters: int | None = None) -> str:
    """Return the joined text of a source; UserError when it is missing, empty, binary or not UTF-8.

    `max_characters` stops the reading of a hub dataset, which may be endless; files are always read whole.
    The tokenizer only lends its chat template, for `messages`.
    """
    assert source.kind != "self", "the model's own samples are tokens, not text"
    if source.kind == "builtin":
        text = "\n\n".join(pydoc_data.topics.topics.values())
    elif source.kind == "hub":
        text = _join(_hub_documents(source), max_characters)
    else:
        text = _read_file(Path(source.spec), tokenizer)
    if not text.strip():
        raise UserError(f"{source} is empty: give a source with text in it.")
    return text


def text_sha256(text: str) -> str:
    """Return the SHA-256 of the UTF-8 bytes, by which a result names the exact text it was measured on."""
    return hashlib.sha256(text.encode()).hexdigest()


def _join(documents: Iterator[str], max_characters: int | None) -> str:
    kept, size = [], 0
    for document in documents:
        kept.append(document)
        size += len(document)
        if max_characters is not None and size >= max_characters:
            break
    return "\n\n".join(kept)


def _read_file(path: Path, tokenizer: Any) -> str:
    content = decode_file(path)
    if path.suffix == ".jsonl":
        return "\n\n".join(_document(row, path, number, tokenizer) for number, row in json_rows(content, path))
    return content


def decode_file(path: Path) -> str:
    """Return the text of a UTF-8 file; UserError when it is missing, a folder, binary or in another encoding."""
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "does not exist"
        raise UserError(f"The text source '{path}' {what}: give {FORMS}.")
    content = path.read_bytes()
    if content.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise UserError(f"'{path}' is UTF-16 text: save it as UTF-8.")
    if b"\0" in content:
        raise UserError(f"'{path}' is binary (a zero byte at offset {content.index(0)}): give a UTF-8 text file.")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"'{path}' is not UTF-8 (byte {error.start} does not decode): save it as UTF-8.") from None


def json_rows(content: str, path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (line number, object) of each line that is not blank; UserError when a line is not a JSON object."""
    for number, line in enumerate(content.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"Line {number} of '{path}' is not JSON ({error.msg}): write one object a line.") from None
        if not isinstance(row, dict):
            raise UserError(f"Line {number} of '{path}' is not a JSON object: write one object a line.")
        yield number, row


def _document(row: dict[str, Any], path: Path, number: int, tokenizer: Any) -> str:
    if isinstance(row.get("text"), str):
        return str(row["text"])
    if isinstance(row.get("question"), str) and isinstance(row.get("answer"), str):
        return f"Question: {row['question']}\nAnswer: {row['answer']}"
    if isinstance(row.get("messages"), list):
        if not getattr(tokenizer, "chat_template", None):
            raise UserError(f"'{path}' holds messages, but the model has no chat template: give lines with 'text'.")
        return str(tokenizer.apply_chat_template(row["messages"], tokenize=False))
    raise UserError(
        f"Line {number} of '{path}' has the keys {sorted(row)}: a line needs 'text', or 'question' and 'answer', "
        "or 'messages'."
    )


def _hub_documents(source: TextSource) -> Iterator[str]:
    try:
        from datasets import load_dataset
    except ImportError:
        raise UserError(f"{source} needs the extra 'data': pip install 'prunus[data]'.") from None
    address, split, column = source.spec.split(":")
    name, _, config = address.partition("@")
    try:
        rows = load_dataset(name, config or None, split=split, streaming=True)
        for row in rows:
            if not isinstance(row.get(column), str):
                raise UserError(f"{source}: '{column}' is no column of text; the dataset has {sorted(row)}.")
            yield row[column]
    except UserError:
        raise
    except (OSError, ValueError) as error:
        raise UserError(f"{source} could not be read: {error}".splitlines()[0]) from error
