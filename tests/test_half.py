"""Models in half precision: rows, sums, factors and solves in float32, gradients that do not underflow.

The truth is the same weights in float64, one autograd call a row, up to what the model's own passes round.
"""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fisherkit as fk
from fisherkit.rows.differentiable import TARGETS, scales
from tests import by_hand
from tests.tolerances import HALF

DTYPES = list(HALF)
STRUCTURES = ("full", "block", "diagonal", "kfac", "ekfac")
CLASSES, N = 5, 7


class Scaled(nn.Module):
    """Custom arithmetic around a parameter, which no layer rule covers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 4), nn.Linear(4, CLASSES)
        self.slope = nn.Parameter(torch.rand(4) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.first(x) * self.slope.exp()))


class Tokens(nn.Module):
    """Embedding, norm and attention, with an output for each sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.norm = nn.Embedding(11, 8), nn.LayerNorm(8)
        self.mix, self.last = nn.MultiheadAttention(8, 2, batch_first=True), nn.Linear(8, CLASSES)

    def forward(self, ids: Tensor) -> Tensor:
        h = self.norm(self.table(ids))
        return self.last((h + self.mix(h, h, h, need_weights=False)[0]).mean(1))


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, CLASSES))


def conv() -> nn.Module:
    norm = nn.BatchNorm2d(3)
    norm.running_var.mul_(2.0)  # type: ignore[union-attr, operator]
    return nn.Sequential(
        nn.Conv2d(2, 3, 3, padding=1), norm, nn.Tanh(), nn.GroupNorm(1, 3), nn.Flatten(), nn.Linear(48, CLASSES)
    ).eval()


FAMILIES: dict[str, tuple[Any, tuple[int, ...]]] = {
    "mlp": (mlp, (6,)),
    "generic": (Scaled, (6,)),
    "conv": (conv, (2, 4, 4)),
    "tokens": (Tokens, ()),
}


def case(family: str, dtype: torch.dtype) -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    make, shape = FAMILIES[family]
    x = torch.randn(N, *shape).to(dtype) if shape else torch.randint(11, (N, 4))
    return make().to(dtype), x, torch.randint(CLASSES, (N,))


def truth(model: nn.Module, x: Tensor, y: Tensor, kind: str = "ef") -> Tensor:
    """F in float64 at the half model's own weights, one autograd call a row."""
    wide = copy.deepcopy(model).double()
    return by_hand.fisher(wide, (x.double() if x.is_floating_point() else x, y), kind)


def error(got: Tensor, expected: Tensor) -> float:
    return float((got.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", ["ef", "exact"])
def test_build__is_near_the_same_weights_in_float64(family: str, kind: str, dtype: torch.dtype) -> None:
    model, x, y = case(family, dtype)
    expected = truth(model, x, y, kind)
    make = fk.EmpiricalFisher if kind == "ef" else fk.ExactFisher
    for structure in STRUCTURES:
        fisher = make(model, [(x[:4], y[:4]), (x[4:], y[4:])], structure=structure)
        assert fisher.dtype == fisher.diagonal().dtype == torch.float32
        if structure in ("full", "block", "diagonal"):
            assert error(fisher.diagonal(), expected.diagonal()) < HALF[dtype], structure
        if structure == "full":
            assert error(fisher.to_dense(), expected) < HALF[dtype]
        if structure == "kfac":
            wide = x.double() if x.is_floating_point() else x
            twin = make(copy.deepcopy(model).double(), (wide, y), structure=structure)
            assert error(fisher.to_dense(), twin.to_dense()) < HALF[dtype]
        else:
            assert error(fisher.trace(), expected.trace()) < HALF[dtype], structure
    streamed = make(model, (x, y), memory_budget=1)
    assert error(streamed.matvec(torch.ones(streamed.size)), expected.sum(1)) < HALF[dtype]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("structure", STRUCTURES)
def test_operations__are_those_of_its_own_dense_matrix(structure: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model, x, y = case("mlp", dtype)
    fisher, damping = fk.EmpiricalFisher(model, (x, y), structure=structure), 1e-2
    dense = fisher.to_dense().double()
    damped = dense + damping * torch.eye(fisher.size, dtype=torch.float64)
    v = torch.ones(fisher.size, dtype=dtype)
    for solution in (fisher.solve(v, damping), fisher.factorize(damping).matvec(v)):
        assert solution.dtype == torch.float32
        assert error(solution, torch.linalg.solve(damped, v.double())) < 1e-4
    assert float((fisher.logdet(damping) - damped.logdet()).abs()) < 1e-3 * float(damped.logdet().abs())
    values = fisher.eigenvalues(3)
    assert error(values, torch.linalg.eigvalsh(dense).flip(0)[:3]) < 1e-4
    assert fisher.factorize(damping).sample(torch.Generator().manual_seed(0)).dtype == torch.float32
    fisher.save(tmp_path / "f.safetensors")
    loaded = fk.load(tmp_path / "f.safetensors")
    assert loaded.dtype == torch.float32
    assert torch.equal(loaded.matvec(v), fisher.matvec(v))


def test_vectors__of_half_precision_are_widened_and_others_refused() -> None:
    model, x, y = case("mlp", torch.bfloat16)
    fisher = fk.EmpiricalFisher(model, (x, y))
    named = {name: torch.randn_like(p) for name, p in model.named_parameters()}
    product = fisher.matvec(named)
    assert all(part.dtype == torch.float32 for part in product.values())
    flat = fisher.space.flatten(named)
    assert torch.equal(fisher.space.flatten(product), fisher.matvec(flat.float()))
    assert torch.equal(fisher.quadratic_form(flat), fisher.quadratic_form(flat.float()))
    with pytest.raises(fk.InvalidTypeError, match="Nothing is cast silently"):
        fisher.matvec(flat.double())


@pytest.mark.parametrize("structure", ["diagonal", "full"])
@pytest.mark.parametrize("family", ["mlp", "generic"])
def test_float16__small_gradients_do_not_underflow(family: str, structure: str) -> None:
    model, x, y = case(family, torch.float16)
    last = model.last if isinstance(model, Scaled) else model[2]  # type: ignore[index]
    last.weight.data.mul_(1e-5)  # type: ignore[union-attr, operator]
    expected = truth(model, x, y).diagonal()
    names = [name for name, _ in model.named_parameters()]
    fisher = fk.EmpiricalFisher(model, (x, y), structure=structure)
    found = fisher.space.unflatten(fisher.diagonal())
    sizes = [p.numel() for p in model.parameters()]
    for name, part in zip(names, expected.split(sizes), strict=True):
        assert error(found[name].flatten(), part) < HALF[torch.float16], name


def test_float16__examples_that_are_fitted_keep_their_digits() -> None:
    torch.manual_seed(0)
    model, x = nn.Linear(6, 3).half(), torch.randn(N, 6).half()
    model.bias.data.copy_(torch.tensor([17.0, 0.0, 0.0]))  # p of the others is 4e-8
    y = torch.zeros(N, dtype=torch.long)
    expected = truth(model, x, y).diagonal()
    assert error(fk.EmpiricalFisher(model, (x, y), structure="diagonal").diagonal(), expected) < 0.05


def test_float16__a_gradient_that_overflows_is_tried_with_a_smaller_one() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3)).half()
    model[1].weight.data.mul_(1000)
    x, y = (torch.randn(N, 4) * 1e-2).half(), torch.randint(3, (N,))
    expected = truth(model, x, y).diagonal()
    assert error(fk.EmpiricalFisher(model, (x, y), structure="diagonal").diagonal(), expected) < 0.05


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_kfac__of_fewer_examples_than_inputs_solves(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model, x, y = nn.Linear(32, 4).to(dtype), torch.randn(8, 32).to(dtype), torch.randint(4, (8,))
    found = fk.EmpiricalFisher(model, (x, y), structure="kfac").solve(torch.ones(132, dtype=dtype), damping=1e-2)
    wide = fk.EmpiricalFisher(copy.deepcopy(model).double(), (x.double(), y), structure="kfac")
    assert error(found, wide.solve(torch.ones(132, dtype=torch.float64), damping=1e-2)) < HALF[dtype]


def test_float16__a_diagonal_of_1e_8_is_that_of_float32() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 40))
    model[2].weight.data.mul_(1e-3)
    x, y = torch.randn(12, 16), torch.randint(40, (12,))
    single = fk.EmpiricalFisher(model, (x, y), structure="diagonal").diagonal()[:272]
    found = fk.EmpiricalFisher(model.half(), (x.half(), y), structure="diagonal").diagonal()[:272]
    assert not bool((found == 0).any())
    assert error(found, single.double()) < HALF[torch.float16]


def test_scales__are_powers_of_two_of_each_example() -> None:
    v = torch.tensor([[[3.0, -1.0], [0.0, 0.0], [1e-9, 0.0]]])
    for target, scale in zip(TARGETS, scales(v), strict=True):
        assert torch.equal(torch.frexp(scale).mantissa, torch.full((1, 3), 0.5))
        largest = (v / scale.unsqueeze(2)).abs().amax(2)[0, [0, 2]]
        assert bool(((largest >= 2.0 ** (target - 1)) & (largest < 2.0**target)).all())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("structure", STRUCTURES)
def test_influence__of_half_models_is_near_float64(structure: str, dtype: torch.dtype) -> None:
    model, x, y = case("mlp", dtype)
    found, wide = (
        fk.influence.InfluenceScores(fk.EmpiricalFisher(m, (a, y), structure=structure), m, damping=0.1).scores(
            (a[:3], y[:3]), (a, y)
        )
        for m, a in ((model, x), (copy.deepcopy(model).double(), x.double()))
    )
    assert found.dtype == torch.float32
    assert error(found, wide) < HALF[dtype]


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("kind", ["ief", "exact"])
def test_optimizers__take_steps_near_the_float32_ones(kind: str, structure: str) -> None:
    changes = []
    for dtype in (torch.float32, torch.bfloat16):
        model, x, y = case("mlp", torch.bfloat16)
        model, x = model.to(dtype), x.to(dtype)
        preconditioner = fk.optim.Preconditioner(model, kind=kind, structure=structure, damping=0.1, ema=0.0)
        for p in model.parameters():
            p.grad = None
        F.cross_entropy(model(x), y).backward()
        preconditioner.step()
        changes.append(torch.cat([p.grad.flatten().double() for p in model.parameters() if p.grad is not None]))
        preconditioner.close()
        optimizer = fk.optim.NaturalGradient(model, lr=0.1, kind=kind, structure=structure, damping=0.1, momentum=0.9)
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        assert all(state["momentum_buffer"].dtype == dtype for state in optimizer.state.values())
        optimizer.close()
    assert error(changes[1], changes[0]) < 0.1


def test_ewc__keeps_a_half_model_by_a_float32_fisher() -> None:
    model, x, y = case("mlp", torch.bfloat16)
    fisher = fk.EmpiricalFisher(model, (x, y), structure="kfac")
    ewc = fk.continual.EWC(model, strength=1.0, normalize=None)
    ewc.consolidate(fisher)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.25)
    penalty = ewc.penalty()
    penalty.backward()
    d = torch.cat([p.detach().flatten() for p in model.parameters()])
    d = d.float() - torch.cat([p.detach().flatten() for p in case("mlp", torch.bfloat16)[0].parameters()]).float()
    assert error(penalty.detach(), 0.5 * fisher.quadratic_form(d)) < HALF[torch.bfloat16]
    with pytest.raises(fk.ModelError, match="measured at other parameters"):
        ewc.consolidate(fisher)


def test_compare_and_merge__take_half_models() -> None:
    model, x, y = case("mlp", torch.bfloat16)
    other = copy.deepcopy(model)
    with torch.no_grad():
        other[0].weight.add_(0.1)  # type: ignore[index, union-attr, operator]
    table = fk.evaluation.compare(model, (x, y), kinds=["ef", "exact"], structures=["full", "kfac"])
    assert all(row.gamma == row.gamma for row in table.rows)
    fishers = [fk.EmpiricalFisher(m, (x, y), structure="kfac") for m in (model, other)]
    merged = fk.merging.merge([model, other], fishers, damping=1e-3)
    assert all(tensor.dtype == torch.bfloat16 for tensor in merged.values())
    gradient = fk.evaluation.loss_gradient(model, (x, y))
    assert float(fk.evaluation.approximation_quality(gradient, fk.ExactFisher(model, (x, y)), gradient)) > 0
