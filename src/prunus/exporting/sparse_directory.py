"""Packed models: a model directory whose matrices are stored, and multiplied by, without most of their zeros.

One matrix is in memory at a time, and the tensors of the weight file that is being written: one for each block, as of
every directory that prunus writes. Embedding, norms and experts are stored as they are, in bfloat16.
"""

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from shutil import copyfile
from typing import Any

import torch
from torch import Tensor
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from prunus.checkpoint import open_checkpoint
from prunus.checkpoint.directory import CONFIG_NAME, INDEX_NAME, read_raw_config
from prunus.checkpoint.output import write_tensors
from prunus.checkpoint.record import write_json
from prunus.checkpoint.shards import Shards
from prunus.engines import SPARSE_CPU
from prunus.errors import UserError
from prunus.exporting.formats import Conversion, Format
from prunus.exporting.types import FileType
from prunus.models import StreamedModel
from prunus.models.axes import shapes_of
from prunus.models.configs import edited_config, with_dtype
from prunus.models.footprint import footprint
from prunus.models.spec import LinearSpec
from prunus.runtime import LAYOUTS, TYPES
from prunus.runtime.choose import pack_cheapest
from prunus.runtime.entry import BIAS, SCALE, Entry, packing
from prunus.runtime.native import kernels

SPARSE_TYPES = {
    one.name: one
    for one in (
        FileType(name="bf16", bits=16, kl=1e-2, nll=0.02),
        FileType(name="int8", bits=8, kl=5e-2, nll=0.05),
    )
}
OTHERS = torch.bfloat16  # everything that is not packed


@dataclass(frozen=True, slots=True)
class Source:
    """One matrix to be packed: its module, where its weight and bias come from, and whether they go when it is."""

    module: str
    weight: str  # parameter names
    bias: str | None
    linear: LinearSpec
    moves: bool = True  # False: of an embedding, which stays beside the packed head


@dataclass
class Packer:
    """Packs one model's tensors; `entries` fill up as it does."""

    model: StreamedModel
    type: str
    entries: dict[str, Entry] = field(default_factory=dict)

    @cached_property
    def sources(self) -> list[Source]:
        """Every matrix of the blocks that is no expert, and the output head."""
        spec = self.model.spec
        blocks = [(block, linear) for block, linear in spec.matrices if linear.expert is None]
        if spec.head is not None:
            blocks += [(spec.head, linear) for linear in spec.head.linears]
        found = [
            Source(block.full_name(one), block.full_parameter(one), one.bias and block.full(one.bias), one)
            for block, one in blocks
        ]
        return [*found, *([self._copy_of_embedding()] if self.copies_head else [])]

    @property
    def copies_head(self) -> bool:
        """Whether a tied head gets weights of its own: there is no embedding in int8, and none that is packed."""
        return self.model.spec.head is None and self.type == "int8"

    def _copy_of_embedding(self) -> Source:
        (embedding,) = self.model.input_embeddings
        head, *others = self.model.output_head
        shape = shapes_of(self.model.config)[embedding]
        linear = LinearSpec(name="", parameter="", shape=(shape[0], shape[1]))
        bias = next((name for name in others if name.endswith(f".{BIAS}")), None)
        return Source(head.removesuffix(".weight"), embedding, bias, linear, moves=False)

    @cached_property
    def by_key(self) -> dict[str, Source]:
        """The checkpoint's name of each weight that is packed, and its source."""
        return {self.model.names.keys_of([source.weight])[0]: source for source in self.sources}

    @cached_property
    def replaced(self) -> set[str]:
        """The checkpoint's tensors that are not written under their own names."""
        weights = [source.weight for source in self.sources if source.moves]
        keys = self.model.names.keys_of([*weights, *(source.bias for source in self.sources if source.bias)])
        return {*keys, *(f"{source.module}.weight" for source in self.sources)}

    def tensors(self, keys: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        """What is written for some of the checkpoint's tensors, one matrix in memory at a time."""
        for key in keys:
            if key in self.by_key:
                yield from self._packed(self.by_key[key])
            if key not in self.replaced:
                tensor = self.model.checkpoint.read(key)
                yield key, tensor.to(OTHERS) if tensor.is_floating_point() else tensor

    def _packed(self, source: Source) -> Iterator[tuple[str, Tensor]]:
        names, read = self.model.names, self.model.checkpoint.read
        packed = pack_cheapest(source.linear.view(names.load([source.weight], read)[source.weight]), TYPES[self.type])
        biased, transposed = source.bias is not None, source.linear.transposed
        self.entries[source.module] = Entry.of(packed, bias=biased, transposed=transposed)
        yield from ((f"{source.module}.{part}", tensor) for part, tensor in packed.parts.items())
        if packed.scale_O is not None:
            yield f"{source.module}.{SCALE}", packed.scale_O
        if source.bias:
            yield f"{source.module}.{BIAS}", names.load([source.bias], read)[source.bias].to(OTHERS)

    def config(self) -> dict[str, Any]:
        """The content of config.json, once everything is packed."""
        raw, config = read_raw_config(self.model.checkpoint.path), self.model.config
        untied = edited_config(raw, config, {"tie_word_embeddings": False}) if self.copies_head else raw
        return {**with_dtype(untied, OTHERS), "quantization_config": packing(self.entries)}


def _check(model: StreamedModel, kind: FileType) -> list[str]:
    """Notes on what is not packed. Raises UserError where nothing is, or transformers alone does not know the model."""
    config, packer = model.config, Packer(model, kind.name)
    if getattr(config, "auto_map", None) and config.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise UserError(f"{model.checkpoint.path} needs code of its own, which {SPARSE_CPU.name} does not run.")
    if not packer.sources:
        raise UserError(f"{model.checkpoint.path} has no matrix that could be packed: all of them are experts.")
    notes = []
    if experts := sum(linear.expert is not None for _, linear in model.spec.matrices):
        notes.append(
            f"{experts} matrices of experts stay as they are: they are not packed, and zeros in them are read."
        )
    if packer.copies_head:
        notes.append("the output head is tied to the embedding: it gets int8 weights of its own, the embedding stays.")
    elif model.spec.head is None:
        notes.append("the output head is tied to the embedding: it stays bfloat16, and torch multiplies by it.")
    native = kernels()
    if native is not None and not native.expands:
        notes.append(
            f"this processor ({native.level}) unpacks zeros that lie anywhere more slowly than it reads dense weights; "
            "one with AVX-512 VBMI2 reads the same directory fast, and 2:4 and tiles are fast on both."
        )
    return notes


def _size(model: StreamedModel, kind: FileType) -> int:
    """At most: every matrix in the layout that leaves nothing out."""
    packer, itemsize = Packer(model, kind.name), TYPES[kind.name].itemsize
    matrices = sum((source.linear.shape[0] + 16) * (source.linear.shape[1] + 8) * itemsize for source in packer.sources)
    others = [info for key, info in model.checkpoint.tensors.items() if key not in packer.replaced]
    return matrices + sum(info.num_elements * OTHERS.itemsize for info in others)


def _write(job: Conversion) -> Path:
    model = StreamedModel(job.checkpoint, dtype=torch.float32)
    packer, shards = Packer(model, job.kind.name), Shards(model)
    blocks = {shards.of_block(index): keys for index, keys in enumerate(model.block_keys())}
    index: dict[str, str] = {}
    total = 0
    for file, keys in {**shards.outer, **blocks}.items():
        tensors = dict(packer.tensors(keys))
        write_tensors(job.folder / file, tensors)
        index |= dict.fromkeys(tensors, file)
        total += sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    for side in job.checkpoint.side_files:
        copyfile(side, job.folder / side.name)
    write_json(job.folder / CONFIG_NAME, packer.config())
    write_json(job.folder / INDEX_NAME, {"metadata": {"total_size": total}, "weight_map": dict(sorted(index.items()))})
    return job.folder


def _describe(folder: Path) -> dict[str, Any]:
    checkpoint = open_checkpoint(folder)
    model = StreamedModel(checkpoint, dtype=torch.float32)
    weight = footprint(model, shapes_of(model.config), model.config)
    matrices = [_row(name, entry, checkpoint.tensors[name].num_bytes) for name, entry in checkpoint.packed.items()]
    others = [
        str(info.dtype).removeprefix("torch.")
        for name, info in checkpoint.tensors.items()
        if name not in checkpoint.packed
    ]
    layouts = {name: _sum(matrices, name) for name in LAYOUTS}
    return {
        "tensors": dict(Counter([*(f"{row['layout']} {row['type']}" for row in matrices), *others])),
        "parameters": weight.parameters,
        "decode_bytes_per_token": weight.decode_bytes,
        "layouts": layouts,
        "coverage": _coverage(matrices, weight.decode_bytes),
        "matrices": matrices,
    }


def _row(name: str, entry: Entry, num_bytes: int) -> dict[str, Any]:
    """What the record says of one matrix; `bytes_dense` is what it would take in its type with all its zeros."""
    return {
        "name": name.removesuffix(".weight"),
        "shape": [entry.rows, entry.columns],
        "layout": entry.layout,
        "type": entry.type,
        "bytes": num_bytes,
        "bytes_dense": entry.rows * entry.columns * entry.dtype.itemsize
        + (4 * entry.rows if entry.type == "int8" else 0),
    }


def _sum(matrices: list[dict[str, Any]], layout: str) -> dict[str, int]:
    rows = [row for row in matrices if row["layout"] == layout]
    return {"matrices": len(rows)} | {name: sum(row[name] for row in rows) for name in ("bytes", "bytes_dense")}


def _coverage(matrices: list[dict[str, Any]], decode_bytes: int) -> dict[str, float]:
    """The share of the bytes that a decoded token reads which goes through kernels of ours, and through sparse ones."""
    sparse = sum(row["bytes"] for row in matrices if row["layout"] != "dense")
    return {"packed": sum(row["bytes"] for row in matrices) / decode_bytes, "sparse": sparse / decode_bytes}


SPARSE_DIRECTORY = Format(
    name="sparse",
    engine=SPARSE_CPU,
    types=SPARSE_TYPES,
    default="bf16",
    check=_check,
    write=_write,
    describe=_describe,
    size=_size,
)
