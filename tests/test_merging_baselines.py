"""Average, task arithmetic and RegMean by their formulas, and by the policies that all ways of merging share."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import fisherkit as fk
from tests.test_merging_policies import normed, state

merging = fk.merging
F64 = torch.float64


def trained() -> tuple[list[nn.Module], list[tuple[Tensor, Tensor]]]:
    torch.manual_seed(0)
    models = [
        nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3, bias=False), nn.LayerNorm(3)).double()
        for _ in range(3)
    ]
    data = [(torch.randn(n, 5, dtype=F64), torch.randint(3, (n,))) for n in (9, 12, 20)]
    return models, data


def test_average__weighs_every_parameter() -> None:
    a, b = state(0), state(1)
    result, info = merging.average([a, b], [1, 3], return_info=True)
    assert all(torch.allclose(result[name], (a[name] + 3 * b[name]) / 4) for name in a)
    assert info.names == {"w": "averaged", "b": "averaged"}
    assert info.weights == (1.0, 3.0)


def test_task_arithmetic__adds_scaled_task_vectors() -> None:
    base, a, b = state(0), state(1), state(2)
    result = merging.task_arithmetic([a, b], base, 0.3)
    assert all(torch.allclose(result[n], base[n] + 0.3 * (a[n] + b[n] - 2 * base[n]), atol=1e-6) for n in base)
    mean = merging.task_arithmetic([a, b], base, 0.5)
    assert all(torch.allclose(mean[n], tensor, atol=1e-6) for n, tensor in merging.average([a, b]).items())
    # Models that agree with each other and not with the base move away from it, as they must.
    far = merging.task_arithmetic([a, a], base, 1.0)
    assert all(torch.allclose(far[n], 2 * a[n] - base[n], atol=1e-6) for n in base)


def test_baselines__share_the_policies() -> None:
    models = [normed(0), normed(1)]
    for call in (
        lambda **settings: merging.average(models, **settings),
        lambda **settings: merging.task_arithmetic(models, normed(2), 0.4, **settings),
    ):
        with pytest.raises(fk.InvalidArgumentError, match=r"float buffers.*buffers=\"average\""):
            call()
        result = call(policy=fk.merging.MergePolicy(buffers="average", integers="first"))
        means = [m.state_dict()["1.running_mean"] for m in models]
        assert torch.allclose(result["1.running_mean"], sum(means) / 2)
    with pytest.raises(fk.InvalidArgumentError, match=r"'b' \(not in base\)"):
        merging.task_arithmetic([state(0), state(1)], {"w": torch.zeros(2, 3)}, 0.4)
    with pytest.raises(fk.InvalidTypeError, match="scale"):
        merging.task_arithmetic([state(0)], state(1), "0.4")  # type: ignore[arg-type]
    with pytest.raises(fk.InvalidArgumentError, match="scale"):
        merging.task_arithmetic([state(0)], state(1), float("nan"))


@pytest.mark.parametrize("shrink", [1.0, 0.9, 0.0])
@pytest.mark.parametrize("weights", [None, "examples"])
def test_regmean__is_the_least_squares_of_the_layers_outputs(shrink, weights) -> None:
    models, data = trained()
    fishers = [fk.EmpiricalFisher(m, d, structure="kfac") for m, d in zip(models, data, strict=True)]
    result, info = merging.regmean(models, fishers, weights, shrink=shrink, damping=0, return_info=True)
    for layer in (0, 2):
        left, right = torch.zeros(1), torch.zeros(1)
        for model, (x, _) in zip(models, data, strict=True):
            inputs = model[:layer](x)
            w = model[layer].weight.detach()
            if layer == 0:
                inputs, w = torch.cat([inputs, torch.ones(len(x), 1)], 1), torch.cat([w, model[0].bias[:, None]], 1)
            moment = (inputs.T @ inputs).detach() / (1 if weights else len(x))
            moment = shrink * moment + (1 - shrink) * moment.diagonal().diag()
            left, right = left + moment, right + moment @ w.T
        expected = torch.linalg.solve(left, right).T.detach()
        got = result[f"{layer}.weight"]
        got = torch.cat([got, result["0.bias"][:, None]], 1) if layer == 0 else got
        assert torch.allclose(got, expected, atol=1e-8)
    average = merging.average(models)
    assert torch.equal(result["3.weight"], average["3.weight"])
    assert info.names["3.bias"] in ("averaged", "equal")
    assert info.method == "regmean"
    assert info.converged


def test_regmean__is_the_merge_with_much_output_damping() -> None:
    models, data = trained()
    fishers = [fk.ExactFisher(m, d, structure="kfac") for m, d in zip(models, data, strict=True)]
    limit = merging.merge(models, fishers, normalize="output", output_damping=1e9, damping=0)
    result = merging.regmean(models, fishers, shrink=1.0, damping=0)
    for name in ("0.weight", "0.bias", "2.weight"):
        assert torch.allclose(limit[name], result[name], atol=1e-6)


def test_regmean__needs_kronecker_products() -> None:
    models, data = trained()
    fishers = [fk.EmpiricalFisher(m, d, structure="diagonal") for m, d in zip(models, data, strict=True)]
    with pytest.raises(fk.InvalidArgumentError, match=r'without a Kronecker product.*structure="kfac"'):
        merging.regmean(models, fishers)
    with pytest.raises(fk.InvalidArgumentError, match="shrink"):
        merging.regmean(models, fishers, shrink=1.5)


def test_regmean__names_itself_in_what_the_solver_refuses() -> None:
    models, data = trained()
    blind = [(x * torch.tensor([0.0, 1, 1, 1, 1], dtype=F64), y) for x, y in data]
    fishers = [fk.EmpiricalFisher(m, d, structure="kfac") for m, d in zip(models, blind, strict=True)]
    with pytest.raises(fk.SingularMatrixError, match=r"^regmean\(damping=0\): got a sum of Fishers"):
        merging.regmean(models, fishers, shrink=1.0, damping=0)
    with pytest.raises(fk.InvalidArgumentError, match=r"^regmean\(damping=-1\)"):
        merging.regmean(models, fishers, damping=-1)
    with pytest.raises(fk.NoClosedFormError, match=r"^EmpiricalFisher\.gram"):
        fishers[0].gram()
