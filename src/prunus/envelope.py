"""The quality envelope of a recipe: how far a round may move from the dense model before the recipe stops.

envelope: {kl: 0.3, perplexity: 1.15x}    # nats per token; 1.15 times the dense model's, or a number of its own
"""

import math
from dataclasses import dataclass
from typing import Any

from prunus.errors import UserError

KEYS = ("kl", "perplexity")


@dataclass(frozen=True, slots=True)
class Envelope:
    """Upper limits; None: not limited. `perplexity_ratio` is times the dense model's."""

    kl: float | None = None
    perplexity: float | None = None
    perplexity_ratio: float | None = None

    def left_by(self, results: list[dict[str, Any]]) -> list[str]:
        """What an evaluation says against the model, in words; nothing: it is within."""
        said = []
        for result in results:
            if result["kind"] == "perplexity" and (against := result.get("against")):
                said += self._beyond("KL", against["kl"], self.kl, result)
                said += self._beyond("perplexity", result["perplexity"], self.perplexity, result)
                if self.perplexity_ratio is not None:
                    limit = self.perplexity_ratio * against["perplexity"]
                    said += self._beyond("perplexity", result["perplexity"], limit, result)
        return said

    def _beyond(self, name: str, value: float, limit: float | None, result: dict[str, Any]) -> list[str]:
        if limit is None or value <= limit:
            return []
        return [f"{name} {value:.4g} on {result['dataset']} is over {limit:.4g}"]


def parse_envelope(content: Any) -> Envelope:
    """Read the envelope of a recipe. Raises UserError: what was given, what is allowed."""
    if not isinstance(content, dict) or not content or set(content) - set(KEYS):
        raise UserError(f"envelope={content!r}: write it like {{kl: 0.3, perplexity: 1.15x}}, one of them at least.")
    kl = _number("kl", content["kl"]) if "kl" in content else None
    wish = content.get("perplexity")
    if isinstance(wish, str) and wish.endswith("x"):
        return Envelope(kl=kl, perplexity_ratio=_number("perplexity", wish[:-1]))
    return Envelope(kl=kl, perplexity=None if wish is None else _number("perplexity", wish))


def _number(name: str, value: Any) -> float:
    try:
        number = float(value) if not isinstance(value, bool) else math.nan
    except (TypeError, ValueError):
        number = math.nan
    if not number > 0 or not math.isfinite(number):
        raise UserError(f"envelope: {name}={value!r} is no positive number; write kl: 0.3 or perplexity: 1.15x.")
    return number
