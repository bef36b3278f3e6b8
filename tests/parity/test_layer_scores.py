"""Scores of layers and the fold, against the formulas written out slowly, token by token."""

import math
import random

import pytest
import torch
from transformers import AutoModelForCausalLM

from families import TINY, save_tiny
from prunus.calibration import HiddenStates
from prunus.calibration.fold_block import fit_folds
from prunus.models import open_model
from prunus.models.families import Family
from prunus.models.trace import find_blocks
from prunus.settings_shrink import LayersSettings
from prunus.shrinking.angular_distance import angular_distance, least_distant_run
from prunus.shrinking.block_influence import block_influence, least_influential
from prunus.shrinking.fold import DAMPING, FoldStatistics
from prunus.shrinking.greedy_kl import next_to_go
from prunus.steps.calibration_text import calibration_batch
from prunus.steps.layer_distances import distances
from prunus.steps.layer_greedy import Judge
from prunus.text.batches import TokenBatch
from removing import remove_layers

TOKENS = torch.randint(3, 128, (4, 20), generator=torch.Generator().manual_seed(1))
REAL = torch.ones(4, 20, dtype=torch.bool)
REAL[1, 12:] = False
BATCH = TokenBatch(TOKENS, REAL, [])
DEPTH = 6


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    family = Family("llama", "deep", "", {"num_hidden_layers": DEPTH})
    return save_tiny(family, tmp_path_factory.mktemp("layers") / "model")


@pytest.fixture(scope="module")
def whole(directory):
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()


def boundaries(whole):
    """What enters each layer, and last what leaves the final one: by plain hooks."""
    seen = []
    handles = [layer.register_forward_pre_hook(lambda _m, args: seen.append(args[0])) for layer in whole.model.layers]
    handles.append(whole.model.norm.register_forward_pre_hook(lambda _m, args: seen.append(args[0])))
    with torch.no_grad():
        whole(TOKENS)
    for handle in handles:
        handle.remove()
    return seen


def angle(a, b):
    dot = sum(x * y for x, y in zip(a, b, strict=True))
    lengths = math.sqrt(sum(x * x for x in a)) * math.sqrt(sum(y * y for y in b))
    return max(-1.0, min(1.0, dot / lengths))


def literal(whole, span, distance):
    seen, means = boundaries(whole), []
    for start in range(DEPTH + 1 - span):
        values = [
            distance(angle(seen[start][n, t].double().tolist(), seen[start + span][n, t].double().tolist()))
            for n in range(4)
            for t in range(20)
            if REAL[n, t]
        ]
        means.append(sum(values) / len(values))
    return means


def test_block_influence_is_the_papers(directory, whole, tmp_path):
    found = distances(open_model(directory), BATCH, 1, block_influence, tmp_path)
    assert found == pytest.approx(literal(whole, 1, lambda cosine: 1 - cosine), abs=1e-5)


@pytest.mark.parametrize("span", [2, 4, DEPTH])
def test_angular_distance_is_the_papers(span, directory, whole, tmp_path):
    found = distances(open_model(directory), BATCH, span, angular_distance, tmp_path)
    assert len(found) == DEPTH + 1 - span
    assert found == pytest.approx(literal(whole, span, lambda cosine: math.acos(cosine) / math.pi), abs=1e-4)


def test_the_best_by_brute_force():
    numbers = random.Random(0)
    for _ in range(50):
        values = [numbers.choice([0.1, 0.2, 0.3, 0.4]) for _ in range(9)]
        candidates, count = list(range(1, 8)), numbers.randrange(1, 7)
        chosen = least_influential(values, candidates, count)
        assert sorted(chosen) == chosen
        left = [values[layer] for layer in candidates if layer not in chosen]
        assert max(values[layer] for layer in chosen) <= min(left, default=math.inf)
        run = least_distant_run(values, candidates, count)
        assert run == list(range(run[0], run[0] + count))
        assert set(run) <= set(candidates)
        assert values[run[0]] == min(values[start] for start in range(1, 9 - count))


def test_of_equals_the_earlier_goes():
    assert least_influential([0.5] * 6, [1, 2, 3, 4], 2) == [1, 2]
    assert least_distant_run([0.5] * 6, [1, 2, 3, 4], 2) == [1, 2]
    assert next_to_go({4: 0.5, 2: 0.5, 3: 0.7}) == 2


# --- the fold ---


def problem(tokens=300, outs=7, ins=12, seed=0):
    draw = torch.Generator().manual_seed(seed)
    x_TI = torch.randn(tokens, ins, generator=draw) * torch.linspace(0.1, 30, ins)
    return x_TI, torch.randn(tokens, outs, generator=draw), torch.randn(tokens, outs, generator=draw)


def test_the_fold_is_least_squares():
    x_TI, out_TH, target_TH = problem()
    statistics = FoldStatistics()
    for part in range(0, 300, 100):
        at = slice(part, part + 100)
        statistics.add(x_TI[at], out_TH[at], [target_TH[at]])
    (folded,) = statistics.solve(damping=1e-9)
    exact_IH = torch.linalg.lstsq(x_TI.double(), (target_TH - out_TH).double()).solution
    torch.testing.assert_close(folded.delta_HI.double(), exact_IH.T, rtol=1e-3, atol=1e-5)
    missing_TH = target_TH.double() - out_TH.double()
    energy = target_TH.double().square().sum()
    assert folded.error_before == pytest.approx(float(missing_TH.square().sum() / energy), rel=1e-5)
    left_TH = missing_TH - x_TI.double() @ folded.delta_HI.double().T
    assert folded.error_after == pytest.approx(float(left_TH.square().sum() / energy), rel=1e-5)


def test_damping_is_ridge_regression_on_scaled_inputs():
    x_TI, out_TH, target_TH = problem()
    statistics = FoldStatistics()
    statistics.add(x_TI, out_TH, [target_TH])
    (folded,) = statistics.solve(damping=0.1)
    scale_I = x_TI.double().square().sum(0).sqrt()
    unit_TI = x_TI.double() / scale_I
    rows_TI = torch.cat([unit_TI, math.sqrt(0.1) * torch.eye(12, dtype=torch.double)])
    wanted_TH = torch.cat([(target_TH - out_TH).double(), torch.zeros(12, 7, dtype=torch.double)])
    exact_IH = torch.linalg.lstsq(rows_TI, wanted_TH).solution
    torch.testing.assert_close(folded.delta_HI.double(), (exact_IH / scale_I[:, None]).T, rtol=1e-3, atol=1e-6)


def test_inputs_that_are_always_zero_learn_nothing_and_do_no_harm():
    x_TI, out_TH, target_TH = problem()
    x_TI[:, 3] = 0
    statistics = FoldStatistics()
    statistics.add(x_TI, out_TH, [target_TH])
    (folded,) = statistics.solve()
    assert folded.delta_HI[:, 3].abs().max() == 0
    assert folded.delta_HI.isfinite().all()


def test_several_targets_are_as_good_as_one_after_the_other():
    x_TI, out_TH, target_TH = problem()
    both, one = FoldStatistics(2), FoldStatistics()
    both.add(x_TI, out_TH, [target_TH, out_TH])
    one.add(x_TI, out_TH, [target_TH])
    first, second = both.solve()
    torch.testing.assert_close(first.delta_HI, one.solve()[0].delta_HI)
    assert second.delta_HI.abs().max() == 0
    assert second.error_after == 0


def test_a_fold_on_a_real_block_is_that_of_its_hooks(directory, whole, tmp_path):
    """x and out by hooks of transformers; the fold of the run of layers 2 and 3 into layer 1."""
    seen, inputs = boundaries(whole), []
    handle = whole.model.layers[1].mlp.down_proj.register_forward_pre_hook(lambda _m, args: inputs.append(args[0]))
    with torch.no_grad():
        whole(TOKENS)
    handle.remove()
    statistics = FoldStatistics()
    statistics.add(inputs[0][REAL], seen[2][REAL], [seen[4][REAL]])
    expected = statistics.solve()[0]
    model = open_model(directory)
    model.embed(TOKENS[:1])
    states = [HiddenStates((4, 20, 64), torch.float32) for _ in range(2)]
    for hidden, boundary in zip(states, (seen[1], seen[4]), strict=True):
        hidden.states_NTH.copy_(boundary)
    model.load_block(1)
    (found,) = fit_folds(model, 1, states[0], REAL, [states[1]])
    assert found.error_after == pytest.approx(expected.error_after, rel=1e-3)
    assert found.error_after < 0.9 * found.error_before


# --- the fold of a matrix with a bias ---


def ridge(x_TI, wanted_TH, damping):
    """The (I, H) of least squares with a damping that counts in units of each input's own length, in double."""
    lengths_I = x_TI.square().sum(0).sqrt()
    scale_I = torch.where(lengths_I > 0, lengths_I, torch.inf)  # ReLU leaves some inputs at zero for all tokens
    rows_TI = torch.cat([x_TI / scale_I, math.sqrt(damping) * torch.eye(x_TI.shape[1], dtype=torch.double)])
    padded_TH = torch.cat([wanted_TH, torch.zeros(x_TI.shape[1], wanted_TH.shape[1], dtype=torch.double)])
    return torch.linalg.lstsq(rows_TI, padded_TH).solution / scale_I[:, None]


def with_ones(x_TI):
    return torch.cat([x_TI, torch.ones_like(x_TI[:, :1])], dim=1)


@pytest.mark.parametrize("share", [1.0, 0.25])
def test_a_bias_is_one_more_column_of_least_squares(share):
    x_TI, out_TH, target_TH = problem()
    target_TH += torch.arange(7)  # nothing but a bias gives that
    statistics = FoldStatistics(bias=True)
    statistics.add(x_TI, out_TH, [target_TH], share)
    (folded,) = statistics.solve(damping=1e-9)
    exact_IH = torch.linalg.lstsq(share * with_ones(x_TI.double()), (target_TH - out_TH).double()).solution
    torch.testing.assert_close(folded.delta_HI.double(), exact_IH[:-1].T, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(folded.delta_bias_H.double(), exact_IH[-1], rtol=1e-3, atol=1e-4)


def test_it_is_no_worse_than_the_papers_matrix_between_product_and_residual():
    """ReplaceMe, Section 3.2: T by least squares on the products, then W' = T W and b' = T b."""
    draw = torch.Generator().manual_seed(5)
    x_TI, weight_HI, bias_H = (torch.randn(*size, generator=draw) for size in ((300, 12), (12, 12), (12,)))
    residual_TH, target_TH = (torch.randn(300, 12, generator=draw) for _ in range(2))
    product_TH = x_TI @ weight_HI.T + bias_H
    target_TH += 3 * bias_H
    t_HH = torch.linalg.lstsq(product_TH.double(), (target_TH - residual_TH).double()).solution.T
    literal_TH = x_TI.double() @ (t_HH @ weight_HI.double()).T + t_HH @ bias_H.double() + residual_TH
    errors = {}
    for bias in (True, False):
        statistics = FoldStatistics(bias=bias)
        statistics.add(x_TI, residual_TH + product_TH, [target_TH])
        errors[bias] = statistics.solve(damping=1e-9)[0].error_after
    literal = float((literal_TH - target_TH).square().sum() / target_TH.square().sum())
    assert errors[True] < literal + 1e-5 < errors[False]


@pytest.mark.parametrize("name", ["gpt2", "opt"])
def test_weight_and_bias_that_are_written_are_the_literal_ones(name, tiny_tokenizer, tmp_path):
    """Layers 2 and 3 go; x and out of layer 1 and what the dense model has behind layer 3, by hooks of transformers."""
    depth = {"n_layer": DEPTH} if TINY[name].own_names else {"num_hidden_layers": DEPTH}
    sizes = {**TINY[name].sizes, **depth, "vocab_size": len(tiny_tokenizer)}
    dense = save_tiny(Family(name, name, "", sizes, TINY[name].own_names), tmp_path / "dense")
    tiny_tokenizer.save_pretrained(dense)
    (tmp_path / "text.txt").write_text("".join(f"{n} brown foxes, {n * 7} lazy dogs. " for n in range(200)))
    settings = LayersSettings.check(
        layers=4, calibration=(str(tmp_path / "text.txt"),), samples=8, length=32, dtype="float32", protect_last=2
    )
    shrunk = remove_layers(dense, tmp_path / "out", **{**settings.model_dump(), "protect_first": 2})
    assert shrunk.last_step["axes"]["layers"]["removed"] == [2, 3]
    tokens_NT = calibration_batch(open_model(dense), settings).tokens_NT
    before, after = (AutoModelForCausalLM.from_pretrained(d, dtype=torch.float32).eval() for d in (dense, shrunk.path))
    parameters = [dict(find_blocks(model)[1][1].named_parameters()) for model in (before, after)]
    weight, bias = ("mlp.c_proj.weight", "mlp.c_proj.bias") if name == "gpt2" else ("fc2.weight", "fc2.bias")
    assert [n for n in parameters[0] if not torch.equal(*(p[n] for p in parameters))] == [weight, bias]
    seen = []
    last = find_blocks(before)[1][1].get_submodule(weight.removesuffix(".weight"))
    last.register_forward_pre_hook(lambda _m, args: seen.append(args[0].flatten(0, -2).double()))
    with torch.no_grad():
        hidden = before(tokens_NT, output_hidden_states=True).hidden_states
        own = after(tokens_NT, output_hidden_states=True).hidden_states
    wanted_TH = (hidden[4] - hidden[2]).flatten(0, 1).double()
    exact_IH = ridge(with_ones(seen[0]), wanted_TH, DAMPING)
    deltas = [(new[n] - old[n]).detach() for old, new in [parameters] for n in (weight, bias)]
    delta_IH = deltas[0] if name == "gpt2" else deltas[0].T
    torch.testing.assert_close(delta_IH.double(), exact_IH[:-1], rtol=1e-2, atol=2e-3)
    torch.testing.assert_close(deltas[1].double(), exact_IH[-1], rtol=1e-2, atol=2e-3)
    error = float((own[2] - hidden[4]).square().sum() / hidden[4].square().sum())
    assert error == pytest.approx(shrunk.last_step["folds"][0]["error"], rel=1e-3)


# --- greedy KL ---


def logits_without(whole, removed):
    """The whole model again, in which these layers pass on what they are given."""
    layers = whole.model.layers
    for layer in removed:
        layers[layer].__dict__["forward"] = lambda hidden_states, *_, **__: hidden_states
    try:
        with torch.no_grad():
            return torch.cat([whole(TOKENS[n : n + 1]).logits for n in range(4)])
    finally:
        for layer in removed:
            del layers[layer].__dict__["forward"]


def literal_kl(whole, removed, judged):
    log_p, log_q = logits_without(whole, []).log_softmax(-1), logits_without(whole, removed).log_softmax(-1)
    kl_NT = (log_p.exp() * (log_p - log_q)).sum(-1)[:judged]
    return float(kl_NT[REAL[:judged]].mean())


@pytest.mark.parametrize("removed", [[], [2], [1, 4]])
def test_greedy_with_shared_prefixes_is_greedy_without(removed, directory, whole, tmp_path):
    judge = Judge(model=open_model(directory), batch=BATCH, judged=3, fold=False, folder=tmp_path)
    kept = [layer for layer in range(DEPTH) if layer not in removed]
    candidates = [layer for layer in kept if layer != 3]
    found = judge.kl_without_each(kept, candidates)
    expected = {layer: literal_kl(whole, [*removed, layer], 3) for layer in candidates}
    assert found.keys() == expected.keys()
    for layer, kl in expected.items():
        assert found[layer] == pytest.approx(kl, rel=1e-3), layer
