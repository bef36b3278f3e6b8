"""Every scheme x method: zeros stay, inputs are untouched, the same call gives the same bits, codes read back."""

import pytest
import torch

from prunus.quantizing import QUANTIZERS, SCHEMES, pack, quantize_matrix, unpack
from prunus.sparsity import Statistics, reconstruction_error

INPUT_NI = torch.randn(300, 128, generator=torch.Generator().manual_seed(0)) * torch.logspace(-1, 1, 128)


def weight(dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(2)
    weight_OI = torch.randn(24, 128, generator=generator) * 0.02
    weight_OI[torch.rand(24, 128, generator=generator) < 0.5] = 0
    weight_OI[3] = 0
    return weight_OI.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("method", QUANTIZERS.values(), ids=list(QUANTIZERS))
@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=list(SCHEMES))
def test_contract(scheme, method, dtype):
    weight_OI, statistics = weight(dtype), Statistics(300, None, INPUT_NI.T @ INPUT_NI / 300)
    before_OI = weight_OI.clone()
    found = quantize_matrix(method, weight_OI, scheme, statistics)
    again = quantize_matrix(method, weight_OI, scheme, statistics)
    assert torch.equal(weight_OI, before_OI)
    assert torch.equal(found.values_OI, again.values_OI)
    assert torch.equal(found.scale_OG, again.scale_OG)
    assert found.values_OI.dtype == found.scale_OG.dtype == dtype
    assert torch.isfinite(found.values_OI).all()
    assert not found.values_OI[weight_OI == 0].any()
    codes_OI = scheme.codes(found.values_OI, found.scale_OG)
    assert codes_OI.dtype == scheme.grid.dtype
    assert torch.equal(scheme.dequantized(codes_OI, found.scale_OG), found.values_OI)
    assert reconstruction_error(weight_OI.float(), found.values_OI.float(), statistics) < 0.05


@pytest.mark.parametrize("scheme", ["int4-g32", "int4-g128"])
def test_gptq_is_nearer_than_rounding(scheme):
    weight_OI, statistics = weight(torch.float32), Statistics(300, None, INPUT_NI.T @ INPUT_NI / 300)
    errors = {
        name: reconstruction_error(
            weight_OI, quantize_matrix(method, weight_OI, SCHEMES[scheme], statistics).values_OI, statistics
        )
        for name, method in QUANTIZERS.items()
    }
    assert errors["gptq"] < errors["rtn"]


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("width", [1, 7, 8, 33])
def test_packing_is_undone(bits, width):
    codes_OI = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), (5, width), dtype=torch.int8)
    words_OW = pack(codes_OI, bits)
    assert words_OW.shape == (5, -(-width * bits // 32))
    assert torch.equal(unpack(words_OW, bits, width), codes_OI)
