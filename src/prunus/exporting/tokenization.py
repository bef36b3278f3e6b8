"""Whether the engine reads text as the model's own tokenizer does, and knows its template and where it ends."""

import json
from typing import Any

from prunus.checkpoint import Checkpoint
from prunus.engines.worker import Worker

# Words, numbers, code with its indentation, accents, Chinese, an emoji, runs of spaces.
SAMPLE = (
    "The pruned vine's 3 shoots cost $1,234.50 in 2026.\n\n"
    "def cut(vine, keep=0.5):\n    return [s for s in vine if s.score > keep]\t# done\n"
    "Na\u00efve caf\u00e9s in M\u00fcnchen  \u4fee\u526a\u6811\u679d \U0001f331 don't stop...   here!"
)
CONVERSATION = [{"role": "user", "content": "Which branch goes first?"}]


def compare_text(worker: Worker, checkpoint: Checkpoint, tokenizer: Any, loaded: dict[str, Any]) -> dict[str, Any]:
    """What was compared, and under `failures` a sentence for everything that differs."""
    expected, asked = _expected(tokenizer)
    given = worker.ask({"do": "tokenize", "texts": asked}, timeout=worker.start)["tokens"]
    failures = [
        f"the engine reads other tokens, from number {_first_difference(own, theirs)} on of {asked[i]['text']!r}"
        for i, (own, theirs) in enumerate(zip(expected, given, strict=True))
        if own != theirs
    ]
    failures += _carried(checkpoint, tokenizer, loaded)
    return {
        "texts": len(asked),
        "tokens": sum(map(len, expected)),
        "chat_template": "equal" if _template(tokenizer) else "the model has none",
        "failures": failures,
    }


def _expected(tokenizer: Any) -> tuple[list[list[int]], list[dict[str, Any]]]:
    """Token ids by the model's own tokenizer, and the same texts as requests to the engine."""
    expected = [tokenizer(SAMPLE)["input_ids"]]
    asked = [{"text": SAMPLE, "bos": True, "special": False}]
    if _template(tokenizer):
        text = str(tokenizer.apply_chat_template(CONVERSATION, tokenize=False, add_generation_prompt=True))
        expected.append(tokenizer(text, add_special_tokens=False)["input_ids"])
        asked.append({"text": text, "bos": False, "special": True})
    return expected, asked


def _template(tokenizer: Any) -> str | None:
    """The tokenizer's chat template, where it has one; of several, the one called default."""
    template = getattr(tokenizer, "chat_template", None)
    return template.get("default") if isinstance(template, dict) else template


def _carried(checkpoint: Checkpoint, tokenizer: Any, loaded: dict[str, Any]) -> list[str]:
    """What of template, vocabulary and special tokens did not arrive."""
    failures = []
    if (template := _template(tokenizer)) and template != loaded["chat_template"]:
        failures.append("the chat template in the file is not the model's own")
    size = checkpoint.config.get_text_config(decoder=True).vocab_size
    if loaded["vocabulary"] != size:
        failures.append(f"the file has {loaded['vocabulary']} tokens, the model {size}")
    if tokenizer.bos_token_id is not None and loaded["bos"] != tokenizer.bos_token_id:
        failures.append(f"the engine begins with token {loaded['bos']}, the model with {tokenizer.bos_token_id}")
    endless = sorted(ends_of(checkpoint) - set(loaded["ends"]))
    if endless:
        failures.append(f"the engine does not stop at token {endless[0]}, at which the model ends")
    return failures


def ends_of(checkpoint: Checkpoint) -> set[int]:
    """The tokens at which generation ends: those of generation_config.json, else those of the config."""
    file = checkpoint.path / "generation_config.json"
    stated = json.loads(file.read_text(encoding="utf-8")).get("eos_token_id") if file.is_file() else None
    ends = stated if stated is not None else checkpoint.config.get_text_config(decoder=True).eos_token_id
    return set() if ends is None else {ends} if isinstance(ends, int) else set(ends)


def _first_difference(own: list[int], theirs: list[int]) -> int:
    return next((i for i, (a, b) in enumerate(zip(own, theirs, strict=False)) if a != b), min(len(own), len(theirs)))
