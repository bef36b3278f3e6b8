"""What holds for every scheme and method: zeros stay, values are codes times scales, nothing else is touched."""

import pytest
import torch

from prunus.quantizing import QUANTIZERS, SCHEMES, quantize_matrix
from prunus.sparsity import NM, Statistics, Unstructured, reconstruction_error

ROWS, WIDTH = 24, 256
WHOLE = [(scheme, method) for scheme in SCHEMES.values() for method in QUANTIZERS.values()]
EACH = pytest.mark.parametrize(("scheme", "method"), WHOLE, ids=[f"{s.name}-{m.name}" for s, m in WHOLE])
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)


def statistics(dead: int = 0) -> Statistics:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(600, WIDTH, generator=generator) @ torch.randn(WIDTH, WIDTH, generator=generator)
    x[:, :dead] = 0
    gram_II = x.T @ x / len(x)
    return Statistics(len(x), gram_II.diagonal().clone(), gram_II)


def matrix(dtype: torch.dtype = torch.float32, sparsity: float = 0.5) -> torch.Tensor:
    """With a row of zeros, one of tiny weights, one with an outlier, and a zero that has a sign."""
    generator = torch.Generator().manual_seed(2)
    weight = torch.randn(ROWS, WIDTH, generator=generator)
    weight[torch.rand(ROWS, WIDTH, generator=generator) < sparsity] = 0
    weight[0], weight[1], weight[2, 3], weight[3, 4] = 0, weight[1] * 1e-7, 40.0, -0.0
    return weight.to(dtype)


@EACH
@DTYPES
def test_every_zero_stays_bit_for_bit(scheme, method, dtype):
    weight = matrix(dtype)
    before = weight.clone()
    found = quantize_matrix(method, weight, scheme, statistics(dead=3))
    assert torch.equal(weight.view(torch.uint8), before.view(torch.uint8))
    kept = found.values_OI[weight == 0]
    assert torch.equal(kept.view(torch.uint8), torch.zeros_like(kept).view(torch.uint8))
    assert found.values_OI.isfinite().all()


@EACH
@DTYPES
def test_values_are_codes_times_scales(scheme, method, dtype):
    found = quantize_matrix(method, matrix(dtype), scheme, statistics())
    codes = scheme.codes(found.values_OI, found.scale_OG)
    assert codes.dtype == scheme.grid.dtype
    assert found.scale_OG.shape == (ROWS, WIDTH // scheme.group_of(WIDTH))
    assert (found.values_OI.dtype, found.scale_OG.dtype) == (dtype, dtype)
    again = scheme.dequantized(codes, found.scale_OG).to(dtype)
    assert torch.equal(again, found.values_OI)
    stored = codes.nbytes if not scheme.packs else codes.numel() * scheme.bits // 8 + 16
    assert scheme.num_bytes((ROWS, WIDTH), dtype.itemsize) == stored + found.scale_OG.nbytes


@EACH
def test_the_same_twice(scheme, method):
    first, second = (quantize_matrix(method, matrix(), scheme, statistics()) for _ in range(2))
    assert torch.equal(first.values_OI, second.values_OI)


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
@pytest.mark.parametrize("sparsity", [0.0, 0.5])
def test_gptq_beats_rounding(scheme, sparsity):
    weight, known = torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(3)), statistics()
    weight = weight * (torch.rand(ROWS, WIDTH, generator=torch.Generator().manual_seed(4)) >= sparsity)
    error = {
        name: reconstruction_error(weight, quantize_matrix(method, weight, scheme, known).values_OI, known)
        for name, method in QUANTIZERS.items()
    }
    assert error["gptq"] < error["rtn"]


@pytest.mark.parametrize("scheme", [s for s in SCHEMES.values() if s.searches], ids=lambda s: s.name)
def test_the_search_finds_a_better_scale(scheme):
    weight, group = matrix(sparsity=0), scheme.group_of(WIDTH)
    widest = (weight.reshape(ROWS, -1, group).abs().amax(2) / scheme.grid.largest).clamp(min=1e-30)
    squared = [
        (scheme.quantized(weight, scale_OG) - weight).square().sum()
        for scale_OG in (scheme.scales(weight, torch.float32), widest)
    ]
    assert squared[0] < 0.95 * squared[1]


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
@pytest.mark.parametrize("pattern", [Unstructured(0.5, "matrix"), Unstructured(0.5, "row"), NM(keep=2, of=4)], ids=str)
def test_the_joint_sweep_prunes_what_was_asked(scheme, pattern):
    """A kept weight may still be rounded to 0: the zeros are at least those of the pattern."""
    weight = torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(3))
    found = quantize_matrix(QUANTIZERS["gptq"], weight, scheme, statistics(), pattern=pattern).values_OI
    zeros = int((found == 0).sum())
    wanted = pattern.num_pruned((ROWS, WIDTH))
    assert wanted <= zeros <= wanted * 1.15
    if isinstance(pattern, NM):
        assert ((found != 0).reshape(-1, 4).sum(1) <= 2).all()


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
def test_the_joint_sweep_keeps_the_zeros_there_are(scheme):
    weight = matrix()
    pattern = Unstructured(0.3, "matrix")
    found = quantize_matrix(QUANTIZERS["gptq"], weight, scheme, statistics(), pattern=pattern).values_OI
    assert not found[weight == 0].any()


def test_packing_is_that_of_the_library():
    """Words made here and words made by compressed-tensors are the same."""
    library = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers", reason="extra [quantize]")
    from prunus.quantizing import pack, unpack

    for bits in (4, 8):
        codes = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), (7, 96), dtype=torch.int8)
        words = library.pack_to_int32(codes, bits)
        assert torch.equal(pack(codes, bits), words)
        assert torch.equal(unpack(words, bits, 96), codes)
