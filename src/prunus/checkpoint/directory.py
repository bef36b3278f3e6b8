"""Find, validate and lazily read a Hugging Face model directory.

Everything that can be wrong with a directory is found from its file headers, before any weight is read.
"""

import hashlib
import json
import re
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoConfig, PretrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from prunus.checkpoint.compressed_tensors import decoded, parts_of, quantized_names, scheme_of, shape_of
from prunus.checkpoint.packed import as_whole, matrices_of, whole_matrix
from prunus.checkpoint.per_layer import MODEL_TYPE, check_layers, unwrapped
from prunus.errors import UserError
from prunus.quantizing import Scheme
from prunus.runtime.entry import Entry

CONFIG_NAME = "config.json"
INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
HUB_FILES = ["*.json", "*.safetensors", "*.jinja", "*.txt", "*.model", "*.py", "LICENSE*"]
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
CODES = {"I8": torch.int8, "F8_E4M3": torch.float8_e4m3fn}  # of quantized weights alone


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where one tensor lies, known from the file header alone; shape and dtype of a quantized one are as it is read."""

    file: Path
    shape: tuple[int, ...]
    dtype: torch.dtype
    stored_bytes: int | None = None  # of a quantized one, all its parts

    @property
    def num_elements(self) -> int:
        return int(torch.Size(self.shape).numel())

    @property
    def num_bytes(self) -> int:
        """On disk."""
        return self.num_elements * self.dtype.itemsize if self.stored_bytes is None else self.stored_bytes


@dataclass(frozen=True)
class Checkpoint:
    """A model directory that passed every check that needs no weights.

    A quantized one (`scheme`), and a packed one (`packed`, by the name of each matrix), are read as the ordinary model
    that they stand for: `parts` are the tensors that are in the files.
    """

    path: Path
    config: PretrainedConfig
    tensors: dict[str, TensorInfo]
    trust_remote_code: bool = False
    scheme: Scheme | None = None
    parts: dict[str, TensorInfo] = field(default_factory=dict)
    packed: dict[str, Entry] = field(default_factory=dict)

    @property
    def num_parameters(self) -> int:
        return sum(info.num_elements for info in self.tensors.values())

    @property
    def num_bytes(self) -> int:
        return sum(info.num_bytes for info in self.tensors.values())

    def read(self, name: str) -> Tensor:
        """Return one tensor, in memory of its own. Raises UserError naming it when it holds NaN or Inf."""
        info = self.tensors[name]
        if name in self.packed:
            tensor = whole_matrix(name, self.packed[name], lambda part: _read(self.parts[part].file, part))
        elif self.scheme is not None and info.stored_bytes is not None:
            tensor = decoded(name, info.shape, self.scheme, lambda part: _read(self.parts[part].file, part))
        else:
            tensor = _read(info.file, name)
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise UserError(f"tensor {name} in {info.file} holds NaN or Inf; repair the checkpoint.")
        return tensor

    @cached_property
    def sha256(self) -> str:
        """Hash of the config and of every weight file, byte for byte."""
        digest = hashlib.sha256((self.path / CONFIG_NAME).read_bytes())
        for file in sorted({info.file for info in self.tensors.values()}):
            with file.open("rb") as stream:
                digest.update(hashlib.file_digest(stream, "sha256").digest())
        return digest.hexdigest()

    @property
    def side_files(self) -> list[Path]:
        """Tokenizer, chat template, generation config, license: what goes along unchanged."""
        ours = {INDEX_NAME, SINGLE_NAME, "prunus.json"}
        kept = {".json", ".jinja", ".txt", ".model", ".py", ".md"}
        files = (p for p in self.path.iterdir() if p.is_file() and p.name not in ours)
        return sorted(p for p in files if p.suffix in kept or p.name.startswith("LICENSE"))


def open_checkpoint(model: str | Path, *, trust_remote_code: bool = False) -> Checkpoint:
    """Open a local model directory or a hub name.

    Raises UserError, in one sentence, for anything that is not a readable causal language model checkpoint.
    """
    path = _locate(str(model))
    config, quantization = _read_config(path, trust_remote_code)
    packed = matrices_of(quantization)
    scheme = scheme_of(quantization, path) if quantization and not packed else None
    tensors = {name: info for file in _weight_files(path) for name, info in read_header(file).items()}
    _check_index(path, tensors)
    if packed:
        return Checkpoint(path, config, as_whole(tensors, packed), trust_remote_code, parts=tensors, packed=packed)
    if scheme is None:
        _check_dtypes(tensors)
        return Checkpoint(path, config, tensors, trust_remote_code)
    return Checkpoint(path, config, _whole_matrices(tensors, scheme), trust_remote_code, scheme, tensors)


def open_dense(model: str | Path, *, trust_remote_code: bool = False) -> Checkpoint:
    """The same, for what changes weights. Raises UserError for a quantized or packed model too."""
    checkpoint = open_checkpoint(model, trust_remote_code=trust_remote_code)
    refuse_packed(checkpoint)
    if checkpoint.scheme is not None:
        raise UserError(
            f"{checkpoint.path} is quantized ({checkpoint.scheme.name}), and its full-precision weights are gone: "
            "prune and recover the model it was made from, then quantize."
        )
    return checkpoint


def refuse_packed(checkpoint: Checkpoint) -> None:
    """Raises UserError for what an engine of prunus alone reads."""
    if checkpoint.packed:
        raise UserError(
            f"{checkpoint.path} is packed already, for the engine sparse-cpu: take the run that it was exported from."
        )


def _locate(model: str) -> Path:
    path = Path(model).expanduser()
    if path.is_dir():
        return path.resolve()
    if path.exists():
        raise UserError(f"{model} is a file, not a model directory; give the directory that holds config.json.")
    if not HUB_NAME.fullmatch(model) or model.startswith("."):
        raise UserError(f"no such path: {model}; give a local model directory or a hub name such as org/model.")
    return _download(model)


def _download(name: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=HUB_FILES))
    except Exception as error:  # the hub client raises a dozen unrelated types for "not there" and "no network"
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"{name} is neither a local directory nor a model the hub would give ({reason}); check the name, the "
            "network and, for gated models, `hf auth login`."
        ) from error


def _read(file: Path, name: str) -> Tensor:
    with safe_open(file, framework="pt") as opened:
        tensor: Tensor = opened.get_tensor(name).clone()  # the clone lets go of mapped pages, which count as resident
    return tensor


def _whole_matrices(tensors: dict[str, TensorInfo], scheme: Scheme) -> dict[str, TensorInfo]:
    """The tensors as they are read: in place of its parts, each quantized matrix. Raises UserError for a lost part."""
    found = dict(tensors)
    shapes = {name: info.shape for name, info in tensors.items()}
    for name in quantized_names(tensors):
        parts = parts_of(name, scheme)
        if lost := [part for part in parts if part not in tensors]:
            raise UserError(f"tensor {lost[0]} of {name} is missing from {tensors[parts[1]].file}; download it again.")
        shape = shape_of(name, scheme, shapes, lambda part: _read(tensors[part].file, part))
        stored = sum(found.pop(part).num_bytes for part in parts)
        found[name] = TensorInfo(tensors[parts[0]].file, shape, torch.float32, stored)
    return found


def _check_dtypes(tensors: dict[str, TensorInfo]) -> None:
    for name, info in tensors.items():
        if info.dtype in CODES.values():
            raise UserError(f"tensor {name} in {info.file} has dtype {info.dtype}; allowed are {', '.join(DTYPES)}.")


def _read_config(path: Path, trust_remote_code: bool) -> tuple[PretrainedConfig, Any]:
    """The model's config without its `quantization_config`, and that, unchecked."""
    file, stored = path / CONFIG_NAME, _stored_config(path)
    raw = unwrapped(stored, file)
    model_type = raw.get("model_type")
    native = model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES  # transformers prefers its own class then, and so do we
    if raw.get("auto_map") and not native and not trust_remote_code:
        raise UserError(
            f"{path} needs code of its own to load (auto_map in config.json); read that code, then allow it with "
            "--trust-remote-code."
        )
    quantization = raw.get("quantization_config")
    try:
        if stored.get("model_type") != MODEL_TYPE:
            config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
            vars(config).pop("quantization_config", None)
            return config, quantization
        config = CONFIG_MAPPING[model_type].from_dict(raw)
    except (ValueError, KeyError, OSError) as error:
        raise UserError(f"unsupported architecture {model_type!r} in {file}; see `prunus models`.") from error
    check_layers(config, file)
    return config, quantization


def read_raw_config(path: Path) -> dict[str, Any]:
    """What config.json says of the model, unchecked. Raises UserError where there is none or it is damaged."""
    return unwrapped(_stored_config(path), path / CONFIG_NAME)


def _stored_config(path: Path) -> dict[str, Any]:
    file = path / CONFIG_NAME
    if not file.is_file():
        raise UserError(f"{path} is not a model directory: it has no config.json.")
    try:
        stored = json.loads(file.read_text(encoding="utf-8"))
        return dict(stored.items())
    except (ValueError, AttributeError) as error:
        raise UserError(f"{file} is not a JSON object ({error}); restore it from the original model.") from error


def _weight_files(path: Path) -> list[Path]:
    index = path / INDEX_NAME
    if index.is_file():
        names = sorted(set(_weight_map(index).values()))
        missing = [name for name in names if not (path / name).is_file()]
        if missing:
            raise UserError(f"shard {missing[0]} is missing from {path}; download it again.")
        return [path / name for name in names]
    if (path / SINGLE_NAME).is_file():
        return [path / SINGLE_NAME]
    if any(path.glob("*.bin")) or any(path.glob("*.pt")) or any(path.glob("*.pth")):
        raise UserError(
            f"{path} holds only pickle weights, which can run code when opened; convert them where you trust them: "
            "AutoModelForCausalLM.from_pretrained(path).save_pretrained(new_path)."
        )
    raise UserError(f"{path} holds no weights: neither {SINGLE_NAME} nor {INDEX_NAME}.")


def _weight_map(index: Path) -> dict[str, str]:
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{index} is not a safetensors index ({error}); download it again.") from error
    outside = [name for name in weight_map.values() if Path(name).name != name]
    if outside:
        raise UserError(f"{index} names a file outside its directory ({outside[0]}); download it again.")
    return dict(weight_map)


def read_header(file: Path) -> dict[str, TensorInfo]:
    """What a weight file holds, by tensor name. Raises UserError when it is corrupt."""
    try:
        with safe_open(file, framework="pt") as opened:
            slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118 not a dict
            headers = {name: (tuple(s.get_shape()), s.get_dtype()) for name, s in slices.items()}
    except (SafetensorError, OSError) as error:
        raise UserError(f"weight file {file} is corrupt or truncated ({error}); download it again.") from error
    for name, (_, dtype) in headers.items():
        if dtype not in DTYPES | CODES:
            raise UserError(f"tensor {name} in {file} has dtype {dtype}; allowed are {', '.join(DTYPES)}.")
    return {name: TensorInfo(file, shape, (DTYPES | CODES)[dtype]) for name, (shape, dtype) in headers.items()}


def _check_index(path: Path, tensors: dict[str, TensorInfo]) -> None:
    index = path / INDEX_NAME
    if index.is_file() and (absent := set(_weight_map(index)) - set(tensors)):
        raise UserError(f"tensor {sorted(absent)[0]} is in {index.name} but in no shard of {path}; download it again.")
