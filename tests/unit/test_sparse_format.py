"""docs/sparse-format.md is true: its code reads what prunus packs, its example is what prunus writes."""

import json
import re
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open

from packed_models import save_sparse, write_packed
from prunus.runtime import LAYOUTS, TYPES, pack
from prunus.runtime import unpack as reference
from prunus.runtime.entry import QUANT_METHOD, VERSION, Entry, packing

PAGE = (Path(__file__).parents[2] / "docs" / "sparse-format.md").read_text(encoding="utf-8")
CODE = next(block for block in re.findall(r"^```python\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE) if "def " in block)


def from_page():
    names: dict[str, object] = {}
    exec(compile(CODE, "sparse-format.md", "exec"), names)
    return names["unpack"]


def numpy_parts(packed):
    """As a reader without torch has them."""
    parts = dict(packed.parts)
    weight = parts.pop("weight")
    bits = weight.view(torch.uint16) if weight.dtype == torch.bfloat16 else weight
    return {"weight": bits.numpy(), **{name: part.numpy() for name, part in parts.items()}}


@given(
    rows=st.integers(1, 50),
    columns=st.integers(1, 70),
    density=st.sampled_from([0.0, 0.1, 0.5, 1.0]),
    layout=st.sampled_from(list(LAYOUTS)),
    kind=st.sampled_from(list(TYPES)),
    seed=st.integers(0, 9),
)
def test_the_code_of_the_page_reads_every_matrix(rows, columns, density, layout, kind, seed):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator)
    weight *= torch.rand(rows, columns, generator=generator) < density
    if layout == "2:4":
        weight = weight[:, : columns // 4 * 4].unflatten(1, (-1, 4)) * torch.tensor([1.0, 0, 1, 0])
        weight = weight.flatten(1)
        if not weight.shape[1]:
            return
    if layout == "tiles":
        weight[16:32, :16] = 0
    packed = pack(weight, layout, TYPES[kind])
    values = from_page()(layout, *weight.shape, numpy_parts(packed))
    if kind == "int8":
        found = values * packed.scale_O.numpy()[:, None]
    else:
        found = (values.astype(np.uint32) << 16).view(np.float32)
    np.testing.assert_array_equal(found, reference(packed).float().numpy())


def test_the_page_states_the_version_and_the_fields():
    assert f"It is version {VERSION}." in PAGE
    (example,) = re.findall(r"^```json\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)
    told = json.loads("{" + example + "}")["quantization_config"]
    entries = {name: Entry(**raw) for name, raw in told["matrices"].items()}
    assert packing(entries) == told
    assert {*asdict(next(iter(entries.values())))} == {*next(iter(told["matrices"].values()))}
    assert f"`Unknown quantization type, got {QUANT_METHOD}`" in PAGE


@pytest.mark.parametrize("kind", list(TYPES))
@pytest.mark.parametrize("layout", list(LAYOUTS))
def test_the_table_of_tensors_names_every_tensor(layout, kind):
    rows = dict(re.findall(r"^\| `X\.(\w+)` \| (.*?) \|", PAGE, re.MULTILINE))
    entry = Entry(layout=layout, type=kind, rows=32, columns=64, values=256, bias=True)
    listed = {name for name, layouts in rows.items() if f"`{layout}`" in layouts or layouts.startswith("all")}
    assert listed - ({"weight_scale"} if kind == "bf16" else set()) == set(entry.shapes)


def test_a_directory_on_disk_is_what_the_page_says(tmp_path):
    folder = write_packed(save_sparse("gpt2", tmp_path / "model"), tmp_path / "out", "sparse:int8")
    config = json.loads((folder / "config.json").read_text())
    told = config["quantization_config"]
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    assert (told["version"], config["tie_word_embeddings"], "lm_head" in told["matrices"]) == (1, False, True)
    assert told["matrices"]["transformer.h.0.attn.c_attn"]["transposed"]
    for name, raw in told["matrices"].items():
        for part, (shape, dtype) in Entry(**raw).shapes.items():
            with safe_open(folder / index[f"{name}.{part}"], framework="pt") as opened:
                tensor = opened.get_tensor(f"{name}.{part}")
            assert (tuple(tensor.shape), tensor.dtype) == (shape, dtype)
