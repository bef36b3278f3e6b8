"""What both models of a benchmark are asked: token ids, how many tokens after them, how often, how many at once."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from prunus.benchmark.prompts import Prompt
from prunus.errors import UserError

RANDOM = "random"
SEED = 0


@dataclass(frozen=True, slots=True)
class Request:
    """One request of a mix. Exactly `new_tokens` are written, whatever they are."""

    mix: str
    prompt: list[int]
    new_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """All of it. `fixed` are requests made of prompts; without them there is one of random tokens.

    `concurrency`: numbers of requests at the same time; one is always measured, and alone.
    """

    prompt_tokens: int
    new_tokens: int
    repetitions: int
    concurrency: Sequence[int] = (1,)
    fixed: Sequence[Request] = ()

    def requests(self, vocabulary: int) -> list[Request]:
        if self.fixed:
            return list(self.fixed)
        return [random_request(vocabulary, prompt_tokens=self.prompt_tokens, new_tokens=self.new_tokens, seed=SEED)]

    @property
    def prompt(self) -> str:
        """What the prompts are, in words."""
        return f"{len(self.fixed)} prompts" if self.fixed else f"uniform random token ids, seed {SEED}"

    @property
    def levels(self) -> list[int]:
        return sorted({level for level in self.concurrency if level > 1})

    @property
    def longest(self) -> int:
        """Tokens of the longest request, the new ones included."""
        return max(len(one.prompt) + one.new_tokens for one in self.requests(1))

    def check(self, threads: int) -> None:
        """Raise UserError for a count below the least that can be measured."""
        least = {"prompt_tokens": (self.prompt_tokens, 1), "new_tokens": (self.new_tokens, 2)}
        least |= {"repetitions": (self.repetitions, 1), "threads": (threads, 1)}
        least |= {"concurrency": (min(self.concurrency, default=0), 1)}
        for name, (given, minimum) in least.items():
            if given < minimum:
                raise UserError(f"{name} is {given}: give a whole number of at least {minimum}")

    def check_fits(self, name: str, longest: int | None) -> None:
        """Raise UserError when a model cannot read that many tokens."""
        most = max(self.requests(1), key=lambda one: len(one.prompt) + one.new_tokens)
        if longest is not None and self.longest > longest:
            raise UserError(
                f"{len(most.prompt)} prompt and {most.new_tokens} new tokens are {self.longest}, and {name} reads at "
                f"most {longest}: ask for fewer"
            )


def random_request(vocabulary: int, *, prompt_tokens: int, new_tokens: int, seed: int) -> Request:
    """Uniform random token ids: the time of a dense forward does not depend on the text."""
    return Request(RANDOM, random.Random(seed).choices(range(vocabulary), k=prompt_tokens), new_tokens)


def tokenised(prompts: Sequence[Prompt], tokenizer: Any, *, prompt_tokens: int, new_tokens: int) -> list[Request]:
    """The prompts as this tokenizer reads them; a long context is cut to `prompt_tokens`."""
    found = []
    for one in prompts:
        ids = tokenizer(one.text, return_attention_mask=False, verbose=False)["input_ids"]
        found.append(Request(one.mix, ids if one.whole else ids[:prompt_tokens], one.new_tokens or new_tokens))
    return found


def check_same(model: Sequence[Request], dense: Sequence[Request], against: str) -> None:
    """Raise UserError where the dense model reads the prompts as other tokens: the two would do different work."""
    if list(model) != list(dense):
        raise UserError(
            f"{against} cuts the prompts into other tokens than the model does, so no pair would do the same work; "
            "compare models of one tokenizer, or leave the prompts out: random tokens are then of each vocabulary."
        )


def sizes_in_words(sizes: Sequence[int]) -> int | str:
    """One number where all are the same."""
    return sizes[0] if len(set(sizes)) == 1 else f"{min(sizes)} to {max(sizes)}"
