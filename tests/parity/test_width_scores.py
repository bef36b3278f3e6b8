"""Width scores and the refit against slow literal versions of their equations."""

import pytest
import torch

from prunus.shrinking import WIDTH_SCORES, Units, choose_units, second_order
from prunus.shrinking.refit import DAMPING as REFIT_DAMPING
from prunus.shrinking.refit import refit
from prunus.sparsity import Statistics

O, U, N, T = 12, 10, 3, 200  # noqa: E741 out features, units, sequences, tokens


def make_units(width=1, seed=0):
    """Random units of `width` inputs each, whose inputs are correlated and have a mean."""
    generator = torch.Generator().manual_seed(seed)
    size = U * width
    mixing = torch.randn(size, size, generator=generator)
    x_TI = torch.randn(T, size, generator=generator) @ mixing + torch.randn(size, generator=generator)
    statistics = Statistics(T, x_TI.square().mean(0), x_TI.T @ x_TI / T, x_TI.mean(0))
    units = Units(
        reader_OI=torch.randn(O, size, generator=generator),
        columns_UW=torch.arange(size).view(U, width),
        statistics=statistics,
        producers=(torch.randn(U, 7, generator=generator), torch.randn(U, 1, generator=generator)),
        gate_gradient_NU=torch.randn(N, U, generator=generator),
        weight_taylor_U=torch.rand(U, generator=generator),
    )
    return units, x_TI


def score(name, units):
    return WIDTH_SCORES[name].score(units)


@pytest.mark.parametrize("width", [1, 4])
def test_magnitude(width):
    units, _ = make_units(width)
    for u in range(U):
        weights = [units.reader_OI[:, u * width : (u + 1) * width], *(made[u] for made in units.producers)]
        flat = torch.cat([weight.flatten() for weight in weights])
        torch.testing.assert_close(score("magnitude", units)[u], flat.norm())
        torch.testing.assert_close(score("magnitude-l1", units)[u], flat.abs().sum())


@pytest.mark.parametrize("width", [1, 4])
def test_activation_is_the_norm_of_what_a_unit_gives(width):
    units, x_TI = make_units(width)
    for u in range(U):
        outputs = x_TI[:, u * width : (u + 1) * width]
        torch.testing.assert_close(score("activation", units)[u], outputs.norm() / T**0.5)


@pytest.mark.parametrize("width", [1, 4])
def test_flap_is_variance_times_squared_column_norm(width):
    units, x_TI = make_units(width)
    for u in range(U):
        columns = range(u * width, (u + 1) * width)
        expected = sum(x_TI[:, j].var(unbiased=False) * units.reader_OI[:, j].norm() ** 2 for j in columns)
        torch.testing.assert_close(score("flap", units)[u], expected, rtol=1e-3, atol=1e-4)


def test_taylor_and_fisher():
    units, _ = make_units()
    derivatives_NU = units.gate_gradient_NU
    for u in range(U):
        torch.testing.assert_close(score("taylor", units)[u], (derivatives_NU[:, u].sum() / N).abs())
        squares = sum(float(derivatives_NU[n, u]) ** 2 for n in range(N))
        assert float(score("fisher", units)[u]) == pytest.approx(squares / N, rel=1e-5)


def normalised(gram_II, damping):
    """(unit Gram plus damping in float64, the scale divided out)."""
    scale_I = gram_II.double().diagonal().sqrt()
    unit_II = gram_II.double() / torch.outer(scale_I, scale_I)
    return unit_II + damping * torch.eye(len(unit_II), dtype=torch.float64), scale_I


def loss_of_removing(weight_OI, gram_II, inputs):
    """min over W' without these inputs of tr((W - W') G (W - W')^T), by solving the least squares outright."""
    stays = [i for i in range(len(gram_II)) if i not in inputs]
    right = weight_OI @ gram_II[:, stays]
    solved = torch.linalg.solve(gram_II[stays][:, stays], right.T).T
    difference = weight_OI.clone()
    difference[:, stays] -= solved
    return float(torch.trace(difference @ gram_II @ difference.T))


@pytest.mark.parametrize("width", [1, 4])
def test_second_order_removes_what_the_rest_makes_up_for_best(width):
    units, _ = make_units(width)
    gram_II, scale_I = normalised(units.statistics.gram(), second_order.DAMPING)
    weight_OI = units.reader_OI.double() * scale_I
    gone: list[int] = []
    losses = {}
    while len(gone) < 4:
        taken = [i for u in gone for i in range(u * width, (u + 1) * width)]
        before = loss_of_removing(weight_OI, gram_II, taken)
        for u in set(range(U)) - set(gone):
            inputs = [*taken, *range(u * width, (u + 1) * width)]
            losses[u] = loss_of_removing(weight_OI, gram_II, inputs) - before
        gone.append(min(set(range(U)) - set(gone), key=losses.__getitem__))
    choice = choose_units(WIDTH_SCORES["second-order"], units, U - 4)
    assert sorted((~choice.keep_U).nonzero()[:, 0].tolist()) == sorted(gone)
    expected = torch.tensor([losses[u] for u in range(U)])
    torch.testing.assert_close(choice.score_U, expected, rtol=1e-2, atol=1e-3)


def test_second_order_in_few_rounds_finds_units_about_as_cheap(monkeypatch):
    units, _ = make_units(4)
    one_by_one = choose_units(WIDTH_SCORES["second-order"], units, 5).keep_U
    monkeypatch.setattr(second_order, "ROUNDS", 2)
    at_once = choose_units(WIDTH_SCORES["second-order"], units, 5).keep_U
    assert int(at_once.sum()) == 5
    gram_II, scale_I = normalised(units.statistics.gram(), second_order.DAMPING)
    weight_OI = units.reader_OI.double() * scale_I
    costs = [loss_of_removing(weight_OI, gram_II, units.inputs(~keep).tolist()) for keep in (one_by_one, at_once)]
    assert costs[0] <= costs[1] <= 1.5 * costs[0]


def test_refit_is_the_least_squares_solution():
    units, _ = make_units()
    stays_I = torch.tensor([True] * 6 + [False] * 4)
    gram_II, scale_I = normalised(units.statistics.gram(), 0.0)
    damped_SS = gram_II[:6, :6] + REFIT_DAMPING * torch.eye(6, dtype=torch.float64)
    weight_OI = units.reader_OI.double() * scale_I
    expected = (weight_OI[:, :6] + weight_OI[:, 6:] @ gram_II[6:, :6] @ torch.linalg.inv(damped_SS)) / scale_I[:6]
    found = refit(units.reader_OI, units.statistics.gram(), stays_I)
    torch.testing.assert_close(found[:, :6].double(), expected, rtol=1e-3, atol=1e-3)
    assert not found[:, 6:].any()


def test_refit_lowers_the_error_on_the_tokens():
    units, x_TI = make_units()
    stays_I = torch.tensor([True] * 6 + [False] * 4)
    before = units.reader_OI.clone()
    found = refit(units.reader_OI, units.statistics.gram(), stays_I)
    assert torch.equal(units.reader_OI, before)
    error = ((units.reader_OI - found) @ x_TI.T).norm()
    assert error < 0.9 * (units.reader_OI.where(~stays_I, torch.tensor(0.0)) @ x_TI.T).norm()
