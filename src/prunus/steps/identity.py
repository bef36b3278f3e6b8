"""What decides the content of an output or a measurement: its settings as resolved, and the texts that they name."""

import hashlib
from dataclasses import asdict
from pathlib import Path
from typing import Any

from prunus.settings import Settings, SparsifySettings
from prunus.sparsity import METHODS
from prunus.sparsity.methods import make_options
from prunus.text.sources import parse_source


def identity(settings: Settings) -> dict[str, Any]:
    """The settings with the method's defaults filled in, and the SHA-256 of every local text file they name.

    So an edited text or a default that changed is another step, not one that is already done. What a hub dataset holds
    is not asked here, since that would need the network; the record tells it.
    """
    values = settings.model_dump(mode="json")
    if isinstance(settings, SparsifySettings):
        values["options"] = asdict(make_options(METHODS[settings.method].options, settings.options))
    named = [source for key in ("calibration", "data", "text") for source in values.get(key) or ()]
    files = [Path(source.spec) for text in named if (source := parse_source(text)).kind == "file"]
    single = (values.get(key) for key in ("choices", "keep_zeros", "prompts"))
    files += [Path(value) for value in single if isinstance(value, str)]  # the prompts of evaluate are texts
    return {**values, "files": {str(file): _sha256(file) for file in files if file.is_file()}}


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
