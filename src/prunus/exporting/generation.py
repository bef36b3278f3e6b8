"""How a model is meant to be sampled: what of generation_config.json a GGUF file can hold, and what it cannot.

The tokens at which a text ends are elsewhere: the engine itself is asked for those (tokenization.py).
"""

import json
import math
from pathlib import Path
from typing import Any

from gguf.constants import Keys

from prunus.checkpoint import Checkpoint
from prunus.errors import EngineError
from prunus.exporting.gguf_file import read_sampling

FILE = "generation_config.json"
GENERAL = Keys.General
HELD = {
    "temperature": GENERAL.SAMPLING_TEMP,
    "top_k": GENERAL.SAMPLING_TOP_K,
    "top_p": GENERAL.SAMPLING_TOP_P,
    "min_p": GENERAL.SAMPLING_MIN_P,
    "repetition_penalty": GENERAL.SAMPLING_PENALTY_REPEAT,
}
WHOLE_TEXT = -1  # transformers' penalty looks at all of the text, llama.cpp's own default at its last 64 tokens
# What is no wish about sampling, or is looked at where tokens are compared.
OF_TRANSFORMERS = ("do_sample", "transformers_version", "_from_model_config", "use_cache", "cache_implementation")
TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")


def stated(checkpoint: Checkpoint) -> dict[str, Any]:
    """What the model's generation config says of sampling; nothing, where it has none."""
    file = checkpoint.path / FILE
    values = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    wishes = {name: value for name, value in values.items() if value is not None and value is not False}
    return {name: value for name, value in wishes.items() if name not in (*OF_TRANSFORMERS, *TOKENS)}


def for_gguf(checkpoint: Checkpoint) -> dict[str, float | int]:
    """The same by GGUF's keys, as far as GGUF has them."""
    found = {HELD[name]: value for name, value in stated(checkpoint).items() if name in HELD}
    if GENERAL.SAMPLING_PENALTY_REPEAT in found:
        found[GENERAL.SAMPLING_PENALTY_LAST_N] = WHOLE_TEXT
    return found


def left_behind(checkpoint: Checkpoint) -> list[str]:
    """A note on what GGUF has no key for."""
    left = [f"{name}={value}" for name, value in stated(checkpoint).items() if name not in HELD]
    return [f"{FILE} says {', '.join(left)}, which a GGUF file has no place for."] if left else []


def check_carried(checkpoint: Checkpoint, file: Path) -> None:
    """Raise EngineError when the file does not say what the model does; its numbers are float32."""
    wanted = for_gguf(checkpoint)
    found = read_sampling(file) if wanted else {}
    for key, value in wanted.items():
        if key not in found or not math.isclose(found[key], value, rel_tol=1e-6):
            raise EngineError(f"{file.name} says {key}={found.get(key)}, and {FILE} says {value}.")
