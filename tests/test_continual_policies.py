"""EWC: what is refused with which message, what is allowed by name, and strengths of other libraries."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fisherkit as fk
from fisherkit.continual import EWC, convert_strength
from fisherkit.errors import (
    InvalidArgumentError,
    InvalidTypeError,
    ModelError,
    NoClosedFormError,
    UnknownParameterError,
)
from fisherkit.operators import DiagonalOperator
from fisherkit.space import ParameterSpace
from tests import by_hand
from tests.bad_input import F64, Case, X, Y, check, ef, ids, mlp, normal
from tests.test_continual import flat, move, task


def diagonal(model: nn.Module, **options: Any) -> fk.FisherOperator:
    return ef(model, structure="diagonal", **options)


def consolidated(model: nn.Module | None = None, **options: Any) -> EWC:
    model = mlp() if model is None else model
    ewc = EWC(model, **options)
    ewc.consolidate(diagonal(model))
    return ewc


def refused(make: Callable[[nn.Module], object], **options: Any) -> Callable[[], object]:
    """Consolidating what ``make`` returns for an MLP."""

    def call() -> None:
        model = mlp()
        EWC(model).consolidate(make(model), **options)  # type: ignore[arg-type]

    return call


def changed(change: Callable[[nn.Sequential], object], **options: Any) -> Callable[[], object]:
    """The penalty after a change of a consolidated MLP."""

    def call() -> None:
        model = mlp()
        ewc = consolidated(model, **options)
        change(model)
        ewc.penalty()

    return call


def loading(state: Callable[[dict[str, Any]], object], model: nn.Module | None = None, **options: Any) -> Any:
    """Loading a consolidated EWC's state after a change of it."""

    def call() -> None:
        packed = consolidated().state_dict()
        state(packed["_extra_state"])
        EWC(mlp() if model is None else model, **options).load_state_dict(packed)

    return call


def zero(model: nn.Module) -> DiagonalOperator:
    space = ParameterSpace.of(model)
    return DiagonalOperator(space, torch.zeros(space.size, dtype=F64))


WIDE = nn.Linear(5, 4).double()
TABLE: dict[str, tuple[Callable[[], object], type[fk.FisherkitError], tuple[str, ...]]] = {
    "no model": (lambda: EWC([1]), InvalidTypeError, ("a list as model", "torch.nn.Module")),
    "no parameters": (lambda: EWC(nn.ReLU()), InvalidArgumentError, ("a model without parameters",)),
    "negative strength": (lambda: EWC(mlp(), -1.0), InvalidArgumentError, ("strength=-1.0", "0 or more")),
    "infinite strength": (lambda: EWC(mlp(), float("inf")), InvalidArgumentError, ("strength=inf",)),
    "strength later": (lambda: setattr(EWC(mlp()), "strength", "1"), InvalidTypeError, ("strength", "a number")),
    "decay above 1": (lambda: EWC(mlp(), decay=1.5), InvalidArgumentError, ("decay=1.5", "from 0 to 1")),
    "drop_below": (lambda: EWC(mlp(), drop_below=-0.1), InvalidArgumentError, ("drop_below=-0.1",)),
    "normalize": (lambda: EWC(mlp(), normalize="max"), InvalidArgumentError, ("normalize='max'", "'trace'")),
    "grown": (lambda: EWC(mlp(), grown="yes"), InvalidArgumentError, ("grown='yes'", "'leading'")),
    "no fisher": (refused(lambda m: normal(43)), InvalidTypeError, ("a Tensor", "a FisherOperator", "fk.load")),
    "another model's": (refused(
            lambda m: diagonal(nn.Sequential(nn.Linear(4, 3), nn.Identity(), nn.Identity(), nn.Linear(3, 3)).double())),
        UnknownParameterError, ("'3.weight'", "the model does not have", "'2.weight'")),
    "other shapes": (refused(lambda m: diagonal(mlp(outputs=4))), InvalidArgumentError,
        ("'2.weight': [4, 5] in the Fisher, [3, 5] in the model", "before a layer grows")),
    "a narrower dtype": (refused(lambda m: ef(mlp().float(), (X.float(), Y), structure="diagonal")), InvalidTypeError,
        ("torch.float32", "torch.float64", "the Fisher's dtype")),
    "left out": (refused(lambda m: diagonal(m, params=["0.weight", "0.bias"])), InvalidArgumentError,
        ("leaves out '2.weight', '2.bias', which", "free=[names]", 'uncovered="free"')),
    "left out in part": (refused(lambda m: diagonal(m, params=["0.weight", "0.bias"]), free="2.bias"),
        InvalidArgumentError, ("leaves out '2.weight', which",)),
    "free but covered": (refused(diagonal, free=lambda name, p: name.startswith("2.")), InvalidArgumentError,
        ("which the Fisher covers", 'with "and name not in fisher.space.names"', 'uncovered="free"', "params=")),
    "free but unknown": (refused(diagonal, free=["3.weight"]), UnknownParameterError, ("'3.weight'",)),
    "free of a strange type": (refused(diagonal, free=[3]), InvalidTypeError, ("type int",)),
    "uncovered": (refused(diagonal, uncovered="ignore"), InvalidArgumentError, ("uncovered='ignore'",)),
    "zero": (refused(zero), InvalidArgumentError,
        ("a Fisher that is 0 on '0.weight'", "nothing would be kept", 'uncovered="free"')),
    "zero normalised": (
        lambda: EWC(model := mlp(), normalize="trace").consolidate(zero(model), uncovered="free"),
        InvalidArgumentError, ("a Fisher that is 0", "normalize=None")),
    "streamed": (refused(lambda m: ef(m, memory_budget=1)), NoClosedFormError,
        ("EWC.consolidate", "streamed", '"diagonal"')),
    "grown head": (changed(lambda m: m.__setitem__(2, WIDE)), ModelError,
        ("EWC.penalty", "'2.weight' of shape [4, 5], consolidated as [3, 5]", 'grown="leading"')),
    "shrunk head": (changed(lambda m: m.__setitem__(2, nn.Linear(5, 2).double()), grown="leading"), ModelError,
        ("'2.weight' of shape [2, 5]", "old entries first")),
    "head of other rank": (
        changed(lambda m: setattr(m[2], "bias", nn.Parameter(torch.zeros(3, 3, dtype=F64))), grown="leading"),
        ModelError, ("'2.bias' of shape [3, 3], consolidated as [3]",)),
    "lost head": (changed(lambda m: m.__delitem__(2)), ModelError, ("a model without '2.weight'",)),
    "state of nothing": (loading(lambda s: s.clear()), InvalidArgumentError, ("a state that cannot be read",)),
    "state without operator": (loading(lambda s: (s.pop("checksum"), s["terms"][0].pop("operator"))),
        InvalidArgumentError, ("'operator'", "EWC.state_dict()")),
    "state of the future": (loading(lambda s: (s.pop("checksum"), s.update(version=2))), InvalidArgumentError,
        ("version 2", "a newer fisherkit")),
    "state of another normalization": (loading(lambda s: None, normalize="trace"), InvalidArgumentError,
        ("terms of normalize=None", "normalize='trace'", "two things")),
    "state of another model": (loading(lambda s: None, model=nn.Linear(2, 2).double()), ModelError,
        ("EWC.load_state_dict", "a model without '0.weight'")),
    "another dtype": (lambda: consolidated().to(torch.float32), InvalidTypeError,
        ("EWC.to", "torch.float64", "ewc.to(device)")),
}  # fmt: skip


@pytest.mark.parametrize("name", ids(TABLE))
def test_ewc__refuses_with_a_message(name: str) -> None:
    check(Case(*TABLE[name]))


def test_consolidate__refused_changes_nothing() -> None:
    model = mlp()
    ewc = consolidated(model)
    with torch.no_grad():
        model[0].weight += 1
    before = ewc.state_dict()["_extra_state"], ewc.penalty()
    for fisher, options in (
        (zero(model), {}),
        (diagonal(model, params=["0.bias"]), {}),
        (diagonal(model), {"free": ["x"]}),
    ):
        with pytest.raises(fk.FisherkitError):
            ewc.consolidate(fisher, **options)
    after = ewc.state_dict()["_extra_state"], ewc.penalty()
    assert before[0]["consolidations"] == after[0]["consolidations"] == 1
    assert torch.equal(before[1], after[1])


def test_consolidate__zero_is_fine_without_normalization_if_asked_for() -> None:
    model = mlp()
    ewc = EWC(model, normalize=None)
    ewc.consolidate(zero(model), uncovered="free")
    assert ewc.penalty().item() == 0


class TwoHeads(nn.Module):
    """A body and a head for each task."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.body = nn.Sequential(nn.Linear(4, 5), nn.Tanh())
            self.heads = nn.ModuleList([nn.Linear(5, 3), nn.Linear(5, 3)])
        self.task = 0

    def forward(self, x: Tensor) -> Tensor:
        return self.heads[self.task](self.body(x))


@pytest.mark.parametrize("structure", ["diagonal", "kfac", "full"])
@pytest.mark.parametrize("allowed", [{"uncovered": "free"}, {"free": lambda name, p: name.startswith("heads.")}])
def test_consolidate__heads_of_other_tasks_may_be_left_free(structure: str, allowed: dict[str, Any]) -> None:
    model = TwoHeads().double()
    ewc, expected = EWC(model, 2.0, normalize="trace"), torch.zeros((), dtype=F64)
    parts = []
    for number in range(2):
        model.task = number
        own = [name for name, _ in model.named_parameters() if name.startswith(("body", f"heads.{number}"))]
        fisher = fk.EmpiricalFisher(model, (X, Y), structure=structure, params=own)
        policy = {"free": [f"heads.{1 - number}.weight", f"heads.{1 - number}.bias"]} if "free" in allowed else allowed
        ewc.consolidate(fisher, **policy)
        matrix = fisher.to_dense()
        theta = {name: p.detach().clone() for name, p in model.named_parameters()}
        parts.append((matrix * len(matrix) / matrix.trace(), {name: theta[name] for name in own}))
        with torch.no_grad():
            for p in model.parameters():
                p += 0.1
    now = dict(model.named_parameters())
    for matrix, centre in parts:
        d = torch.cat([(now[name].detach() - value).reshape(-1) for name, value in centre.items()])
        expected = expected + d @ matrix @ d
    torch.testing.assert_close(ewc.penalty().detach(), expected)


@pytest.mark.parametrize("structure", ["diagonal", "kfac", "block", "full"])
def test_penalty__a_grown_head_is_held_in_its_old_entries(structure: str) -> None:
    model = mlp()
    ewc = EWC(model, 2.0, normalize="trace", grown="leading")
    fisher = ef(model, structure=structure)
    ewc.consolidate(fisher)
    old = model[2]
    model[2] = nn.Linear(5, 4).double()
    with torch.no_grad():
        model[2].weight[:3], model[2].bias[:3] = old.weight + 0.1, old.bias - 0.2
    penalty = ewc.penalty()
    penalty.backward()
    d = torch.cat([torch.zeros(25, dtype=F64), torch.full((15,), 0.1, dtype=F64), torch.full((3,), -0.2, dtype=F64)])
    product = fisher.to_dense() @ d * fisher.size / fisher.trace()
    torch.testing.assert_close(penalty.detach(), d @ product)
    weight, bias = model[2].weight.grad, model[2].bias.grad
    torch.testing.assert_close(weight[:3].reshape(-1), 2 * product[25:40])
    torch.testing.assert_close(bias[:3], 2 * product[40:])
    assert not weight[3].any()
    assert not bias[3].any()


def test_consolidate__after_growing_adds_to_the_old_entries() -> None:
    """The body's terms fold on; the head's old and new ones stay beside each other."""
    model = mlp()
    ewc = consolidated(model, strength=2.0, grown="leading", normalize=None)
    first, old = diagonal(model).diagonal(), model[2]
    model[2] = nn.Linear(5, 4).double()
    with torch.no_grad():
        model[2].weight[:3], model[2].bias[:3] = old.weight, old.bias
    second = diagonal(model).diagonal()
    ewc.consolidate(diagonal(model))
    with torch.no_grad():
        for p in model.parameters():
            p += 1
    torch.testing.assert_close(ewc.penalty().detach(), first.sum() + second.sum())
    assert "terms=6" in repr(ewc)


def test_consolidate__frozen_parameters_need_no_fisher() -> None:
    model = mlp()
    model[0].requires_grad_(False)
    ewc = EWC(model)
    ewc.consolidate(diagonal(model))
    ewc.penalty().backward()
    assert model[0].weight.grad is None


def test_consolidate__refuses_a_fisher_of_other_weights() -> None:
    a, b = nn.Linear(4, 3), nn.Linear(4, 3)
    data = torch.randn(8, 4), torch.randint(3, (8,))
    fisher = fk.EmpiricalFisher(a, data)
    with pytest.raises(fk.ModelError, match="measured at other parameters"):
        fk.continual.EWC(b).consolidate(fisher)
    ewc = fk.continual.EWC(a)
    ewc.consolidate(fisher)
    with torch.no_grad():
        a.weight.add_(1)
    with pytest.raises(fk.ModelError, match="before training goes on"):
        ewc.consolidate(fisher)
    assert ewc.consolidations == 1


def test_consolidate__a_head_that_no_data_reach_counts_as_left_out() -> None:
    class Heads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.other = nn.Linear(4, 3), nn.Linear(4, 30)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.used(x)

    model, data = Heads(), (torch.randn(8, 4), torch.randint(3, (8,)))
    whole = fk.EmpiricalFisher(model, data, structure="diagonal", params=lambda *_: True)
    with pytest.raises(fk.InvalidArgumentError, match=r"0 on 'other\.weight', 'other\.bias'; "):
        fk.continual.EWC(model).consolidate(whole)
    fk.continual.EWC(model).consolidate(whole, uncovered="free")
    own = fk.EmpiricalFisher(model, data, structure="diagonal", params=["used.weight", "used.bias"])
    fk.continual.EWC(model).consolidate(own, free=["other.weight", "other.bias"])


# -- other libraries' strength -----------------------------------------------------------------------------------------


N, B = 24, 4
XS, YS = task(3, number=N)


def paper(model: nn.Module, d: Tensor) -> Tensor:
    return 0.5 * (by_hand.rows(model, (XS, YS)).square().mean(0) * d.square()).sum()


def sum_over_examples(model: nn.Module, d: Tensor) -> Tensor:
    return (by_hand.rows(model, (XS, YS)).square().sum(0) * d.square()).sum()


def sum_over_examples_by_batches(model: nn.Module, d: Tensor) -> Tensor:
    return 0.5 * (by_hand.rows(model, (XS, YS)).square().sum(0) / (N // B) * d.square()).sum()


EXACT: dict[str, tuple[Callable[[nn.Module, Tensor], Tensor], dict[str, Any]]] = {
    "paper": (paper, {}),
    "kuc2477": (paper, {"source": "kuc2477"}),
    "vandeven": (paper, {"source": "vandeven"}),
    "no half": (lambda model, d: 2 * paper(model, d), {"half": False}),
    "mammoth without its weights": (lambda model, d: 2 * paper(model, d), {"source": "mammoth"}),
    "sum": (sum_over_examples, {"half": False, "average": "sum", "examples": N}),
    "batches": (sum_over_examples_by_batches, {"average": "batches", "batch_size": B}),
}


def setting(normalize: str | None) -> tuple[nn.Module, EWC, fk.EmpiricalFisher]:
    model = mlp()
    fisher = fk.EmpiricalFisher(model, (XS, YS), structure="diagonal")
    ewc = EWC(model, normalize=normalize)
    ewc.consolidate(fisher)
    return model, ewc, fisher


@pytest.mark.parametrize("normalize", ["trace", "norm", None])
@pytest.mark.parametrize("name", ids(EXACT))
def test_convert_strength__makes_the_penalties_equal(name: str, normalize: str | None) -> None:
    theirs, facts = EXACT[name]
    model, ewc, fisher = setting(normalize)
    before = flat(model)
    start = mlp()
    move(model, 1)
    ewc.strength = convert_strength(7.0, normalize=normalize, fisher=fisher, **facts)
    torch.testing.assert_close(ewc.penalty().detach(), 7.0 * theirs(start, flat(model) - before), rtol=1e-10, atol=0.0)


def at_a_minimum(labels: Tensor) -> nn.Module:
    """Softmax regression on labels that no model fits: the mean gradient is 0, single examples' are not."""
    model = nn.Linear(4, 3).double()
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    optimizer = torch.optim.LBFGS(
        model.parameters(), max_iter=500, tolerance_grad=1e-10, tolerance_change=0.0, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(XS), labels)
        loss.backward()
        return loss

    optimizer.step(closure)  # type: ignore[no-untyped-call]
    return model


@pytest.mark.parametrize("source", ["avalanche", "facil"])
def test_convert_strength__of_squared_batches_holds_on_average_at_a_minimum(source: str) -> None:
    """The mean over 500 cuts into batches, within 3 % once (N − B)/(N − 1) of cutting without replacement is put in."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(3, (N,), generator=generator)
    model = at_a_minimum(labels)
    rows = by_hand.rows(model, (XS, labels))
    assert float(rows.mean(0).norm()) < 1e-6 * float(rows.norm())
    cuts = [rows[torch.randperm(N, generator=generator)].reshape(N // B, B, -1).mean(1) for _ in range(500)]
    mean_square = torch.stack([batches.square().mean(0) for batches in cuts]).mean(0)  # FACIL's B and N cancel to this
    d = torch.ones(rows.shape[1], dtype=F64)
    theirs = 3.0 * (0.5 if source == "facil" else 1.0) * float((mean_square * d.square()).sum())
    fisher = fk.EmpiricalFisher(model, (XS, labels), structure="diagonal")
    strength = convert_strength(3.0, source, batch_size=B, normalize=None)
    ours = 0.5 * strength * float(fisher.quadratic_form(d))
    assert abs(theirs / ours / ((N - B) / (N - 1)) - 1) < 0.03


def test_convert_strength__of_squared_batches_is_too_small_where_the_mean_gradient_is_not_zero() -> None:
    """All examples alike: a batch's square is F and not F/B, so the true factor is B times the converted one."""
    model = mlp()
    row = by_hand.rows(model, (XS, YS))[0]
    assert float((row.expand(B, -1).mean(0).square() - row.square()).abs().max()) < 1e-15
    assert convert_strength(1.0, squared="batch", average="batches", batch_size=B, normalize=None) == 1 / B


def test_convert_strength__of_batches_counts_each_way_of_averaging() -> None:
    facts: dict[str, Any] = {"squared": "batch", "batch_size": 10, "normalize": None}
    assert convert_strength(1.0, average="batches", **facts) == pytest.approx(0.1)
    assert convert_strength(1.0, average="examples", **facts) == pytest.approx(0.01)
    assert convert_strength(1.0, average="sum", examples=50, **facts) == pytest.approx(0.5)
    assert convert_strength(1.0, "avalanche", batch_size=10, normalize=None) == pytest.approx(0.2)
    assert convert_strength(1.0, "vandeven", squared="batch", average="batches", batch_size=10, normalize=None) == (
        pytest.approx(0.1)
    )


def test_convert_strength__takes_a_fisher_of_unknown_kind_and_the_exact_one_where_the_other_library_has_it() -> None:
    exact = fk.ExactFisher(mlp(), (XS, YS), structure="diagonal")
    mean = float(exact.trace()) / exact.size
    assert convert_strength(1.0, "vandeven", normalize="trace", fisher=exact) == pytest.approx(mean, rel=1e-12)
    for normalize in (None, "trace"):
        with pytest.raises(InvalidArgumentError, match="kind 'exact'"):
            convert_strength(1.0, normalize=normalize, fisher=exact)
    unknown = DiagonalOperator(exact.space, exact.diagonal())
    assert convert_strength(1.0, normalize="trace", fisher=unknown) == pytest.approx(mean, rel=1e-12)
    assert convert_strength(1.0, fisher=unknown) == 1


def converting(*arguments: Any, **facts: Any) -> Callable[[], object]:
    return lambda: convert_strength(*arguments, **facts)


RAW: dict[str, Any] = {"normalize": None}
CONVERSIONS: dict[str, tuple[Callable[[], object], type[fk.FisherkitError], tuple[str, ...]]] = {
    "strength": (converting("1", **RAW), InvalidTypeError, ("strength of type str",)),
    "negative": (converting(-1.0, **RAW), InvalidArgumentError, ("strength=-1.0",)),
    "source": (converting(1.0, "sequoia", **RAW), InvalidArgumentError, ("'sequoia'", "'avalanche'", "half=")),
    "average": (converting(1.0, average="mean", **RAW), InvalidArgumentError, ("average='mean'", "'sum'")),
    "squared": (converting(1.0, squared="both", **RAW), InvalidArgumentError, ("squared='both'",)),
    "no batch size": (converting(1.0, "avalanche", **RAW), InvalidArgumentError, ("batch_size=None",)),
    "no examples": (converting(1.0, average="sum", **RAW), InvalidArgumentError, ("examples=None",)),
    "no fisher": (converting(1.0, normalize="trace"), InvalidArgumentError, ("without fisher=", "normalize=None")),
    "no operator": (converting(1.0, fisher=3), InvalidTypeError, ("an int",)),
    "a sum": (lambda: convert_strength(1.0, fisher=fk.EmpiricalFisher(mlp(), (XS, YS), normalization="sum")),
        InvalidArgumentError, ('normalization="sum"',)),
    "a multiple": (lambda: convert_strength(1.0, fisher=fk.operators.normalize(fk.EmpiricalFisher(mlp(), (XS, YS)))),
        InvalidArgumentError, ("a sum or multiple, ", "as it was built")),
    "another kind": (
        lambda: convert_strength(1.0, fisher=fk.ImprovedEmpiricalFisher(mlp(), (XS, YS), structure="diagonal")),
        InvalidArgumentError, ("kind 'ief'", "'ef'", "fk.EmpiricalFisher")),
    "normalize": (converting(1.0, normalize="max"), InvalidArgumentError, ("normalize='max'",)),
}  # fmt: skip


@pytest.mark.parametrize("name", ids(CONVERSIONS))
def test_convert_strength__refuses_with_a_message(name: str) -> None:
    check(Case(*CONVERSIONS[name]))
