"""Calls inside a caller's ``torch.autocast``: the package's own arithmetic and its own passes are as outside of it."""

import copy
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fisherkit as fk
from fisherkit.arithmetic import without_autocast
from tests.axes import paired

STRUCTURES = ("full", "block", "diagonal", "kfac", "ekfac")
KINDS: dict[str, Callable[..., fk.FisherApproximation]] = {
    "ef": fk.EmpiricalFisher,
    "sf": fk.SampledFisher,
    "exact": fk.ExactFisher,
    "truncated": fk.TruncatedFisher,
}
HALF = [torch.bfloat16, torch.float16]


class Custom(nn.Module):
    """Arithmetic that no layer rule covers, and an inner region of autocast of the model's own if asked."""

    def __init__(self, inner: bool = False) -> None:
        super().__init__()
        self.inner = inner
        self.first, self.slope, self.last = nn.Linear(6, 4), nn.Parameter(torch.rand(4)), nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=self.inner):
            return self.last(torch.tanh(self.first(x) * self.slope)).float()


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(6, 9, bias=False), nn.Tanh(), nn.Unflatten(1, (1, 3, 3)), nn.Conv2d(1, 3, 2), nn.Flatten(),
        nn.LayerNorm(12), nn.Linear(12, 5),
    )  # fmt: skip


def data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(12, 6, generator=generator), torch.randint(5, (12,), generator=generator)


@contextmanager
def region(dtype: torch.dtype = torch.bfloat16) -> Iterator[None]:
    """A caller's region, which is what it was when it is left."""
    a = torch.ones(8, 8)
    with torch.autocast("cpu", dtype):
        yield
        assert (a @ a).dtype == dtype


def tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, Mapping):
        return [t for v in value.values() for t in tensors(v)]
    return [t for v in value for t in tensors(v)] if isinstance(value, (tuple, list)) else []


def same(inside: Any, outside: Any) -> None:
    pairs = list(zip(tensors(inside), tensors(outside), strict=True))
    assert pairs
    for a, b in pairs:
        assert a.dtype == b.dtype
        assert torch.equal(a, b)


@pytest.mark.parametrize(("kind", "structure"), paired(KINDS, STRUCTURES))
def test_build__is_the_same_inside(kind: str, structure: str) -> None:
    own, own_data = model(), data()
    outside = KINDS[kind](own, own_data, structure=structure)
    with region():
        inside = KINDS[kind](own, own_data, structure=structure)
    same([inside.diagonal(), inside.trace()], [outside.diagonal(), outside.trace()])


OPERATIONS: dict[str, Callable[[fk.FisherOperator, Tensor], Any]] = {
    "matvec": lambda f, v: f @ v,
    "matvec of a dict": lambda f, v: f.matvec(f.space.unflatten(v)),
    "quadratic_form": lambda f, v: f.quadratic_form(v),
    "diagonal": lambda f, v: f.diagonal(),
    "trace": lambda f, v: f.trace(),
    "to_dense": lambda f, v: f.to_dense(),
    "solve": lambda f, v: f.solve(v, 1e-3),
    "solve with info": lambda f, v: f.solve(v, 1e-3, return_info=True)[0],
    "factorize": lambda f, v: f.factorize(1e-3).matvec(v),
    "sample": lambda f, v: f.factorize(1e-3).sample(torch.Generator().manual_seed(0)),
    "logdet": lambda f, v: f.logdet(1e-3),
    "eigenvalues": lambda f, v: f.eigenvalues(3),
    "scipy": lambda f, v: torch.from_numpy(f.to_scipy() @ v.numpy()),
    "scaled": lambda f, v: (0.5 * f) @ v,
    "sum": lambda f, v: (f + 2 * f) @ v,
    "hutchinson": lambda f, v: fk.estimators.hutchinson_trace(f, samples=4).value,
    "lanczos": lambda f, v: fk.estimators.lanczos_eigenvalues(f, 2),
}


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("structure", STRUCTURES)
def test_operations__are_the_same_inside(structure: str, dtype: torch.dtype) -> None:
    own = model()
    # Two of them, so that neither side has what calls on the other have left.
    fisher, fresh = (fk.EmpiricalFisher(own, data(), structure=structure) for _ in range(2))
    v = torch.randn(fisher.size, generator=torch.Generator().manual_seed(2))
    for name, operation in OPERATIONS.items():
        outside = operation(fresh, v)
        with region(dtype):
            inside = operation(fisher, v)
        try:
            same(inside, outside)
        except AssertionError as error:
            raise AssertionError(name) from error


@pytest.mark.parametrize("structure", STRUCTURES)
def test_small_damping__keeps_its_digits_inside(structure: str) -> None:
    torch.manual_seed(0)
    own = nn.Sequential(nn.Embedding(20, 8), nn.Flatten(), nn.Linear(24, 16, bias=False), nn.Tanh(), nn.Linear(16, 4))
    own_data = torch.randint(20, (64, 3)), torch.randint(4, (64,))
    fisher = fk.EmpiricalFisher(own, own_data, structure=structure)
    v = torch.randn(fisher.size)
    outside = fisher.diagonal(), fisher @ v, fisher.solve(v, 1e-5), fisher.logdet(1e-5)
    with region():
        again = fk.EmpiricalFisher(own, own_data, structure=structure)
        inside = again.diagonal(), again @ v, again.solve(v, 1e-5), again.logdet(1e-5)
    same(inside, outside)


def test_gram__and_streamed_products_are_the_same_inside() -> None:
    own, own_data = model(), data()
    for make in (fk.EmpiricalFisher, fk.ExactFisher):
        kept, streamed = make(own, own_data), make(own, own_data, memory_budget=1)
        v = torch.ones(kept.size)
        outside = kept.gram(), streamed @ v, streamed.diagonal(), streamed.solve(v, 10.0)
        with region():
            inside = kept.gram(), streamed @ v, streamed.diagonal(), streamed.solve(v, 10.0)
        same(inside, outside)


def test_custom_arithmetic__is_the_same_inside() -> None:
    torch.manual_seed(0)
    for inner in (False, True):
        own, own_data = Custom(inner), data()
        outside = fk.EmpiricalFisher(own, own_data)
        with region(torch.float16):
            inside = fk.EmpiricalFisher(own, own_data)
        same(inside.diagonal(), outside.diagonal())
        assert inside.dtype == torch.float32


@pytest.mark.parametrize("structure", STRUCTURES)
def test_influence__is_the_same_inside(structure: str) -> None:
    own, (x, y) = model(), data()
    fisher, queries = fk.EmpiricalFisher(own, (x, y), structure=structure), (x[:5], y[:5])

    def everything() -> list[Tensor]:
        scores = fk.influence.InfluenceScores(fisher, own, damping=1e-3)
        prepared = scores.prepare((x, y))
        top = scores.top(queries, prepared, k=2)
        approximate = scores.approximate_scores(queries, (x, y), fk.influence.LowRankQueries(2))
        return [
            scores.scores(queries, (x, y)), scores.scores(queries, prepared, normalize="relatif"),
            scores.scores(queries, (x, y), measurement="margin"), *scores.scores(queries, (x, y), by="module").values(),
            top.helpful, top.harmful, scores.self_influence((x, y)), scores.leverages((x, y)), approximate.scores,
        ]  # fmt: skip

    outside = everything()
    with region():
        inside = everything()
    same(inside, outside)


@pytest.mark.parametrize("structure", ["full", "kfac", "diagonal"])
def test_ewc__is_float32_inside_and_differentiable(structure: str) -> None:
    results = []
    for inside in (False, True):
        own = model()
        fisher, ewc = fk.EmpiricalFisher(own, data(), structure=structure), fk.continual.EWC(own, strength=10.0)
        with torch.autocast("cpu", torch.bfloat16, enabled=inside):
            ewc.consolidate(fisher)
            with torch.no_grad():
                for p in own.parameters():
                    p.add_(0.1)
            penalty = ewc.penalty()
            assert penalty.dtype == torch.float32
            loss = F.cross_entropy(own(data()[0]), data()[1]) + penalty
            assert loss.dtype == torch.float32
            penalty.backward()
        results.append([penalty.detach(), *(p.grad for p in own.parameters())])
    same(results[1], results[0])


def test_evaluation_and_merging__are_the_same_inside() -> None:
    own, other, own_data = model(), model(), data()
    with torch.no_grad():
        for p in other.parameters():
            p.add_(0.05)

    def everything() -> list[Tensor]:
        fishers = [fk.EmpiricalFisher(m, own_data, structure="kfac") for m in (own, other)]
        exact, gradient = fk.ExactFisher(own, own_data), fk.evaluation.loss_gradient(own, own_data)
        return [
            gradient, fk.evaluation.approximation_quality(gradient, exact, gradient),
            fk.evaluation.quality_floor(exact, gradient),
            torch.tensor([r.gamma for r in fk.evaluation.compare(own, own_data, kinds=["ef"]).rows]),
            *fk.merging.merge([own, other], fishers, damping=1e-3).values(),
        ]  # fmt: skip

    outside = everything()
    with region():
        inside = everything()
    same(inside, outside)


@pytest.mark.parametrize(("kind", "structure"), paired(["ief", "exact"], STRUCTURES))
def test_optimizers__step_inside_as_outside(kind: str, structure: str) -> None:
    """The user's own forward and backward pass are theirs; what is made of them is the same wherever it is made."""
    results = []
    for inside in (False, True):
        own, (x, y) = model(), data()
        optimizer = fk.optim.NaturalGradient(own, lr=0.1, kind=kind, structure=structure, damping=0.1)
        with torch.autocast("cpu", torch.bfloat16):
            loss = F.cross_entropy(own(x), y)
        with torch.autocast("cpu", torch.bfloat16, enabled=inside):
            loss.backward()
            optimizer.step()
        results.append([p.detach() for p in own.parameters()])
        optimizer.close()
    same(results[1], results[0])


def test_closure__is_the_users_own() -> None:
    own, (x, y) = model(), data()
    optimizer, seen = fk.optim.NaturalGradient(own, lr=0.1, damping=0.1), []

    def closure() -> Tensor:
        optimizer.zero_grad()
        z = own(x)
        seen.append(z.dtype)
        loss = F.cross_entropy(z, y)
        loss.backward()
        return loss

    with region():
        optimizer.step(closure)
    assert seen == [torch.bfloat16]


def test_model__that_needs_the_callers_region_says_so() -> None:
    class Cast(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.last = nn.Linear(6, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(x.bfloat16()).float()

    with region(), pytest.raises(fk.ModelError, match="inside forward"):
        fk.EmpiricalFisher(Cast(), data())


def test_without_autocast__costs_no_warning_and_nests() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with region(), without_autocast():
            assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32
            with region():
                assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.bfloat16
            assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32
    assert copy.copy(without_autocast) is without_autocast
