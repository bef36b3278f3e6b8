"""Damaged and malicious packed models: whatever is in the files, they open or are refused in a sentence."""

import json
import random
import shutil

import pytest
import torch
from safetensors import safe_open
from transformers import LlamaConfig, LlamaForCausalLM

import prunus
from packed_models import write_packed
from prunus.checkpoint import open_checkpoint
from prunus.errors import UserError
from prunus.models.skeleton import build_on_meta
from prunus.models.tensor_names import TensorNames
from prunus.runtime.linear import PackedLinear
from prunus.runtime.quantizer import replace_linears

STRANGE = (0, 1, -1, 16, 17, 2**31, 2**40, 2**63, 10**30, 0.5, None, True, "1", "dense", "tiles", "2:4", "int8", [], {})


@pytest.fixture(scope="module", params=["bf16", "int8"])
def model(request, tmp_path_factory):
    """A packed Llama of one block in which every layout occurs."""
    folder = tmp_path_factory.mktemp("fuzz")
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    made = LlamaForCausalLM(LlamaConfig(vocab_size=40, tie_word_embeddings=False, **sizes))
    torch.manual_seed(0)
    with torch.no_grad():
        block = made.model.layers[0]
        block.self_attn.q_proj.weight.mul_(torch.tensor([1.0, 0, 0, 1]).repeat(8))
        block.mlp.up_proj.weight[:32, :16] = 0
        block.mlp.down_proj.weight.mul_(torch.rand(32, 48) > 0.7)
    made.save_pretrained(folder / "model")
    packed = write_packed(folder / "model", folder / "packed", f"sparse:{request.param}")
    layouts = {entry.layout for entry in open_checkpoint(packed).packed.values()}
    assert layouts == {"dense", "bitmask", "2:4", "tiles"}
    return packed


def mutated(model, folder, seed):
    """A copy with one thing changed; says what."""
    chance = random.Random(seed)
    shutil.copytree(model, folder)
    file = chance.choice(sorted(folder.glob("*.safetensors")))
    change = chance.choice([flipped, flipped, cut, header_changed, entry_changed, tensor_overwritten])
    return change(folder, file, chance)


def flipped(_folder, file, chance):
    """Some bytes, anywhere."""
    content = bytearray(file.read_bytes())
    places = [chance.randrange(len(content)) for _ in range(chance.choice([1, 1, 4, 32]))]
    for place in places:
        content[place] = chance.randrange(256)
    file.write_bytes(content)
    return f"bytes {places} of {file.name}"


def cut(_folder, file, chance):
    content = file.read_bytes()
    length = chance.randrange(len(content))
    file.write_bytes(content[:length])
    return f"{file.name} cut to {length} bytes"


def header_changed(_folder, file, chance):
    """A valid header that says something else of one tensor."""
    content = file.read_bytes()
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    name = chance.choice([key for key in header if key != "__metadata__"])
    field = chance.choice(["dtype", "shape", "data_offsets", "name"])
    if field == "name":
        header[f"{name}.{chance.randrange(9)}"] = header.pop(name)
    elif field == "dtype":
        header[name]["dtype"] = chance.choice(["I8", "U8", "BF16", "F16", "F32", "I32", "I64", "BOOL", "F8_E4M3", "X"])
    else:
        header[name][field] = chance.choice([[], [0], [1, 2], [2**40], [2**63], header[name][field][::-1]])
    told = json.dumps(header).encode()
    told += b" " * (-len(told) % 8)
    file.write_bytes(len(told).to_bytes(8, "little") + told + content[8 + size :])
    return f"{field} of {name}"


def entry_changed(folder, _file, chance):
    """What config.json says of one matrix."""
    config = json.loads((folder / "config.json").read_text())
    packing = config["quantization_config"]
    name = chance.choice(sorted(packing["matrices"]))
    field = chance.choice([*packing["matrices"][name], "version", "matrices", "renamed"])
    value = chance.choice(STRANGE)
    if field in ("version", "matrices"):
        packing[field] = value
    elif field == "renamed":
        packing["matrices"][chance.choice(["lm_head", "model.norm", "model", "", "x"])] = packing["matrices"].pop(name)
    else:
        packing["matrices"][name][field] = value
    (folder / "config.json").write_text(json.dumps(config))
    return f"{field} of {name} = {value!r}"


def tensor_overwritten(_folder, file, chance):
    """All numbers of one tensor, which the header knows nothing of: masks, starts, places and tiles among them."""
    content = bytearray(file.read_bytes())
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    parts = [key for key in header if key != "__metadata__"]
    parts = [key for key in parts if key.rpartition("_")[2] in ("mask", "start", "place", "tile")] or parts
    name = chance.choice(parts)
    start, end = header[name]["data_offsets"]
    content[8 + size + start : 8 + size + end] = chance.choice(
        [bytes(end - start), b"\xff" * (end - start), chance.randbytes(end - start)]
    )
    file.write_bytes(content)
    return f"{name} overwritten"


def used(folder):
    """Every matrix, by the checks that stand between a file and the kernels, and multiplied once by all of them."""
    checkpoint = open_checkpoint(folder)
    made = build_on_meta(checkpoint.config, dtype=torch.float32)
    TensorNames(made, checkpoint.tensors)
    replace_linears(made, {name.removesuffix(".weight"): entry for name, entry in checkpoint.packed.items()})
    for name, module in made.named_modules():
        if not isinstance(module, PackedLinear):
            continue
        read = {}
        for part in module.entry.shapes:
            with safe_open(checkpoint.parts[f"{name}.{part}"].file, framework="pt") as opened:
                read[part] = opened.get_tensor(f"{name}.{part}")
        module.load_state_dict(read, assign=True)
        module.prepare()
        for inputs in (1, 20):
            assert module(torch.ones(inputs, module.in_features)).shape == (inputs, module.out_features)


def opened_whole(folder):
    found = prunus.load(folder, dtype="float32")
    with torch.no_grad():
        assert found(torch.tensor([[1, 2, 3]])).logits.shape == (1, 3, 40)


def outcomes(model, tmp_path, count, use):
    """How many of `count` mutations opened, and how many were refused."""
    opened = refused = 0
    for seed in range(count):
        folder = tmp_path / "mutated"
        what = mutated(model, folder, seed)
        try:
            use(folder)
            opened += 1
        except UserError as error:
            sentence = str(error).replace(str(folder), "")
            assert "\n" not in sentence, what
            refused += 1
        except Exception as error:
            raise AssertionError(f"mutation {seed} ({what})") from error
        shutil.rmtree(folder)
    return opened, refused


def test_mutations_open_or_are_refused(model, tmp_path):
    opened, refused = outcomes(model, tmp_path, 250, used)
    assert opened > 25
    assert refused > 100


@pytest.mark.slow
def test_many_mutations_open_or_are_refused(model, tmp_path):
    opened, refused = outcomes(model, tmp_path, 5000, opened_whole)
    assert opened > 500
    assert refused > 2000
