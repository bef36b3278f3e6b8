"""What a GGUF file holds, read off its header."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gguf import GGUFReader

SAMPLING = "general.sampling."
EMBEDDING, HEAD = "token_embd.weight", "output.weight"


@dataclass(frozen=True, slots=True)
class GgufContent:
    """How many tensors there are of each type, all parameters, and the bytes that one decoded token reads.

    `decode_bytes`: every weight once; of an embedding that is not the output head too, one row.
    """

    types: dict[str, int]
    parameters: int
    decode_bytes: int


def read_sampling(file: Path) -> dict[str, float | int]:
    """What the header says of sampling, by its keys."""
    fields: dict[str, Any] = GGUFReader(file).fields
    return {key: field.contents() for key, field in fields.items() if key.startswith(SAMPLING)}


def read_gguf(file: Path) -> GgufContent:
    """Read the header; the tensors stay on disk."""
    tensors: list[Any] = GGUFReader(file).tensors
    types: dict[str, int] = {}
    for tensor in tensors:
        name = tensor.tensor_type.name.lower()
        types[name] = types.get(name, 0) + 1
    sizes = {tensor.name: int(tensor.n_bytes) for tensor in tensors}
    lookup = sizes.get(EMBEDDING, 0) if HEAD in sizes else 0
    rows = next((int(tensor.shape[1]) for tensor in tensors if tensor.name == EMBEDDING), 1)
    parameters = sum(int(tensor.n_elements) for tensor in tensors)
    return GgufContent(types, parameters, sum(sizes.values()) - lookup + lookup // rows)
