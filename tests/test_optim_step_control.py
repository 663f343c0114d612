"""Training without a damping, and training that diverges: λ, δ and the schedule by their formulas, and what is said."""

from __future__ import annotations

import math
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fisherkit as fk
from fisherkit.errors import FisherkitError, InvalidArgumentError, InvalidTypeError
from tests.optim_cases import backward, close, damped, fisher, jacobian, problem
from tests.reference.fisher import Problem


def gradients(model: nn.Module) -> Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def stepped(preconditioner: Any, of: Problem) -> Tensor:
    of.model.zero_grad()
    backward(of)
    preconditioner.step()
    return gradients(of.model)


# -- without a damping -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("structure", ["kfac", "ekfac", "diagonal"])
@pytest.mark.parametrize("kind", ["ief", "exact"])
def test_defaults__are_ten_mean_eigenvalues_and_a_clip(kind: str, structure: str) -> None:
    of = problem("mlp")
    matrix, g = fisher(of, kind, structure), jacobian(of)[0].mean(0)
    expected = damped(matrix, g, 10 * float(matrix.trace()) / len(matrix))
    expected = expected * min(1.0, math.sqrt(0.01 / float(expected @ matrix @ expected)))
    preconditioner = fk.optim.Preconditioner(of.model, kind=kind, structure=structure)
    close(stepped(preconditioner, of), expected)


def test_defaults__hold_the_fisher_for_ten_steps_and_give_way_to_what_is_passed() -> None:
    of = problem("mlp")
    plain = fk.optim.Preconditioner(of.model)
    for _ in range(12):
        stepped(plain, of)
    assert plain.state_dict()["updates"] == 2
    matrix, g = fisher(of, "ief", "kfac"), jacobian(of)[0].mean(0)
    free = fk.optim.Preconditioner(of.model, trust_region=math.inf, update_every=3)
    expected = damped(matrix, g, 10 * float(matrix.trace()) / len(matrix))
    for _ in range(4):
        close(stepped(free, of), expected)
    assert free.state_dict()["updates"] == 2


@pytest.mark.parametrize("factor", [3.0, 1 / 3], ids=["grows", "shrinks"])
def test_steady_damping__follows_the_fisher_down_and_not_up(factor: float) -> None:
    of = problem("mlp")
    preconditioner = fk.optim.Preconditioner(
        of.model, kind="exact", damping=fk.optim.SteadyDamping(0.5), ema=0.0, update_every=1
    )
    scales = []
    for _ in range(2):
        with preconditioner.paused():
            matrix, g = fisher(of, "exact", "kfac"), jacobian(of)[0].mean(0)
        scales.append(float(matrix.trace()) / len(matrix))
        close(stepped(preconditioner, of), damped(matrix, g, 0.5 * min(scales)))
        with torch.no_grad():
            of.model.get_parameter("2.weight").mul_(factor)
    assert (scales[1] > scales[0]) == (factor > 1)


def test_steady_damping__of_a_fisher_of_zero_leaves_a_gradient_of_zero() -> None:
    model = nn.Linear(3, 4)
    preconditioner = fk.optim.Preconditioner(model, kind="ief", reduction="sum")
    with torch.no_grad():
        model.weight.zero_()
        model.bias.copy_(torch.tensor([300.0, 0.0, 0.0, 0.0]))
    F.cross_entropy(model(torch.ones(5, 3)), torch.zeros(5, dtype=torch.long), reduction="sum").backward()
    preconditioner.step()
    assert not gradients(model).any()


def test_full__has_no_damping_of_its_own() -> None:
    with pytest.raises(ValueError, match="damping=None and gram_damping=None"):
        fk.optim.Preconditioner(problem("mlp").model, structure="full")


# -- learning rates and dampings over two decades ----------------------------------------------------------------------

STEPS = 20
GRID = [(lr, damping) for lr in (0.03, 0.3, 3.0) for damping in (0.1, 10.0)]


def train(lr: float, kind: str, structure: str, **options: Any) -> tuple[str, float, float]:
    """What is said while a net that can diverge is trained, the loss at that moment and the loss at the start."""
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(96, 6, generator=generator), torch.randint(4, (96,), generator=generator)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4))
    sgd = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
    preconditioner = fk.optim.Preconditioner(model, kind=kind, structure=structure, **options)
    losses, broken = [], 0
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for k in range(STEPS + 3):
            if broken > 2 or (k >= STEPS and not broken):  # the parameters have NaN after one such step
                break
            take = slice(32 * (k % 3), 32 * (k % 3 + 1))
            sgd.zero_grad()
            loss = F.cross_entropy(model(x[take]), y[take])
            losses.append(float(loss.detach()))
            broken += not math.isfinite(losses[-1])
            try:
                loss.backward()
                preconditioner.step()
            except FisherkitError as error:
                return str(error), losses[-1], losses[0]
            sgd.step()
    return " ".join(str(one.message) for one in said), losses[-1], losses[0]


@pytest.mark.parametrize(
    ("kind", "structure"), [("ef", "ekfac"), ("ief", "kfac"), ("exact", "ekfac"), ("truncated:2", "kfac")]
)
def test_grid__nothing_is_raised_before_the_loss_diverges_and_then_it_says_so(kind: str, structure: str) -> None:
    for lr, scale in GRID:
        own = {"damping": fk.optim.SteadyDamping(scale), "trust_region": 0.01, "update_every": 5}
        for options in (own, {"damping": scale * 1e-3, "update_every": 2, "refresh_every": 5, "ema": 0.9}):
            said, last, first = train(lr, kind, structure, **options)
            diverged = not last < 10 * first
            assert not said or diverged, (lr, options)
            assert not said or "the loss has diverged" in said or "a loss that has diverged" in said, (lr, options)
            assert said or last < 1e30, (lr, options)


def test_defaults__train_a_small_net_over_a_decade_of_learning_rates() -> None:
    for kind in ("ief", "exact"):
        for lr in (0.03, 0.1, 0.3):
            said, last, first = train(lr, kind, "kfac")
            assert not said
            assert last < 0.95 * first, (kind, lr)


def test_steady_damping__is_refused_where_no_average_has_a_least_scale() -> None:
    torch.manual_seed(0)
    model, damping = nn.Linear(3, 2), fk.optim.SteadyDamping(10.0)
    x, y = torch.randn(4, 3), torch.tensor([0, 1, 1, 0])
    with pytest.raises(InvalidTypeError, match="damping of type SteadyDamping"):
        fk.EmpiricalFisher(model, (x, y)).solve(torch.ones(8), damping=damping)  # type: ignore[arg-type]
    for structure in ("full", "block"):
        optimizer = fk.optim.NaturalGradient(model, lr=0.1, damping=damping, structure=structure)
        F.cross_entropy(model(x), y).backward()
        with pytest.raises(InvalidArgumentError, match="keeps rows"):
            optimizer.step()
        optimizer.close()
