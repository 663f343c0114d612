"""Backward passes that are no derivatives: gradients that functions or hooks of users clip, sign or throw away."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fisherkit as fk
from fisherkit.rows.differentiable import HOOKS_FIRE
from tests import by_hand
from tests.axes import pairwise

Change = Callable[[Tensor], Tensor]
X = torch.randn(6, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
Y = torch.tensor([0, 1, 2, 0, 1, 2])

CHANGES: dict[str, Change] = {
    "clipped": lambda g: g.clamp(-0.05, 0.05),
    "clipped far out": lambda g: g.clamp(-1e4, 1e4),
    "clipped by norm": lambda g: g * (0.1 / g.norm()).clamp(max=1.0),
    "sign": lambda g: g.sign(),
    "guided": lambda g: g.clamp(min=0),
    "largest": lambda g: g * (g.abs() >= g.abs().amax(1, keepdim=True)) if g.ndim > 1 else g,
    "small ones dropped": lambda g: g.where(g.abs() > 1e-4, 0.0),
}
LINEAR: dict[str, Change] = {"itself": lambda g: g, "half": lambda g: g / 2, "reversed": lambda g: -g}


def by_function(h: Tensor, change: Change) -> Tensor:
    class Changed(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, h: Tensor) -> Tensor:
            return h.clone()

        @staticmethod
        def backward(ctx: Any, *g: Tensor) -> Tensor:
            return change(g[0])

    return Changed.apply(h)  # type: ignore[no-any-return,no-untyped-call]


def by_tensor(h: Tensor, change: Change) -> Tensor:
    if h.requires_grad:
        h.register_hook(change)
    return h


class Net(nn.Module):
    """A change of the gradient between two layers."""

    def __init__(self, change: Change, way: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(3, 4).double(), nn.Linear(4, 3).double()
        self.change, self.way = change, way
        if way == "module":
            self.last.register_full_backward_hook(lambda _m, grads, _o: (change(grads[0]),))
        elif way == "parameter":
            self.first.weight.register_hook(change)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x).tanh()
        h = {"function": by_function, "tensor": by_tensor}.get(self.way, lambda h, _: h)(h, self.change)
        return self.last(h)  # type: ignore[no-any-return]


WAYS = ["function", "tensor", "module", "parameter"]
KINDS: dict[str, Any] = {"exact": fk.ExactFisher, "sf": fk.SampledFisher, "truncated": fk.TruncatedFisher}


OPTIONS: list[dict[str, Any]] = [{}, {"structure": "diagonal"}, {"structure": "kfac"}, {"storage": "stream"}]


@pytest.mark.parametrize(("way", "change", "options"), pairwise(WAYS, CHANGES, OPTIONS), ids=str)
def test_matrix__that_would_depend_on_the_vectors_size_is_refused(
    way: str, change: str, options: dict[str, Any]
) -> None:
    kind = list(KINDS.values())[len(way + change) % 3]
    net = Net(CHANGES[change], way)
    for _ in range(2):
        with pytest.raises(fk.ModelError, match=r"'first.weight'.* not linear"):
            kind(net, (X, Y), **options) @ torch.ones(31, dtype=torch.float64)
    fk.ExactFisher(net, (X, Y), params=["last.*"], **options)


@pytest.mark.parametrize("change", [*CHANGES, *LINEAR])
@pytest.mark.parametrize("way", WAYS)
def test_rows__of_the_loss_gradient_are_what_autograd_gives(way: str, change: str) -> None:
    net = Net((CHANGES | LINEAR)[change], way)
    for kind, power in ((fk.EmpiricalFisher, 0.0), (fk.ImprovedEmpiricalFisher, 1.0)):
        rows = []
        for n in range(len(X)):
            z = net(X[n : n + 1])
            (u,) = torch.autograd.grad(F.cross_entropy(z, Y[n : n + 1]), z, retain_graph=True)
            found = torch.autograd.grad(z, list(net.parameters()), u / u.norm() ** power)
            rows.append(torch.cat([g.flatten() for g in found]))
        j = torch.stack(rows)
        torch.testing.assert_close(kind(net, (X, Y)) @ torch.eye(31, dtype=torch.float64), j.mT @ j / len(X))


@pytest.mark.parametrize("change", LINEAR)
@pytest.mark.parametrize("way", WAYS)
def test_matrix__of_gradients_that_are_changed_linearly(way: str, change: str) -> None:
    net = Net(LINEAR[change], way)
    rows = []
    for n in range(len(X)):
        z = net(X[n : n + 1])[0]
        rows += [
            torch.cat([g.flatten() for g in torch.autograd.grad(one, list(net.parameters()), retain_graph=True)])
            for one in z
        ]
    j = torch.stack(rows)
    found = fk.ExactFisher(net, (X, None), likelihood="gaussian") @ torch.eye(31, dtype=torch.float64)
    torch.testing.assert_close(found, j.mT @ j / len(X))


def test_hook__that_is_put_on_after_a_build() -> None:
    net = Net(LINEAR["itself"], "none")
    fk.ExactFisher(net, (X, Y))
    handle = net.first.weight.register_hook(CHANGES["clipped"])
    with pytest.raises(fk.ModelError, match="not linear"):
        fk.ExactFisher(net, (X, Y))
    handle.remove()
    fk.ExactFisher(net, (X, Y))


@pytest.mark.parametrize("options", [{"kind": "ef"}, {"kind": "exact"}, {"kind": "sf", "structure": "kfac"}], ids=str)
@pytest.mark.parametrize("way", WAYS)
def test_step__of_gradients_that_are_clipped(way: str, options: dict[str, Any]) -> None:
    net = Net(CHANGES["clipped"], way)
    optimizer = fk.optim.NaturalGradient(net, lr=0.1, damping=0.1, **options)
    if options["kind"] == "ef" and way == "parameter":
        rows = []
        for n in range(len(X)):
            found = torch.autograd.grad(F.cross_entropy(net(X[n : n + 1]), Y[n : n + 1]), list(net.parameters()))
            rows.append(torch.cat([g.flatten() for g in found]))
        j, before = torch.stack(rows), nn.utils.parameters_to_vector(net.parameters()).detach()
        F.cross_entropy(net(X), Y).backward()
        g = torch.cat([p.grad.flatten() for p in net.parameters()])
        optimizer.step()
        step = torch.linalg.solve(j.mT @ j / len(X) + 0.1 * torch.eye(31, dtype=torch.float64), g)
        torch.testing.assert_close(nn.utils.parameters_to_vector(net.parameters()).detach(), before - 0.1 * step)
        return
    with pytest.raises(fk.ModelError, match="not linear"):
        net(X)


class Later(Net):
    """The change is there for large inputs alone."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x).tanh()
        large = x.detach().abs().max().item() > 50
        return self.last(by_function(h, self.change) if large else h)  # type: ignore[no-any-return]


@pytest.mark.parametrize("structure", ["full", "kfac", "diagonal"])
@pytest.mark.parametrize("kind", KINDS)
def test_matrix__of_a_function_that_only_a_later_batch_of_a_loop_meets(kind: str, structure: str) -> None:
    net, far = Later(CHANGES["sign"], "none"), X + 100
    with pytest.raises(fk.ModelError, match="not linear"):
        _ = KINDS[kind](net, [(X, Y), (far, Y)], structure=structure) @ torch.ones(31, dtype=torch.float64)


class OfLarge(Net):
    """The function and the hook are there from the start, and change gradients where some input is large."""

    def forward(self, x: Tensor) -> Tensor:
        self.large = bool(x.detach().abs().amax() > 50)
        return super().forward(x)  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("way", "change", "structure"),
    # But for the largest entry of one example's δxᵀ, which is linear in it.
    [p for p in pairwise(WAYS, CHANGES, ["full", "kfac", "diagonal"]) if p[:2] != ("parameter", "largest")],
)
def test_matrix__of_a_change_that_only_later_examples_meet(way: str, change: str, structure: str) -> None:
    kind = list(KINDS.values())[len(way + change) % 3]
    net = OfLarge(lambda g: CHANGES[change](g) if net.large else g, way)
    x = torch.cat([X, X])
    kind(net, [(x, Y.repeat(2))], structure=structure)
    x[7:] *= 100
    for data in ([(x, Y.repeat(2))], [(X, Y), (x[6:], Y)], [(x[:3], Y[:3]), *((one[None], Y[:1]) for one in x[6:])]):
        with pytest.raises(fk.ModelError, match=r"data, batch .* not linear"):
            kind(net, data, structure=structure)


# Of all entries of a batch, or of one in all its rows; none of which is an example's own.
TOGETHER: dict[str, Change] = {
    "largest of all": lambda g: g.where(g.abs() < g.abs().amax(), 0.0),
    "largest alone": lambda g: g * (g.abs() >= g.abs().amax()),
    "clipped by the batch's norm": lambda g: g * (1e3 / g.norm()).clamp(max=1.0),
    "without its mean": lambda g: g - g.mean(0),
}


@pytest.mark.parametrize("change", TOGETHER)
@pytest.mark.parametrize("way", ["function", "tensor", "module"])
def test_rows__of_a_change_that_joins_the_examples_of_later_batches_alone(way: str, change: str) -> None:
    structure = "diagonal" if len(way + change) % 3 == 0 else "full"
    net, far = OfLarge(lambda g: TOGETHER[change](g) if net.large else g, way), 100 * X
    weight = 1e5 * torch.ones(3, dtype=torch.float64)  # so that gradients are far from random vectors in size
    likelihood = nn.CrossEntropyLoss(weight=weight)
    rows = []
    for x in (X, far):
        for n in range(len(x)):
            loss = 1e5 * F.cross_entropy(net(x[n : n + 1]), Y[n : n + 1])
            rows.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(net.parameters()))]))
    found, j = (
        fk.EmpiricalFisher(net, [(X, Y), (far, Y)], likelihood=likelihood, structure=structure),
        torch.stack(rows),
    )
    expected = j.mT @ j / len(j)
    torch.testing.assert_close(found.to_dense(), expected if structure == "full" else expected.diag().diag())


SWITCH = {"on": False}


class Switched(Net):
    """The change comes when something else says so, which no attribute of the model shows."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x).tanh()
        return self.last(by_function(h, self.change) if SWITCH["on"] else h)  # type: ignore[no-any-return]


@pytest.mark.parametrize("kind", ["exact", "sf", "truncated:2"])
@pytest.mark.parametrize("optimizer", [fk.optim.NaturalGradient, fk.optim.Preconditioner])
def test_step__of_a_function_that_comes_later(optimizer: Any, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    net = Switched(CHANGES["sign"], "none")
    own = optimizer(net, kind=kind, damping=0.1, **({"lr": 0.1} if optimizer is fk.optim.NaturalGradient else {}))
    F.cross_entropy(net(X), Y).backward()
    own.step()
    monkeypatch.setitem(SWITCH, "on", True)
    with pytest.raises(fk.ModelError, match="not linear"):
        net(X)


@pytest.mark.parametrize("change", [*CHANGES, *TOGETHER])
@pytest.mark.parametrize("way", WAYS)
def test_step__of_a_change_that_only_later_batches_meet(way: str, change: str) -> None:
    kind = ["ef", "exact", "sf", "truncated:2"][(len(way) + len(change)) % 4]
    net = OfLarge(lambda g: (CHANGES | TOGETHER)[change](g) if net.large else g, way)
    own: Any = fk.optim.NaturalGradient(net, lr=0.1, kind=kind, damping=0.1)
    if len(change) % 2:
        own = fk.optim.Preconditioner(net, kind=kind, damping=0.1, update_every=1)
    for x in (X, X + 1):
        F.cross_entropy(net(x), Y).backward()
        own.step()
    if way == "parameter" and (kind == "ef" or "largest" in change or change == "without its mean"):
        return  # rows are made one at a time; the largest of δxᵀ are where x is largest
    with pytest.raises(fk.ModelError, match=r"not linear|change with the rest"):
        net(100 * X)


@pytest.mark.parametrize("way", ["function", "module"])
def test_matrix__of_a_half_model_with_small_gradients(way: str) -> None:
    net = Net(LINEAR["itself"], way)
    with torch.no_grad():
        net.last.weight.mul_(1e-4)
    found = fk.ExactFisher(net.half(), (X.half(), Y), params=["first.*"], structure="diagonal").diagonal()
    expected = fk.ExactFisher(net.float(), (X.float(), Y), params=["first.*"], structure="diagonal").diagonal()
    assert float((found.float() - expected).norm()) < 5e-3 * float(expected.norm())


@pytest.mark.parametrize("kind", ["exact", "sf:1", "truncated:2", "ef"])
def test_hook__that_draws_in_a_backward_pass_leaves_the_generator_as_it_was(kind: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    model[1].register_full_backward_hook(lambda *_: (torch.rand(3), None)[1])
    x, y = torch.randn(6, 4), torch.randint(3, (6,))
    before = torch.get_rng_state()
    fk.FisherApproximation(model, [(x, y), (x[:4], y[:4])], kind)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("kind", ["ef", "exact"])
@pytest.mark.parametrize("optimizer", [fk.optim.NaturalGradient, fk.optim.Preconditioner])
def test_step__of_gradients_that_are_clipped_does_not_advise_the_kind_that_it_has(optimizer: Any, kind: str) -> None:
    net = Net(CHANGES["clipped"], "function")
    own = optimizer(net, kind=kind, damping=0.1, **({"lr": 0.1} if optimizer is fk.optim.NaturalGradient else {}))
    with pytest.raises(fk.ModelError, match="clip_grad_norm_") as told:
        net(X)
    assert "of kind" not in str(told.value)
    own.close()


class Popped(torch.autograd.Function):
    """Has no second backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.kept = [torch.full_like(x, 2.0)]
        return 2 * x

    @staticmethod
    def backward(ctx: Any, *g: Tensor) -> Tensor:
        return ctx.kept.pop() * g[0]


class Deleted(Popped):
    """Nor this one."""

    @staticmethod
    def backward(ctx: Any, *g: Tensor) -> Tensor:
        (kept,) = ctx.kept
        del ctx.kept
        return kept * g[0]


class Counting(Popped):
    """Nor this one."""

    @staticmethod
    def backward(ctx: Any, *g: Tensor) -> Tensor:
        if not ctx.kept:
            raise RuntimeError("used twice, with a tensor of shape [2, 4]")
        return ctx.kept.pop() * g[0]


@pytest.mark.parametrize("function", [Popped, Deleted, Counting])
@pytest.mark.parametrize("kind", ["ef", "exact"])
def test_function__that_frees_what_it_has_kept_is_named(kind: str, function: Any) -> None:
    first, last = nn.Linear(3, 4).double(), nn.Linear(4, 3).double()
    model = nn.ModuleList([first, last])
    model.forward = lambda x: last(function.apply(first(x)))
    said = rf"model's backward pass: got an error in the second one.*{function.__name__}Backward.*nothing popped"
    for structure in ("full", "kfac"):
        with pytest.raises(fk.ModelError, match=said):
            fk.FisherApproximation(model, (X, Y), kind, structure=structure)
    for optimizer in (fk.optim.NaturalGradient(model, 0.1, damping=0.1), fk.optim.Preconditioner(model)):
        with pytest.raises(fk.ModelError, match=said):
            F.cross_entropy(model(X), Y).backward()
        optimizer.close()


class Gated(Net):
    """A hook multiplies gradients by what the forward pass kept on the model, which may have it from before."""

    def __init__(self, way: str, before: str) -> None:
        super().__init__(lambda g: g, "none")
        self.way = way
        if before != "nothing":
            self.gate = None if before == "None" else 1 + torch.rand(int(before), 1, dtype=torch.float64)
        if way == "module":
            self.last.register_full_backward_hook(lambda _m, given, _o: (self.gated(given[0]),))

    def gated(self, g: Tensor) -> Tensor:
        return g if self.gate is None else g * self.gate

    def forward(self, x: Tensor) -> Tensor:
        self.gate = 1 + x[:, :1].detach() ** 2
        h = self.first(x).tanh()
        if self.way == "tensor":
            h.register_hook(self.gated)
        return self.last(h)  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("where", "sizes", "kind", "options"),
    pairwise(
        product(["tensor", "module"], ["nothing", "None", "1", "6"]), [[6], [1] * 6, [5, 1], [2, 4]],
        ["ef", "exact"], [{}, {"storage": "stream"}, {"chunk_size": 2}, {"structure": "diagonal"}],
    ),
    ids=str,
)  # fmt: skip
def test_matrix__of_hooks_that_read_what_the_forward_pass_left(
    where: tuple[str, str], sizes: list[int], kind: str, options: dict[str, Any]
) -> None:
    way, before = where
    torch.manual_seed(0)
    net = Gated(way, before)
    kept = net.__dict__.get("gate")
    data = list(zip(X.split(sizes), Y.split(sizes), strict=True))
    found = fk.FisherApproximation(net, data, kind, **options).to_dense()
    assert net.__dict__.get("gate") is kept
    expected = by_hand.fisher(net, (X, Y), kind)
    torch.testing.assert_close(found, expected.diag().diag() if "structure" in options else expected)


def steps_of(cls: Any, model: nn.Module) -> None:
    optimizer = cls(model, lr=0.1, damping=0.1, structure="kfac")
    for _ in range(3):
        model.zero_grad()
        F.cross_entropy(model(X), Y).backward()
        optimizer.step()
    optimizer.close()


DATA = [(X, Y)] * 2
PASSES: dict[str, Callable[[nn.Module], object]] = {
    **{f"{kind}, {structure}": lambda m, k=kind, s=structure: fk.FisherApproximation(m, DATA, k, structure=s)
       for kind in ("ef", "exact") for structure in ("full", "ekfac")},
    "streamed": lambda m: fk.EmpiricalFisher(m, DATA, storage="stream").trace(),
    "gradient": lambda m: fk.evaluation.loss_gradient(m, (X, Y)),
    "scores": lambda m: fk.influence.InfluenceScores(
        fk.EmpiricalFisher(m, DATA, structure="kfac"), m, damping=0.1).scores((X, Y), (X, Y)),
    "steps": lambda m: steps_of(fk.optim.NaturalGradient, m),
    "steps beside": lambda m: steps_of(fk.optim.Preconditioner, m),
}  # fmt: skip


@pytest.mark.parametrize("place", ["model", "module"])
@pytest.mark.parametrize("name", PASSES)
def test_hook__that_torch_warns_of_is_told_in_users_own_passes_alone(name: str, place: str) -> None:
    """As torch does without the package: once for a line that calls backward, and not at lines of this package."""
    model = nn.Sequential(nn.Sequential(nn.Linear(3, 5), nn.Tanh()), nn.Linear(5, 3)).double()
    (model if place == "model" else model[0]).register_full_backward_hook(lambda *_: None)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        PASSES[name](model)
        assert HOOKS_FIRE not in warnings.filters
    assert [one.filename for one in caught] == [__file__] * name.startswith("steps"), [str(one) for one in caught]


def test_hook__beside_a_model_that_resets_all_filters() -> None:
    class Resetting(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            warnings.resetwarnings()
            return super().forward(x)

    with warnings.catch_warnings():
        fk.ExactFisher(Resetting(3, 3).double(), (X, Y))
