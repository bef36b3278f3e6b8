"""What an export to vLLM writes, without vLLM: precision, side files, links."""

import json
import shutil
from contextlib import nullcontext

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

import prunus
from prunus.checkpoint import open_checkpoint
from prunus.errors import UserError
from prunus.exporting import Conversion, parse_target, vllm_directory
from prunus.models import open_model
from prunus.models.configs import with_dtype


def write(model, folder, to):
    target = parse_target(to)
    folder.mkdir()
    job = Conversion(
        checkpoint=open_checkpoint(model), kind=target.kind, installed=None, folder=folder, stem="out", timeout=1.0
    )
    return target.format, target.format.write(job)


def weights(folder):
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


@pytest.mark.parametrize(("head", "fits"), [(16, False), (32, True), (48, False), (64, True), (72, False)])
def test_heads_that_its_attention_has_no_code_for_are_refused_beforehand(tmp_path, tiny_llama_dir, head, fits):
    shutil.copytree(tiny_llama_dir, tmp_path / "model")
    config = LlamaConfig(vocab_size=258, hidden_size=64, num_hidden_layers=1, num_attention_heads=2, head_dim=head)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    target = parse_target("vllm")
    with nullcontext() if fits else pytest.raises(UserError, match=rf"are {head} wide, and vLLM .* takes 32, 64, 80"):
        assert target.format.check(open_model(tmp_path / "model"), target.kind) == []


@pytest.mark.parametrize(
    ("scheme", "lacks", "fits"), [("int4-g32", True, False), ("int4-g32", False, True), ("w8a8", True, True)]
)
def test_weights_that_it_cannot_multiply_here_are_refused_beforehand(
    tmp_path, tiny_llama_dir, scheme, lacks, fits, monkeypatch
):
    monkeypatch.setattr(vllm_directory, "HEAD_SIZES", (8, 16))
    monkeypatch.setattr(vllm_directory, "lacks_avx512", lambda: lacks)
    target = parse_target("vllm")
    kind = target.format.types[scheme]
    with nullcontext() if fits else pytest.raises(UserError, match=r"by AVX-512 alone.*export int4-g32 on one"):
        target.format.check(open_model(tiny_llama_dir), kind)


@pytest.mark.parametrize(("to", "dtype"), [("vllm", torch.bfloat16), ("vllm:f16", torch.float16)])
def test_weights_are_stored_in_the_precision_that_the_config_states(tiny_llama_dir, tmp_path, to, dtype):
    form, folder = write(tiny_llama_dir, tmp_path / "out", to)
    own, stored = weights(tiny_llama_dir), weights(folder)
    assert own.keys() == stored.keys()
    for name, tensor in own.items():
        torch.testing.assert_close(stored[name], tensor.to(dtype), rtol=0, atol=0)
    config = json.loads((folder / "config.json").read_text())
    assert config["dtype"] == str(dtype).removeprefix("torch.")
    assert "torch_dtype" not in config
    told = form.describe(folder)
    assert told["tensors"] == {config["dtype"]: len(own)}
    assert told["parameters"] == sum(tensor.numel() for tensor in own.values())
    assert told["decode_bytes_per_token"] <= 2 * told["parameters"]


@pytest.mark.parametrize(("scheme", "bits"), [("w8a8", 8), ("int4-g32", 4)])
def test_a_quantized_model_stays_as_it_is_and_is_computed_in_bfloat16(tiny_llama_dir, tmp_path, scheme, bits):
    quantized = prunus.quantize(tiny_llama_dir, tmp_path / "quantized", scheme=scheme, dtype="float32").path
    form, folder = write(quantized, tmp_path / "out", f"vllm:{scheme}")
    files = list(quantized.glob("*.safetensors*"))
    assert [(folder / file.name).read_bytes() == file.read_bytes() for file in files] == [True] * len(files)
    own, config = (json.loads((place / "config.json").read_text()) for place in (quantized, folder))
    assert config["dtype"] == "bfloat16"
    assert config["quantization_config"] == own["quantization_config"]
    told, dense = form.describe(folder), open_checkpoint(tiny_llama_dir)
    assert told["parameters"] == dense.num_parameters
    in_blocks = sum(i.num_elements for name, i in dense.tensors.items() if ".layers." in name and len(i.shape) == 2)
    packed = dense.num_bytes - 4 * in_blocks + in_blocks * bits // 8
    assert packed < told["decode_bytes_per_token"] < 1.2 * packed  # and scales


def test_weights_that_stay_as_they_are_become_links(tiny_llama_dir, tmp_path):
    _, folder = write(tiny_llama_dir, tmp_path / "out", "vllm:f32")
    for file in tiny_llama_dir.glob("*.safetensors"):
        assert (folder / file.name).samefile(file)


def test_where_no_link_can_be_made_they_are_copied(tiny_llama_dir, tmp_path, monkeypatch):
    def no_links(_source, _target):
        raise OSError("Invalid cross-device link")

    monkeypatch.setattr("prunus.exporting.vllm_directory.os.link", no_links)
    _, folder = write(tiny_llama_dir, tmp_path / "out", "vllm:f32")
    for file in tiny_llama_dir.glob("*.safetensors"):
        assert not (folder / file.name).samefile(file)
        assert (folder / file.name).read_bytes() == file.read_bytes()


def test_what_serving_needs_goes_along(tiny_llama_dir, tmp_path):
    _, folder = write(tiny_llama_dir, tmp_path / "out", "vllm")
    beside = {file.name for file in tiny_llama_dir.iterdir()} - {"prunus.json"}
    assert "tokenizer.json" in beside
    assert {file.name for file in folder.iterdir()} == beside


def test_an_index_counts_the_bytes_that_are_there(tiny_llama_dir, tmp_path):
    from transformers import AutoModelForCausalLM

    sharded = tmp_path / "sharded"
    AutoModelForCausalLM.from_pretrained(tiny_llama_dir).save_pretrained(sharded, max_shard_size="20KB")
    _, folder = write(sharded, tmp_path / "out", "vllm")
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    files = {file.name for file in folder.glob("*.safetensors")}
    assert len(files) > 1
    assert set(index["weight_map"].values()) == files
    assert index["metadata"]["total_size"] == sum(2 * tensor.numel() for tensor in weights(folder).values())


def test_a_config_in_parts_states_one_precision():
    stated = {"dtype": "float32", "torch_dtype": "float32", "text_config": {"dtype": "float32"}, "rope": {"theta": 1}}
    assert with_dtype(stated, torch.bfloat16) == {
        "dtype": "bfloat16",
        "text_config": {"dtype": "bfloat16"},
        "rope": {"theta": 1},
    }
