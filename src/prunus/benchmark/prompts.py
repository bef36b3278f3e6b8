"""The prompts of a benchmark as text: mixes that come with prunus, and files of the user's own.

A file is text with one prompt a line, or .jsonl with one object a line: "prompt", and where wanted "new_tokens" (else
those of the command) and "mix" (the name under which its times are put together, else that of the file).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prunus.errors import UserError
from prunus.text.sources import TextSource, decode_file, json_rows, read_text

KEYS = ("prompt", "new_tokens", "mix")


@dataclass(frozen=True, slots=True)
class Prompt:
    """`new_tokens` None: as many as the command says. `whole` False: the text is cut to the prompt tokens it says."""

    mix: str
    text: str
    new_tokens: int | None = None
    whole: bool = True


def _long_context() -> tuple[Prompt, ...]:
    return (Prompt("long-context", read_text(TextSource("builtin"), None), whole=False),)


SHORT = (
    "Turn off the light in the kitchen.",
    "Set a timer for twelve minutes.",
    "What is 17 times 23?",
    "Add milk, bread and two lemons to the shopping list.",
)
LONG_QUESTIONS = (
    "I keep bees behind a small orchard of cherries and plums. Last spring one of my two hives was full of life in "
    "March and nearly empty by the middle of May, while the other one, three steps away from it, grew as it always "
    "does. I fed both of them the same sugar water, I treated both against mites in the autumn, and neither was opened "
    "on a cold day. What may have happened to the first hive, in which order would you check the possible causes, and "
    "what should I look for on the frames and in front of the entrance to tell them apart?",
    "Our choir sings in a church with a long echo, and the conductor wants to record a concert with two microphones "
    "and one small recorder. We own a pair of cardioid microphones and two stands that reach three metres. The organ "
    "is behind the audience, the choir in front, and between them there are about two hundred people. Where would you "
    "put the microphones and at which angle, how loud should the loudest passage be on the recorder, and how can we "
    "find out during the rehearsal, when the church is empty, whether the recording will be clear when it is full?",
)
MIXES: dict[str, Callable[[], tuple[Prompt, ...]]] = {
    "short": lambda: tuple(Prompt("short", text) for text in SHORT),
    "long-question": lambda: tuple(Prompt("long-question", text) for text in LONG_QUESTIONS),
    "long-context": _long_context,
}


def chosen_prompts(file: str | None, mixes: Sequence[str]) -> list[Prompt]:
    """The prompts of the named mixes and of the file; none when neither is given. UserError for a file without any."""
    found = [prompt for name in mixes for prompt in MIXES[name]()]
    return found + (read_prompts(Path(file)) if file is not None else [])


def read_prompts(path: Path) -> list[Prompt]:
    """The prompts of a file. Raises UserError, with the line, for what is no prompt."""
    if not path.is_file():
        raise UserError(
            f"{path} is no file: give a text file with one prompt a line, or .jsonl with a 'prompt' a line."
        )
    content = decode_file(path)
    if path.suffix == ".jsonl":
        found = [_prompt(row, path, number) for number, row in json_rows(content, path)]
    else:
        found = [Prompt(path.stem, line.strip()) for line in content.splitlines() if line.strip()]
    if not found:
        raise UserError(f"{path} holds no prompt: write one a line.")
    return found


def _prompt(row: dict[str, Any], path: Path, number: int) -> Prompt:
    text, new_tokens, mix = row.get("prompt"), row.get("new_tokens"), row.get("mix", path.stem)
    if set(row) - set(KEYS) or not isinstance(text, str) or not text.strip() or not isinstance(mix, str):
        raise UserError(
            f"Line {number} of '{path}' has the keys {sorted(row)}: a line needs 'prompt', a text, and may have "
            "'new_tokens', a number, and 'mix', a name."
        )
    if new_tokens is not None and (type(new_tokens) is not int or new_tokens < 2):
        raise UserError(f"Line {number} of '{path}' has new_tokens {new_tokens!r}: give a whole number of at least 2.")
    return Prompt(mix, text, new_tokens)
