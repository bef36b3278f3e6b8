"""Experts stored one by one and run fused: one that is missing or misshapen is found before weights are read."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from families import TINY, save_tiny
from prunus.errors import UserError
from prunus.models import open_model


@pytest.fixture
def mixtral(tmp_path):
    return save_tiny(TINY["mixtral"], tmp_path / "model", shard="10GB")


def edit(directory, change):
    file = directory / "model.safetensors"
    tensors = load_file(file)
    change(tensors, [name for name in tensors if ".experts." in name])
    save_file(tensors, file, metadata={"format": "pt"})


def test_a_missing_expert(mixtral):
    edit(mixtral, lambda tensors, experts: tensors.pop(experts[-1]))
    with pytest.raises(UserError, match=r"tensors behind .* config\.json asks for .*: one is missing"):
        open_model(mixtral)


def test_an_expert_of_another_shape(mixtral):
    edit(mixtral, lambda tensors, experts: tensors.update({experts[0]: torch.zeros(3, 5)}))
    with pytest.raises(UserError, match=r"tensors behind .*experts.* another shape"):
        open_model(mixtral)


def test_weights_in_eight_bits_are_called_quantized_and_not_a_strange_dtype(mixtral):
    edit(mixtral, lambda tensors, experts: tensors.update({n: tensors[n].to(torch.float8_e4m3fn) for n in experts}))
    config = json.loads((mixtral / "config.json").read_text())
    (mixtral / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "fp8"}}))
    with pytest.raises(UserError, match=r"already quantized \(fp8\)"):
        open_model(mixtral)
