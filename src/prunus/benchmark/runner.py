"""What is timed: one loaded model, whatever the engine."""

from dataclasses import dataclass
from typing import Any, Protocol


@dataclass(frozen=True, slots=True)
class Times:
    """One generation, in seconds: the prompt's forward, request to first token, every later token."""

    prefill: float
    first_token: float
    steps: list[float]


class Runner(Protocol):
    """One loaded model that can be timed. `vocabulary` is the number of its token ids."""

    vocabulary: int

    def generate(self, prompt: list[int], new_tokens: int) -> Times:
        """Generate exactly `new_tokens` greedy tokens, end-of-sequence or not, and time each part of it."""
        ...

    def generate_together(self, prompts: list[list[int]], new_tokens: int) -> list[Times]:
        """The same for requests that all come at once; `first_token` and `prefill` count from then."""
        ...

    def sizes(self) -> dict[str, Any]:
        """path, bytes_on_disk, parameters, decode_bytes_per_token, and what is known of peak memory."""
        ...
