"""What every method promises, for every pattern, dtype and odd shape; the rows come from the table of methods."""

import pytest
import torch
from torch import Tensor

from prunus.errors import UserError
from prunus.sparsity import METHODS, Method, Statistics, parse_pattern, prepare, prune, reconstruction_error

PATTERNS = ["0.5", "0.37@row", "0.63@matrix", "2:4", "1:4", "4:8", "4x4:0.5", "5x7:0.4", "0.99"]
SHAPES = [(24, 40), (7, 136), (40, 8)]
DTYPES = [torch.float32, torch.bfloat16]
CALIBRATED = [method for method in METHODS.values() if method.needs]
ALL = pytest.mark.parametrize("method", METHODS.values(), ids=list(METHODS))


def layer(rows: int, cols: int, dead: int = 0, tokens: int = 300) -> tuple[Tensor, Statistics]:
    """A seeded weight with correlated inputs of unequal size; the first `dead` inputs are always 0."""
    generator = torch.Generator().manual_seed(rows * 1000 + cols)
    mix_II = torch.randn(cols, cols, generator=generator) * torch.logspace(-1, 1, cols)
    input_NI = torch.randn(tokens, cols, generator=generator) @ mix_II
    input_NI[:, :dead] = 0
    gram_II = input_NI.T @ input_NI / tokens
    return torch.randn(rows, cols, generator=generator), Statistics(tokens, gram_II.diagonal().clone(), gram_II)


@ALL
@pytest.mark.parametrize("text", PATTERNS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_result(method: Method, text: str, shape: tuple[int, int], dtype: torch.dtype) -> None:
    weight_OI, statistics = layer(*shape)
    weight_OI = weight_OI.to(dtype)
    before_OI, gram_II = weight_OI.clone(), statistics.gram().clone()
    result = prune(method, weight_OI, statistics, parse_pattern(text))
    pattern = method.resolve(parse_pattern(text))
    assert pattern.satisfied_by(result.keep_OI)
    assert result.keep_OI.dtype == torch.bool
    assert result.weight_OI.dtype == dtype
    assert bool(result.weight_OI.isfinite().all())
    assert bool((result.weight_OI[~result.keep_OI] == 0).all())
    if not method.updates:
        assert torch.equal(result.weight_OI[result.keep_OI], before_OI[result.keep_OI])
    assert torch.equal(weight_OI, before_OI)
    assert torch.equal(statistics.gram(), gram_II)


@ALL
@pytest.mark.parametrize("text", ["0.5", "2:4", "4x4:0.5"])
def test_bitwise_deterministic_with_and_without_shared_work(method: Method, text: str) -> None:
    weight_OI, statistics = layer(24, 40)
    shared = prepare(method, statistics)
    first, second = (prune(method, weight_OI, statistics, parse_pattern(text), prepared=p) for p in (None, shared))
    assert torch.equal(first.weight_OI, second.weight_OI)
    assert torch.equal(first.keep_OI, second.keep_OI)


@ALL
@pytest.mark.parametrize("text", ["0", "0.0@row", "4x4:0"])
@pytest.mark.parametrize("dead", [0, 5])
def test_zero_sparsity_changes_nothing(method: Method, text: str, dead: int) -> None:
    weight_OI, statistics = layer(24, 40, dead)
    result = prune(method, weight_OI, statistics, parse_pattern(text))
    assert bool(result.keep_OI.all())
    torch.testing.assert_close(result.weight_OI, weight_OI)


@ALL
@pytest.mark.parametrize("text", PATTERNS)
def test_all_inputs_dead_or_all_weights_zero(method: Method, text: str) -> None:
    weight_OI, statistics = layer(24, 40, dead=40)
    pattern = parse_pattern(text)
    assert bool(prune(method, weight_OI, statistics, pattern).weight_OI.isfinite().all())
    zeros_OI = torch.zeros_like(weight_OI)
    assert torch.equal(prune(method, zeros_OI, layer(24, 40)[1], pattern).weight_OI, zeros_OI)


@pytest.mark.parametrize("method", CALIBRATED, ids=lambda method: method.name)
def test_dead_inputs_are_pruned_first(method: Method) -> None:
    weight_OI, statistics = layer(24, 40, dead=10)
    result = prune(method, weight_OI * torch.logspace(3, 0, 40), statistics, parse_pattern("0.5@row"))
    assert not bool(result.keep_OI[:, :10].any())


@ALL
@pytest.mark.parametrize("text", ["0.5", "2:4"])
def test_scaling_the_weights_or_all_inputs_changes_no_choice(method: Method, text: str) -> None:
    weight_OI, statistics = layer(24, 40)
    pattern = parse_pattern(text)
    scaled = Statistics(300, statistics.sq_norm() * 16, statistics.gram() * 16)  # powers of 2 are exact in fp32
    result, larger = prune(method, weight_OI, statistics, pattern), prune(method, weight_OI * 8, scaled, pattern)
    assert torch.equal(result.keep_OI, larger.keep_OI)
    torch.testing.assert_close(result.weight_OI * 8, larger.weight_OI)


@pytest.mark.parametrize("method", CALIBRATED, ids=lambda method: method.name)
@pytest.mark.parametrize("text", ["0.5", "0.5@row", "2:4", "1:4", "4x4:0.5"])
def test_output_error_is_at_most_that_of_magnitude(method: Method, text: str) -> None:
    weight_OI, statistics = layer(64, 64)
    pattern = parse_pattern(text)
    errors = [
        reconstruction_error(weight_OI, prune(each, weight_OI, statistics, pattern).weight_OI, statistics)
        for each in (method, METHODS["magnitude"])
    ]
    assert errors[0] <= errors[1]


@pytest.mark.parametrize("method", [m for m in CALIBRATED if "gram" in m.needs], ids=lambda method: method.name)
def test_an_indefinite_gram_raises_the_damping_and_says_so(method: Method) -> None:
    weight_OI, statistics = layer(24, 40)
    healthy = prune(method, weight_OI, statistics, parse_pattern("0.5"))
    assert healthy.notes["damping"] == method.options().damping
    indefinite_II = torch.full((40, 40), -0.5).fill_diagonal_(1.0)  # lowest eigenvalue 1 - 39 / 2
    raised = prune(method, weight_OI, Statistics(300, None, indefinite_II), parse_pattern("0.5"))
    assert raised.notes["damping"] > healthy.notes["damping"]
    assert bool(raised.weight_OI.isfinite().all())


@ALL
def test_a_pattern_that_does_not_fit_is_refused(method: Method) -> None:
    weight_OI, statistics = layer(24, 40)
    for text in ("2:6", "32x4:0.5"):
        with pytest.raises(UserError, match="does not fit"):
            prune(method, weight_OI, statistics, parse_pattern(text))


@ALL
def test_the_table_describes_the_method(method: Method) -> None:
    assert METHODS[method.name] is method
    assert set(method.needs) <= {"input_sq_norm", "gram"}
    assert all((method.title, method.paper, method.idea, method.cost, method.when))


def test_reconstruction_error_is_the_relative_output_error() -> None:
    generator = torch.Generator().manual_seed(0)
    input_NI, weight_OI = torch.randn(50, 12, generator=generator), torch.randn(6, 12, generator=generator)
    pruned_OI = weight_OI * (torch.rand(6, 12, generator=generator) > 0.5)
    expected = (input_NI @ (weight_OI - pruned_OI).T).square().sum() / (input_NI @ weight_OI.T).square().sum()
    gram_II = input_NI.T @ input_NI / 50
    assert reconstruction_error(weight_OI, pruned_OI, Statistics(50, None, gram_II)) == pytest.approx(float(expected))
    diagonal = reconstruction_error(weight_OI, pruned_OI, Statistics(50, gram_II.diagonal()))
    exact = reconstruction_error(weight_OI, pruned_OI, Statistics(50, None, gram_II.diagonal().diag()))
    assert diagonal == pytest.approx(exact)
    assert reconstruction_error(weight_OI, weight_OI, Statistics()) == 0
