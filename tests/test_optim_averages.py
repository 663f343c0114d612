"""Averages of curvature over steps, and the sums that they are made of."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fisherkit as fk
from fisherkit.rows import FactoredRows
from fisherkit.rows.chunks import Chunk
from fisherkit.rows.collection import Rows, UnitSlot
from fisherkit.space import ParameterSpace
from fisherkit.structures import structures
from tests.axes import paired
from tests.optim_cases import (
    OPTIONS,
    backward,
    blockwise,
    close,
    damped,
    fisher,
    flat,
    jacobian,
    one_step,
    places,
    problem,
)
from tests.reference.fisher import Problem

LAMBDA = 0.05


# -- running averages --------------------------------------------------------------------------------------------------


def halves(of: Problem) -> list[Problem]:
    n = len(of.targets) // 2
    assert isinstance(of.inputs, Tensor)
    return [Problem(of.model, of.inputs[take], of.targets[take]) for take in (slice(n), slice(n, 2 * n))]


def gradients(model: nn.Module) -> Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def after_both(preconditioner: Any, first: Problem, second: Problem, reduction: str = "mean") -> Tensor:
    """The gradients after a step for each."""
    for of in (first, second):
        first.model.zero_grad()
        backward(of, reduction)
        preconditioner.step()
    return gradients(first.model)


def kfac_factors(of: Problem) -> list[tuple[Tensor, Tensor]]:
    """A and G of each linear layer of an MLP for iEF, by a loop over examples: the paper's equation 43."""
    model = of.model
    assert isinstance(model, nn.Sequential)
    found = []
    for layer in (model[0], model[2]):
        A, G = 0.0, 0.0
        for n in range(len(of.targets)):
            seen: list[Any] = []
            handle = layer.register_forward_hook(lambda _m, args, out, seen=seen: seen.extend([args[0], out]))
            z = model(of.inputs[n : n + 1])
            handle.remove()
            p = torch.softmax(z.detach(), -1)
            u = p - nn.functional.one_hot(of.targets[n], p.shape[-1])
            (g,) = torch.autograd.grad(z, seen[1], u)
            a = torch.cat([seen[0], torch.ones(1, 1, dtype=torch.float64)], 1).detach()
            A, G = A + a.T @ a, G + g.T @ g / u.square().sum()
        found.append((A / len(of.targets), G / len(of.targets)))
    return found


def averaged_factors(seen: list[list[tuple[Tensor, Tensor]]], ema: float) -> list[tuple[Tensor, Tensor]]:
    """Of each layer, the means of A and of G over batches, in order, weighed by ema to the power of their age."""
    weights = [ema**age for age in reversed(range(len(seen)))]
    return [
        tuple(
            sum(w * one for w, one in zip(weights, side, strict=True)) / sum(weights) for side in zip(*own, strict=True)
        )
        for own in zip(*seen, strict=True)
    ]  # type: ignore[misc]  # pairs


def by_layer(of: Problem, matrices: list[Tensor], vector: Tensor, damping: float) -> Tensor:
    """(⊕ Gᵢ ⊗ Aᵢ + λI)⁻¹ v, each layer's matrix over [weight | bias]."""
    result = []
    for matrix, prefix in zip(matrices, ("0", "2"), strict=True):
        w, b = (vector[places(of)[f"{prefix}.{part}"]] for part in ("weight", "bias"))
        both = torch.cat([w.reshape(len(b), -1), b[:, None]], 1)
        solved = damped(matrix, both.flatten(), damping).reshape(both.shape)
        result += [solved[:, :-1].flatten(), solved[:, -1]]
    return torch.cat(result)


def test_ema__averages_the_kronecker_factors() -> None:
    first, second = halves(problem("mlp"))
    factors, gradient = [kfac_factors(first), kfac_factors(second)], jacobian(second)[0].mean(0)
    found = after_both(fk.optim.Preconditioner(first.model, kind="ief", damping=LAMBDA, ema=0.7), first, second)
    mixed = [torch.kron(g, a) for a, g in averaged_factors(factors, 0.7)]
    close(found, by_layer(first, mixed, gradient, LAMBDA))


def test_ema__weighs_batches_by_their_age_alone() -> None:
    of = problem("mlp")
    seen = list[list[tuple[Tensor, Tensor]]]()
    preconditioner = fk.optim.Preconditioner(of.model, kind="ief", damping=LAMBDA, ema=0.9)
    for step in range(4):
        with preconditioner.paused():
            seen.append(kfac_factors(of))
            gradient = jacobian(of)[0].mean(0)
        of.model.zero_grad()
        backward(of)
        preconditioner.step()
        mixed = [torch.kron(g, a) for a, g in averaged_factors(seen, 0.9)]
        close(gradients(of.model), by_layer(of, mixed, gradient, LAMBDA))
        with torch.no_grad():
            of.model.get_parameter("0.weight").mul_(1.0 + 0.3 * step)


class Skipping(nn.Module):
    """A layer between two others that a call may leave out."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.between, self.last = nn.Linear(3, 4), nn.Linear(4, 4, bias=False), nn.Linear(4, 3)

    def forward(self, x: Tensor, used: bool = True) -> Tensor:
        h = torch.tanh(self.first(x))
        return self.last(h + torch.tanh(self.between(h)) if used else h)


@pytest.mark.parametrize("structure", ["diagonal", "kfac"])
@pytest.mark.parametrize("again", [False, True], ids=["at once", "by way of a state"])
def test_ema__of_a_layer_begins_with_the_first_update_that_uses_it(again: bool, structure: str) -> None:
    torch.manual_seed(0)
    model, ema, seen = Skipping().double(), 0.7, list[list[Tensor] | None]()

    def preconditioner() -> Any:
        return fk.optim.Preconditioner(model, kind="ef", structure=structure, damping=LAMBDA, ema=ema)

    made = preconditioner()
    for used in (False, False, True, True, False, True):
        x, y = torch.randn(6, 3).double(), torch.randint(3, (6,))
        rows = torch.zeros(6, 4, 4, dtype=torch.float64)
        with made.paused():
            h = torch.tanh(model.first(x)).detach()
            for n in range(6 if used else 0):
                loss = nn.functional.cross_entropy(model(x[n : n + 1]), y[n : n + 1])
                (rows[n],) = torch.autograd.grad(loss, model.between.weight)
        model.zero_grad()
        nn.functional.cross_entropy(model(x, used), y).backward()
        gradient = rows.mean(0)
        made.step()
        g = rows @ h.unsqueeze(2) / h.square().sum(1)[:, None, None]  # of rows g hᵀ
        own = [rows.square().mean(0), h.T @ h / 6, (g @ g.mT).mean(0)]
        if used or seen:  # from the first time on
            seen.append(own if used else None)
        if seen:

            def average(i: int, *, zeros: bool, seen: Any = seen) -> Any:
                ages = [(ema**k, one) for k, one in enumerate(reversed(seen)) if one is not None or zeros]
                return sum(w * one[i] for w, one in ages if one is not None) / sum(w for w, _ in ages)

            matrix = average(0, zeros=True).flatten().diag()
            if structure == "kfac":
                matrix = torch.kron(average(2, zeros=True), average(1, zeros=False))
            expected = torch.linalg.solve(matrix + LAMBDA * torch.eye(16), gradient.flatten())
            if used:
                close(model.between.weight.grad.flatten(), expected)
        if again:
            state = made.state_dict()
            made.close()
            made = preconditioner()
            made.load_state_dict(state)


def test_ema__of_a_state_without_ages_goes_on_as_if_all_layers_were_as_old() -> None:
    of, ends = problem("mlp"), []
    for old in (False, True):
        made = fk.optim.Preconditioner(of.model, kind="ief", damping=LAMBDA, ema=0.7)
        after_both(made, *halves(of))
        state = made.state_dict()
        if old:
            state["averages"] = [{k: v for k, v in entry.items() if k != "updates"} for entry in state["averages"]]
            state.pop("checksum")
        made.close()
        made = fk.optim.Preconditioner(of.model, kind="ief", damping=LAMBDA, ema=0.7)
        made.load_state_dict(state)
        ends.append(after_both(made, *halves(of)))
        made.close()
    assert torch.equal(*ends)


def test_refresh_every__keeps_the_eigenbasis_and_renews_the_moments() -> None:
    # Enough examples for a basis that no null space leaves open.
    first, other = problem("mlp"), problem("mlp", seed=1)
    second = Problem(first.model, other.inputs, other.targets)
    mixed, gradient = [], jacobian(second)[0].mean(0)
    for layer, (A, G) in zip(("0", "2"), kfac_factors(first), strict=True):
        basis = torch.kron(torch.linalg.eigh(G)[1], torch.linalg.eigh(A)[1])
        moments = []
        for of in (first, second):
            J, s = jacobian(of)
            w = J[:, places(of)[f"{layer}.weight"]].reshape(len(J), len(G), -1)
            b = J[:, places(of)[f"{layer}.bias"]].unsqueeze(2)
            rows = torch.cat([w, b], 2).flatten(1) / s.sqrt()[:, None]
            moments.append((rows @ basis).square().mean(0))
        mixed.append(basis @ torch.diag((0.6 * moments[0] + moments[1]) / 1.6) @ basis.T)
    preconditioner = fk.optim.Preconditioner(
        first.model, kind="ief", structure="ekfac", damping=LAMBDA, ema=0.6, refresh_every=2
    )
    close(after_both(preconditioner, first, second), by_layer(first, mixed, gradient, LAMBDA))


def test_update_every__goes_on_with_what_it_has() -> None:
    first, second = halves(problem("mlp"))
    expected = damped(fisher(first, "ief", "kfac"), jacobian(second)[0].mean(0), LAMBDA)
    preconditioner = fk.optim.Preconditioner(first.model, kind="ief", damping=LAMBDA, update_every=2)
    close(after_both(preconditioner, first, second), expected)


def test_update_every__beside_a_summed_loss_divides_by_each_steps_own_examples() -> None:
    whole = problem("mlp")
    first, second = (Problem(whole.model, whole.inputs[t], whole.targets[t]) for t in (slice(4), slice(4, 6)))
    expected = damped(fisher(first, "ief", "kfac"), jacobian(second)[0].mean(0), LAMBDA)
    preconditioner = fk.optim.Preconditioner(first.model, damping=LAMBDA, update_every=2, reduction="sum")
    close(after_both(preconditioner, first, second, "sum"), expected)


# -- beside another optimizer ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "structure"), paired(["ef", "ief", "exact", "truncated"], ["full", "block", "diagonal", "kfac", "ekfac"])
)
def test_preconditioner__puts_the_direction_where_the_gradient_was(kind: str, structure: str) -> None:
    of = problem("mlp")
    expected = damped(fisher(of, kind, structure), jacobian(of)[0].mean(0), LAMBDA)
    preconditioner = fk.optim.Preconditioner(
        of.model, kind=kind, structure=structure, damping=LAMBDA, **OPTIONS.get(kind, {})
    )
    backward(of)
    preconditioner.step()
    close(gradients(of.model), expected)


def test_preconditioner__with_plain_sgd_is_the_natural_gradient() -> None:
    of = problem("mlp")
    start = flat(of)
    expected = one_step(of, kind="ief", gram_damping=LAMBDA)
    preconditioner = fk.optim.Preconditioner(of.model, kind="ief", structure="full", gram_damping=LAMBDA)
    optimizer = torch.optim.SGD(of.model.parameters(), lr=1.0)
    backward(of)
    preconditioner.step()
    optimizer.step()
    close(start - flat(of), expected)


def test_preconditioner__kl_clip_uses_the_optimizers_rate() -> None:
    of = problem("mlp")
    F, g = fisher(of, "ief", "kfac"), jacobian(of)[0].mean(0)
    direction = damped(F, g, LAMBDA)
    bound = float(0.25 * direction @ F @ direction) / 16
    preconditioner = fk.optim.Preconditioner(of.model, damping=LAMBDA, trust_region=bound, lr=lambda: 0.5)
    backward(of)
    preconditioner.step()
    close(gradients(of.model), direction / 4)


def test_blockwise__is_what_the_tests_think() -> None:
    of = problem("mlp")
    F = blockwise(of, torch.ones(len(flat(of)), len(flat(of)), dtype=torch.float64))
    cut = places(of)["2.weight"].start
    assert bool(F[:cut, :cut].all())
    assert not bool(F[:cut, cut:].any())


# -- sums add the same whether rows come in one pass or in parts that are merged ---------------------------------------


NAMES = ("weight", "bias")
SPACE = ParameterSpace(NAMES, ((2, 3), (2,)))
GENERATOR = torch.Generator().manual_seed(0)


def factored(n: int) -> FactoredRows:
    """Rows of a layer with 3 inputs, 2 outputs, 4 positions and a bias."""
    a, g = (torch.randn(n, 4, c, generator=GENERATOR, dtype=torch.float64) for c in (3, 2))
    return FactoredRows(a, g, bias=True)


def chunk(rows: FactoredRows) -> Chunk:
    """A chunk of them alone, all of whose positions count."""
    n = rows.count
    slots = [UnitSlot(NAMES, rows)]
    return Chunk(Rows(SPACE, slots), torch.arange(n), True, True, n, True, (torch.ones(n, 4, dtype=torch.bool),), None)


@pytest.mark.parametrize("name", ["full", "block", "kfac", "ekfac", "diagonal"])
def test_sums__of_two_halves_are_merged_and_scaled_as_the_fisher(name: str) -> None:
    structure = structures()[name](SPACE, torch.float64, torch.device("cpu"), (NAMES,))
    parts = factored(5), factored(7)
    one, two = (structure.empty().added([chunk(rows)]) for rows in parts)
    both = structure.empty().added([chunk(FactoredRows.cat(list(parts)))])
    probe = torch.randn(SPACE.size, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    merged = structure.operator(one.merge(two), 1.0)
    torch.testing.assert_close(merged.matvec(probe), structure.operator(both, 1.0).matvec(probe))
    doubled = structure.operator(one.scaled(2.0), 1.0)
    torch.testing.assert_close(doubled.matvec(probe), 2 * structure.operator(one, 1.0).matvec(probe))
