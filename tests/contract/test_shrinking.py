"""What holds for every width score: exact counts, determinism, untouched inputs, ties by position, dead inputs."""

import copy
from dataclasses import replace

import pytest
import torch

from prunus.shrinking import WIDTH_SCORES, Units, choose_units
from prunus.sparsity import Statistics


def random_units(num_units=9, width=2, *, seed=0, dead=(), tokens=50):
    generator = torch.Generator().manual_seed(seed)
    x_TI = torch.randn(tokens, num_units * width, generator=generator)
    x_TI[:, list(dead)] = 0
    return Units(
        reader_OI=torch.randn(5, num_units * width, generator=generator),
        columns_UW=torch.arange(num_units * width).view(num_units, width),
        statistics=Statistics(tokens, x_TI.square().mean(0), x_TI.T @ x_TI / tokens, x_TI.mean(0)),
        producers=(torch.randn(num_units, 4, generator=generator),),
        gate_gradient_NU=torch.randn(3, num_units, generator=generator),
        weight_taylor_U=torch.rand(num_units, generator=generator),
    )


@pytest.fixture(params=WIDTH_SCORES)
def width_score(request):
    return WIDTH_SCORES[request.param]


@pytest.mark.parametrize("num_kept", [1, 4, 8, 9])
def test_exactly_as_many_stay_as_asked(width_score, num_kept):
    choice = choose_units(width_score, random_units(), num_kept)
    assert choice.keep_U.dtype == torch.bool
    assert int(choice.keep_U.sum()) == num_kept
    assert choice.score_U.isfinite().all()


def test_the_same_every_time_and_inputs_stay_untouched(width_score):
    units = random_units()
    before = copy.deepcopy(units)
    first, second = choose_units(width_score, units, 4), choose_units(width_score, units, 4)
    assert torch.equal(first.keep_U, second.keep_U)
    assert torch.equal(units.reader_OI, before.reader_OI)
    assert torch.equal(units.statistics.gram_II, before.statistics.gram_II)
    assert torch.equal(units.producers[0], before.producers[0])


def test_of_equal_units_the_earlier_stays(width_score):
    ones_I = torch.ones(6)
    units = Units(
        reader_OI=torch.ones(2, 6),
        columns_UW=torch.arange(6).view(6, 1),
        statistics=Statistics(9, ones_I, torch.eye(6), torch.zeros(6)),
        producers=(torch.ones(6, 2),),
        gate_gradient_NU=torch.ones(2, 6),
        weight_taylor_U=torch.ones(6),
    )
    assert choose_units(width_score, units, 3).keep_U.tolist() == [True] * 3 + [False] * 3


def test_inputs_that_were_always_zero_do_no_harm(width_score):
    choice = choose_units(width_score, random_units(dead=(4, 5)), 4)
    assert choice.score_U.isfinite().all()


def test_fewer_tokens_than_inputs_do_no_harm(width_score):
    assert int(choose_units(width_score, random_units(tokens=3), 4).keep_U.sum()) == 4


@pytest.mark.parametrize("name", [n for n, s in WIDTH_SCORES.items() if {"input_sq_norm", "gram"} & set(s.needs)])
def test_scores_that_look_at_inputs_let_dead_units_go_first(name):
    assert not choose_units(WIDTH_SCORES[name], random_units(dead=(4, 5)), 8).keep_U[2]


@pytest.mark.parametrize("num_kept", [3, 6])
def test_every_run_keeps_as_many(width_score, num_kept):
    units = replace(random_units(), runs=3)
    kept_R = choose_units(width_score, units, num_kept).keep_U.view(3, 3).sum(1)
    assert kept_R.tolist() == [num_kept // 3] * 3
