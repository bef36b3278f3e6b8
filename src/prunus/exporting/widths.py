"""Whether a model's shapes fit an engine and a GGUF type, from its skeleton alone: before any weight is read.

A quantized row is cut into blocks of 32 weights, or 256 in the K-quants. llama.cpp writes what does not fit as another
type without an error; here that is refused, or said by name beforehand.
"""

from prunus.checkpoint import Checkpoint
from prunus.checkpoint.per_layer import layer_fields
from prunus.errors import UserError
from prunus.exporting.gguf_types import BLOCK, GgufType
from prunus.models.limits import head_size
from prunus.models.spec import ModelSpec

DERIVES_HEADS = ("qwen2",)  # families whose models in vLLM 0.32 and llama.cpp do not read head_dim


def check_uniform(checkpoint: Checkpoint, engine: str) -> None:
    """Refuse layers that differ: engines read one width of each kind, and one kind of layer, for all."""
    if layer_fields(checkpoint.config) is not None:
        raise UserError(
            f"the layers of {checkpoint.path} differ, and {engine} reads one width of each kind for all of them; "
            "shrink without --per-layer, --attention and --mlp."
        )


def check_head_width(checkpoint: Checkpoint, engine: str) -> None:
    """Refuse heads whose width the engine takes to be the hidden width over their number, where it is another."""
    text = checkpoint.config.get_text_config(decoder=True)
    heads, width, hidden = text.num_attention_heads, head_size(checkpoint.config), text.hidden_size
    if text.model_type in DERIVES_HEADS and width * heads != hidden:
        raise UserError(
            f"the {heads} heads of {checkpoint.path} are {width} wide, and {engine} takes a head of {text.model_type} "
            f"to be {hidden} / {heads}: cut layers or the FFN in place of heads, or export to onnx or openvino."
        )


def check_widths(spec: ModelSpec, hidden_size: int, kind: GgufType) -> list[str]:
    """Notes on matrices that will fall back to another type. Raises UserError for rows that no quantized type takes."""
    if kind.rows == 1:
        return []
    rows = {"the embedding": hidden_size} | {linear.projection: linear.shape[1] for _, linear in spec.matrices}
    for name, width in rows.items():
        if width % BLOCK:
            raise UserError(
                f"rows of {name} have {width} weights, and {kind.name} needs a multiple of {BLOCK}: shrink to "
                f"{' or '.join(map(str, _nearest(width, BLOCK)))} instead, or export to gguf:f16."
            )
    return [_note(width, rows, kind) for width in sorted(set(rows.values())) if width % kind.rows]


def _note(width: int, rows: dict[str, int], kind: GgufType) -> str:
    names = ", ".join(name for name, own in rows.items() if own == width)
    return (
        f"rows of {width} weights are no multiple of {kind.rows}: llama.cpp writes {names} as {kind.fallback}, or "
        f"wider, instead of {kind.name}; a width of {' or '.join(map(str, _nearest(width, kind.rows)))} would avoid it."
    )


def _nearest(width: int, multiple: int) -> list[int]:
    """The multiples around a width, without zero."""
    below = width // multiple * multiple
    return [value for value in (below, below + multiple) if value]
