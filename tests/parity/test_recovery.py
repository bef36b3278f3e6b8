"""Losses, the masked Adam step and the masked low-rank change, against loops written from their formulas."""

import math

import pytest
import torch
from torch import nn

from prunus.recovery import losses as losses_module
from prunus.recovery.adapters import MaskedDelta, merged
from prunus.recovery.keep_masks import KeepMasks
from prunus.recovery.losses import (
    AllLogits,
    LikeliestLogits,
    forward_kl,
    mean_losses,
    square_head,
    token_losses,
    top_k_kl,
    top_k_log_p,
)
from prunus.recovery.trainer import BETAS, Plan, make_optimizer

POSITIONS, VOCABULARY = 7, 11


@pytest.fixture
def logits():
    """Of a teacher and a student."""
    generator = torch.Generator().manual_seed(0)
    return [3 * torch.randn(POSITIONS, VOCABULARY, generator=generator, dtype=torch.float64) for _ in range(2)]


def probabilities(row, temperature=1.0):
    powers = [math.exp(float(value) / temperature) for value in row]
    return [power / sum(powers) for power in powers]


def slow_kl(p, q):
    return sum(pv * math.log(pv / qv) for pv, qv in zip(p, q, strict=True))


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_forward_kl(logits, temperature):
    teacher_tV, student_tV = logits
    expected = [
        temperature**2 * slow_kl(probabilities(t, temperature), probabilities(s, temperature))
        for t, s in zip(teacher_tV, student_tV, strict=True)
    ]
    found_t = forward_kl(teacher_tV, student_tV, temperature)
    torch.testing.assert_close(found_t, torch.tensor(expected), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("k", [1, 4, VOCABULARY - 1])
def test_top_k_kl_counts_all_other_tokens_as_one(logits, k):
    teacher_tV, student_tV = logits
    expected = []
    for teacher, student in zip(teacher_tV, student_tV, strict=True):
        p, q = probabilities(teacher, 2.0), probabilities(student, 2.0)
        likeliest = sorted(range(VOCABULARY), key=lambda v: -p[v])[:k]
        p_bins, q_bins = [[*(x[v] for v in likeliest)] for x in (p, q)]
        expected.append(4 * slow_kl([*p_bins, 1 - sum(p_bins)], [*q_bins, 1 - sum(q_bins)]))
    found_t = top_k_kl(*top_k_log_p(teacher_tV, k, 2.0), student_tV, 2.0)
    torch.testing.assert_close(found_t, torch.tensor(expected), rtol=1e-4, atol=1e-4)
    assert (found_t <= forward_kl(teacher_tV, student_tV, 2.0) + 1e-4).all()


def test_square_head():
    generator = torch.Generator().manual_seed(0)
    student, teacher = ([torch.randn(2, 3, 4, generator=generator) for _ in range(3)] for _ in range(2))
    layers = []
    for s_BTH, t_BTH in zip(student, teacher, strict=True):
        distance = sum((float(s) - float(t)) ** 2 for s, t in zip(s_BTH.flatten(), t_BTH.flatten(), strict=True))
        layers.append(distance / sum(float(t) ** 2 for t in t_BTH.flatten()))
    assert float(square_head(student, teacher)) == pytest.approx(sum(layers) / 3, rel=1e-5)


@pytest.mark.parametrize("teacher_is", ["whole", "likeliest"])
def test_piece_by_piece_is_the_whole_at_once(logits, teacher_is, monkeypatch):
    """Loss and gradient, with weights, and with an upstream factor as in accumulation."""
    monkeypatch.setattr(losses_module, "VALUES_AT_ONCE", 2 * VOCABULARY)
    teacher_tV, student_tV = (one.float() for one in logits)
    targets_t = torch.arange(POSITIONS)
    likeliest = LikeliestLogits(*top_k_log_p(teacher_tV, 4, 1.5))
    teacher = AllLogits(teacher_tV) if teacher_is == "whole" else likeliest
    pieces_tV, whole_tV = (student_tV.clone().requires_grad_() for _ in range(2))
    weights = {"ce": 0.3, "logits": 2.0}
    total, means = mean_losses(pieces_tV, token_losses(list(weights), targets_t, teacher, 1.5), weights)
    (total / 3).backward()
    ce = nn.functional.cross_entropy(whole_tV, targets_t)
    kl = teacher.kl(whole_tV, slice(None), 1.5).mean()
    ((0.3 * ce + 2.0 * kl) / 3).backward()
    assert means == {"ce": pytest.approx(ce.item(), rel=1e-5), "logits": pytest.approx(kl.item(), rel=1e-5)}
    assert total.item() == pytest.approx(0.3 * ce.item() + 2.0 * kl.item(), rel=1e-5)
    torch.testing.assert_close(pieces_tV.grad, whole_tV.grad, rtol=1e-4, atol=1e-6)


def test_masked_adam_steps():
    """Adam written out, one weight after the other; weights that are gone stay at exactly zero."""
    generator = torch.Generator().manual_seed(0)
    layer = nn.Linear(5, 4, bias=False)
    keep_OI = torch.rand(4, 5, generator=generator) > 0.5
    with torch.no_grad():
        layer.weight.copy_(torch.randn(4, 5, generator=generator) * keep_OI)
    expected = layer.weight.detach().double().clone()
    masks, parameters = KeepMasks({"weight": keep_OI}), dict(layer.named_parameters())
    optimizer = make_optimizer(layer, lr=0.01, weight_decay=0.1)
    gradients = [torch.randn(4, 5, generator=generator) for _ in range(3)]
    for gradient_OI in gradients:
        layer.weight.grad = gradient_OI.clone()
        masks.clear_gradients(parameters)
        optimizer.step()
        masks.clear_weights(parameters)
    for row in range(4):
        for column in range(5):
            m = v = 0.0
            for step, gradient_OI in enumerate(gradients, start=1):
                g = float(gradient_OI[row, column]) if keep_OI[row, column] else 0.0
                m, v = BETAS[0] * m + (1 - BETAS[0]) * g, BETAS[1] * v + (1 - BETAS[1]) * g * g
                change = (m / (1 - BETAS[0] ** step)) / (math.sqrt(v / (1 - BETAS[1] ** step)) + 1e-8)
                expected[row, column] = expected[row, column] * (1 - 0.01 * 0.1) - 0.01 * change
    torch.testing.assert_close(layer.weight.detach().double(), expected, rtol=1e-5, atol=1e-6)
    assert (layer.weight[~keep_OI] == 0).all()


@pytest.mark.parametrize("shape", [(4, 6), (3, 4, 6)], ids=["matrix", "experts"])
def test_what_lora_trains_is_what_it_merges_under_the_mask(shape):
    generator = torch.Generator().manual_seed(0)
    keep = torch.rand(shape, generator=generator) > 0.5
    weight = torch.randn(shape, generator=generator) * keep
    change = MaskedDelta(weight, keep, rank=2, scale=0.5, generator=generator)
    assert torch.equal(change(weight), weight)  # before training it changes nothing
    with torch.no_grad():
        change.b.copy_(torch.randn(change.b.shape, generator=generator))
    expected = weight.clone()
    for at in [tuple(index.tolist()) for index in keep.nonzero()]:
        *expert, row, column = at
        a, b = change.a[tuple(expert)].detach(), change.b[tuple(expert)].detach()
        expected[at] += 0.5 * sum(float(b[row, r]) * float(a[r, column]) for r in range(2))
    torch.testing.assert_close(change(weight).detach(), expected)
    together = merged(weight, keep, change.a.detach(), change.b.detach(), 0.5)
    torch.testing.assert_close(together, expected)
    assert (together[~keep] == 0).all()


def test_learning_rate_rises_and_falls():
    plan = Plan(
        steps=20, sequences=1, micro_batches=1, evaluate_every=1, patience=0, lr=2.0, warm_up=4, clip=1.0, seed=0,
        losses={}, temperature=1.0, layers=(), dtype=torch.float32,
    )  # fmt: skip
    assert [plan.lr_at(step) for step in range(4)] == [0.5, 1.0, 1.5, 2.0]
    assert plan.lr_at(4) == 2.0
    assert plan.lr_at(12) == pytest.approx(1.0)
    assert 0 < plan.lr_at(19) < 0.05
