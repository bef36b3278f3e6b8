"""ADMM against the algorithm written out in fp64 with a solve per step, and its polish against least squares."""

import pytest
import torch
from torch import Tensor

from prunus.errors import UserError
from prunus.sparsity import METHODS, NM, AdmmOptions, Pattern, Statistics, Unstructured, admm, keep_highest, prune

GENERATOR = torch.Generator().manual_seed(4)
INPUT_NI = torch.randn(90, 16, generator=GENERATOR, dtype=torch.float64) @ torch.randn(
    16, 16, generator=GENERATOR, dtype=torch.float64
)
WEIGHT_OI = torch.randn(10, 16, generator=GENERATOR, dtype=torch.float64)
GRAM_II = INPUT_NI.T @ INPUT_NI / 90
STATISTICS = Statistics(90, None, GRAM_II.float())


def literal_admm(pattern: Pattern, options: AdmmOptions) -> Tensor:
    """V = argmin of the augmented Lagrangian, Z = projection, U += V - Z; the dual is rescaled when rho doubles."""
    norm_I = GRAM_II.diagonal().sqrt()
    hessian_II = GRAM_II / (norm_I[:, None] * norm_I) + options.damping * torch.eye(16)
    dense_OI = WEIGHT_OI * norm_I
    value_OI, dual_OI, rho = dense_OI.clone(), torch.zeros_like(dense_OI), options.penalty
    sparse_OI = project(value_OI, pattern)
    dual_OI = value_OI - sparse_OI
    for stage in range(options.stages):
        for _ in range(options.iterations):
            right_OI = dense_OI @ hessian_II + rho * (sparse_OI - dual_OI)
            value_OI = torch.linalg.solve(hessian_II + rho * torch.eye(16), right_OI.T).T
            sparse_OI = project(value_OI + dual_OI, pattern)
            dual_OI = dual_OI + value_OI - sparse_OI
        rho, dual_OI = rho * 2, dual_OI / 2
        assert rho == options.penalty * 2 ** (stage + 1)
    return sparse_OI / norm_I


def project(value_OI: Tensor, pattern: Pattern) -> Tensor:
    return value_OI * keep_highest(value_OI.abs(), pattern)


@pytest.mark.parametrize(
    "pattern", [Unstructured(0.5, "matrix"), Unstructured(0.5, "row"), NM(2, 4), NM(1, 4)], ids=str
)
@pytest.mark.parametrize("stages", [1, 3])
def test_iterations_follow_the_equations(pattern: Pattern, stages: int) -> None:
    options = AdmmOptions(stages=stages, iterations=2, polish=0)
    result = prune(METHODS["admm"], WEIGHT_OI.float(), STATISTICS, pattern, options)
    torch.testing.assert_close(result.weight_OI, literal_admm(pattern, options).float(), rtol=1e-3, atol=1e-4)


def test_polish_reaches_the_least_squares_of_the_support() -> None:
    result = prune(METHODS["admm"], WEIGHT_OI.float(), STATISTICS, NM(2, 4), AdmmOptions(polish=16))
    hessian_II = GRAM_II + AdmmOptions().damping * GRAM_II.diagonal().diag()
    for row, keep_I in enumerate(result.keep_OI):
        right = (hessian_II @ WEIGHT_OI[row])[keep_I]
        best = torch.linalg.solve(hessian_II[keep_I][:, keep_I], right)
        torch.testing.assert_close(result.weight_OI[row, keep_I], best.float(), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    "setting", [{"stages": 0}, {"iterations": 0}, {"polish": -1}, {"damping": 0.0}, {"penalty": -1.0}]
)
def test_impossible_settings_are_refused(setting: dict[str, float]) -> None:
    with pytest.raises(UserError, match="AdmmOptions"):
        AdmmOptions(**setting)  # type: ignore[arg-type]


def test_inverses_made_one_at_a_time_give_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = (METHODS["admm"], WEIGHT_OI.float(), STATISTICS, NM(2, 4))
    kept = prune(*arguments)
    monkeypatch.setattr(admm, "KEPT_WIDTH", 0)
    assert torch.equal(prune(*arguments).weight_OI, kept.weight_OI)
