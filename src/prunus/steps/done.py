"""Whether a measurement is already in a directory's record, made with the same settings."""

import hashlib
import json
from typing import Any

from prunus.settings import Settings
from prunus.steps.identity import identity

Result = dict[str, Any]

KEY = "settings_key"


def key_of(settings: Settings) -> str:
    text = json.dumps(identity(settings), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def mark(results: list[Result], settings: Settings) -> list[Result]:
    """The results, each with the key of the settings that made it."""
    return [{**result, KEY: key_of(settings)} for result in results]


def done_before(record: dict[str, Any] | None, section: str, settings: Settings) -> list[Result]:
    """Results in the record that were made with these settings, as they were given then; [] when there are none."""
    entries = record.get(section, []) if record else []
    found = [entry for entry in entries if entry.get(KEY) == key_of(settings)]
    return [{name: value for name, value in entry.items() if name != KEY} for entry in found]
