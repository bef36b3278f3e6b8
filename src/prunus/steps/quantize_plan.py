"""What a quantize step will do to every matrix, decided from names and shapes before any weight is read."""

from collections.abc import Mapping
from dataclasses import dataclass

from prunus.checkpoint.compressed_tensors import WEIGHT
from prunus.checkpoint.per_layer import OPENED_BY, layer_fields
from prunus.errors import UserError
from prunus.models import StreamedModel
from prunus.models.sources import Source, find_sources
from prunus.quantizing import SCHEMES, Scheme
from prunus.sparsity import METHODS, Pattern, parse_pattern


@dataclass(frozen=True, slots=True)
class QuantizePlan:
    """The scheme, the pattern of zeros to be chosen with it (None: none), and what the format leaves dense."""

    scheme: Scheme
    pattern: Pattern | None
    keys: frozenset[str]  # the checkpoint's names of the matrices that are quantized
    ignore: list[str]  # modules that stay as they are
    num_bytes: Mapping[str, int]  # of each of the checkpoint's tensors, as it will be written


def make_quantize_plan(model: StreamedModel, scheme: Scheme, pattern: str | None) -> QuantizePlan:
    """Raises UserError for a model that the format cannot hold, or a matrix that scheme or pattern does not fit."""
    check_quantize(model, scheme, pattern)
    resolved = None if pattern is None else METHODS["sparsegpt"].resolve(parse_pattern(pattern))
    keys = frozenset(model.names.keys_of({block.full_parameter(linear) for block, linear in model.spec.matrices}))
    return QuantizePlan(scheme, resolved, keys, _left_dense(model, keys), _num_bytes(model, scheme, keys))


def check_quantize(
    model: StreamedModel,
    scheme: Scheme,
    pattern: str | None,
    shapes: Mapping[str, tuple[int, ...]] | None = None,
) -> None:
    """Raise UserError for a model that the format cannot hold, or a matrix that scheme or pattern does not fit.

    `shapes` are those of the parameters after earlier steps of a recipe, where these make the model smaller; what is
    not there is gone by then.
    """
    _check_format(model, scheme)
    for block, linear in model.spec.matrices:
        name = block.full_parameter(linear)
        if shapes is None or name in shapes:
            rows, width = linear.shape if shapes is None else shapes[name][-2:]
            _check_width(scheme, block.full_name(linear), width)
            if pattern is not None:
                parse_pattern(pattern).check((rows, width), block.full_name(linear))


def _check_format(model: StreamedModel, scheme: Scheme) -> None:
    if layer_fields(model.config) is not None:
        raise UserError(
            f"the layers of {model.checkpoint.path} differ: {OPENED_BY}, so no engine would read it quantized."
        )
    for block, linear in model.spec.matrices:
        keys = model.names.keys_of([block.full_parameter(linear)])
        matrices = all(len(model.checkpoint.tensors[key].shape) == 2 and key.endswith(WEIGHT) for key in keys)
        if linear.transposed or not matrices:
            how = "stores experts fused in one tensor" if linear.expert is not None else "stores matrices transposed"
            raise UserError(
                f"architecture {model.spec.family!r} {how} ({keys[0]}), which compressed-tensors cannot hold; "
                "try a GGUF type: `prunus export MODEL OUT --to gguf:q8_0`."
            )
        if linear.expert is not None and scheme.storage == "int-quantized":
            raise UserError(
                f"architecture {model.spec.family!r} has experts, which transformers cannot load in {scheme.name}; "
                "take int8 or fp8."
            )


def _check_width(scheme: Scheme, name: str, width: int) -> None:
    if not scheme.fits(width):
        fitting = ", ".join(name for name, other in SCHEMES.items() if other.fits(width))
        raise UserError(
            f"{name} has rows of {width} weights, no multiple of the {scheme.group} that share a "
            f"scale in {scheme.name}; schemes that fit: {fitting}."
        )


def sources_of_groups(model: StreamedModel) -> dict[str, Source]:
    """What makes the inputs of a group of matrices and of nothing else, by the full name of each of them."""
    found = find_sources(model.config, trust_remote_code=model.checkpoint.trust_remote_code)
    groups = [
        {block.full_name(linear) for linear in group.linears}
        for block in model.spec.blocks
        for stage in block.stages
        for group in stage.groups
    ]
    return {name: found[name] for names in groups for name in names if name in found and found[name].readers == names}


def _left_dense(model: StreamedModel, keys: frozenset[str]) -> list[str]:
    """Every linear layer that keeps its weights, by the names that transformers and the checkpoint call it."""
    quantized = {block.full_parameter(linear) for block, linear in model.spec.matrices}
    modules = [name for name, parameter in model.linear_layers() if parameter not in quantized]
    embedding = set(model.names.keys_of(model.input_embeddings))
    tensors = model.checkpoint.tensors.items()
    stored = [key for key, info in tensors if len(info.shape) == 2 and key not in keys and key not in embedding]
    return list(dict.fromkeys([*modules, *(key.removesuffix(WEIGHT) for key in stored if key.endswith(WEIGHT))]))


def _num_bytes(model: StreamedModel, scheme: Scheme, keys: frozenset[str]) -> dict[str, int]:
    found = {}
    for key, info in model.checkpoint.tensors.items():
        shape = (info.shape[0], info.shape[-1]) if info.shape else (1, 1)
        found[key] = scheme.num_bytes(shape, info.dtype.itemsize) if key in keys else info.num_bytes
    return found
