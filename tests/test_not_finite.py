"""NaN and infinity that finite outputs hide: refused by batch and module, wherever rows, sums and scores are made."""

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fisherkit as fk
from fisherkit.arithmetic import all_finite
from fisherkit.operators import LowRankOperator, unwrap
from fisherkit.rows.base import UnitRows
from fisherkit.rows.collection import Rows
from fisherkit.structures import base
from fisherkit.structures.diagonal import Squares
from tests.axes import paired

STRUCTURES = ("full", "block", "diagonal", "kfac", "ekfac")
KINDS: dict[str, Callable[..., fk.FisherApproximation]] = {
    "ef": fk.EmpiricalFisher,
    "ief": fk.ImprovedEmpiricalFisher,
    "sf": fk.SampledFisher,
    "exact": fk.ExactFisher,
    "truncated": fk.TruncatedFisher,
}
INF = math.inf


class Masked(nn.Module):
    """Positions that a mask leaves out of the mean, whatever they hold."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.last = nn.Linear(3, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        h, keep = torch.tanh(self.inner(x)), torch.isfinite(x).all(2, keepdim=True)
        return self.last(torch.where(keep, h, torch.zeros_like(h)).sum(1))


class Rooted(nn.Module):
    """A square root whose derivative at 0 is infinite."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(3, 5, bias=False), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(x).abs().sqrt())


class Custom(nn.Module):
    """Arithmetic that no layer rule covers."""

    def __init__(self) -> None:
        super().__init__()
        self.slope, self.last = nn.Parameter(torch.ones(3)), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(x * self.slope.exp() ** 2))


def saturating() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 3))


def convolution() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 2, 2), nn.Sigmoid(), nn.Flatten(), nn.Linear(8, 3))


FAMILIES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], float, str]] = {
    "saturating": (saturating, (3,), INF, "'0' ('0.weight', '0.bias')"),
    "convolution": (convolution, (1, 3, 3), INF, "'0' ('0.weight', '0.bias')"),
    "masked": (Masked, (4, 3), math.nan, "'inner' ('inner.weight', 'inner.bias')"),
    "rooted": (Rooted, (3,), 0.0, "'first' ('first.weight')"),
    "custom": (Custom, (3,), INF, "'' ('slope')"),
}


def case(family: str) -> tuple[nn.Module, list[tuple[Tensor, Tensor]], str]:
    """A model, three batches of which the last has one example that spoils its rows, and the module it names."""
    torch.manual_seed(0)
    make, shape, bad, named = FAMILIES[family]
    model, x, y = make(), torch.randn(9, *shape), torch.randint(3, (9,))
    if family == "rooted":
        x[7] = bad
    else:
        x[7].view(-1)[1] = bad
    assert bool(torch.isfinite(model(x)).all())
    return model, [(x[i : i + 3], y[i : i + 3]) for i in (0, 3, 6)], named


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("family", FAMILIES)
def test_build__names_batch_and_module(family: str, structure: str) -> None:
    model, data, named = case(family)
    with pytest.raises(fk.NonFiniteError) as caught:
        fk.EmpiricalFisher(model, data, structure=structure)
    assert caught.value.call == "data, batch 2"
    assert named in caught.value.got
    assert all((caught.value.expected, caught.value.why, caught.value.try_))


@pytest.mark.parametrize(("kind", "structure"), paired(KINDS, STRUCTURES))
def test_build__of_every_kind_refuses(kind: str, structure: str) -> None:
    model, data, _ = case("saturating")
    with pytest.raises(fk.NonFiniteError, match="data, batch 2"):
        KINDS[kind](model, data, structure=structure, chunk_size=2)
    with pytest.raises(fk.NonFiniteError, match=r"data, batch 0.*'0\.weight'"):
        KINDS[kind](model, (data[2][0][[1, 0, 2]], data[2][1]), structure=structure)  # in the two that are looked at


@pytest.mark.parametrize("kind", KINDS)
def test_max_rows_and_streamed_products__refuse(kind: str) -> None:
    model, data, _ = case("saturating")
    with pytest.raises(fk.NonFiniteError, match="data, batch 2"):
        KINDS[kind](model, data, max_rows=3)
    streamed = KINDS[kind](model, data, memory_budget=1)
    v = torch.ones(streamed.size)
    for operation in (lambda: streamed @ v, streamed.diagonal, streamed.trace, lambda: streamed.solve(v, 0.1)):
        with pytest.raises(fk.NonFiniteError, match=r"data, batch 2.*0\.weight"):
            operation()


def test_ekfac_in_two_passes__refuses_in_the_first() -> None:
    model, data, _ = case("saturating")
    with pytest.raises(fk.NonFiniteError, match="data, batch 2"):
        fk.EmpiricalFisher(model, data, structure="ekfac", memory_budget=1_000)


@pytest.mark.parametrize("structure", STRUCTURES)
def test_influence__names_batch_and_module_on_both_sides(structure: str, tmp_path: Path) -> None:
    model, data, _ = case("saturating")
    scores = fk.influence.InfluenceScores(fk.EmpiricalFisher(model, data[:2], structure=structure), model, damping=0.1)
    calls: list[Callable[[], Any]] = [
        lambda: scores.scores(data[:1], data),
        lambda: scores.scores(data, data[:1]),
        lambda: scores.scores(data[:1], data, by="module"),
        lambda: scores.top(data[:1], data, k=2),
        lambda: scores.self_influence(data),
        lambda: scores.leverages(data),
        lambda: scores.prepare(data),
        lambda: scores.prepare(data, folder=tmp_path / "rows"),
        lambda: scores.approximate_scores(data[:1], data, fk.influence.LowRankQueries(2)),
    ]
    for call in calls:
        with pytest.raises(fk.NonFiniteError, match=r"data, batch 2.*0\.weight"):
            call()


def test_influence__counts_the_batches_that_the_data_have(tmp_path: Path) -> None:
    model, data, _ = case("saturating")
    # Room for one example in a block: a batch is cut into three.
    scores = fk.influence.InfluenceScores(fk.EmpiricalFisher(model, data[:2]), model, damping=0.1, memory_budget=2_000)
    for call in (lambda: scores.self_influence(data), lambda: scores.prepare(data, folder=tmp_path / "rows")):
        with pytest.raises(fk.NonFiniteError, match=r"data, batch 2\b"):
            call()


def test_scores__that_are_not_finite_are_no_scores() -> None:
    model, data, _ = case("saturating")
    scores = fk.influence.InfluenceScores(fk.EmpiricalFisher(model, data[:2]), model, damping=0.1)
    prepared = scores.prepare(data[:2])
    next(iter(prepared)).rows.slots[0].rows.numbers[1][1] = math.nan
    for call in (
        lambda: scores.scores(data[:1], prepared),
        lambda: scores.top(data[:1], prepared, k=2),
        lambda: scores.self_influence(prepared),
    ):
        with pytest.raises(fk.NonFiniteError, match="scores with NaN"):
            call()


def test_load__refuses_rows_that_are_not_finite(tmp_path: Path) -> None:
    model, data, _ = case("saturating")
    for structure in STRUCTURES:
        fisher = fk.EmpiricalFisher(model, data[:2], structure=structure)
        for tensor in _tensors(fisher):
            tensor.view(-1)[0] = math.nan
        fisher.save(tmp_path / f"{structure}.safetensors")
        with pytest.raises(fk.FileFormatError, match="NaN or infinite"):
            fk.load(tmp_path / f"{structure}.safetensors")


def _tensors(fisher: fk.FisherOperator) -> list[Tensor]:
    operator = unwrap(fisher)
    if isinstance(operator, LowRankOperator):
        assert isinstance(operator.row_source, Rows)
        return [t for slot in operator.row_source.slots for t in slot.rows.tensors().values() if t.is_floating_point()]
    return [t for state in [fk.operators.state_of(operator)] for t in _leaves(state)]


def _leaves(state: Any) -> list[Tensor]:
    own = [t for t in state.tensors.values() if t.is_floating_point()]
    return own + [t for child in state.children for t in _leaves(child)]


@pytest.mark.parametrize("normalize", ["trace", None])
def test_consolidate__refuses_a_fisher_that_is_not_finite(normalize: str | None) -> None:
    model, data, _ = case("saturating")
    fisher = fk.EmpiricalFisher(model, data[:2])
    _tensors(fisher)[1].view(-1)[0] = math.nan
    ewc = fk.continual.EWC(model, normalize=normalize)
    with pytest.raises(fk.NonFiniteError):
        ewc.consolidate(fisher)
    assert ewc.consolidations == 0


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("kind", ["ief", "exact"])
def test_natural_gradient__names_the_parameters_and_changes_nothing(kind: str, structure: str) -> None:
    model, data, _ = case("saturating")
    before = copy.deepcopy(model.state_dict())
    optimizer = fk.optim.NaturalGradient(model, lr=0.1, kind=kind, structure=structure, damping=0.1)
    F.cross_entropy(model(data[0][0]), data[0][1]).backward()
    optimizer.zero_grad()
    F.cross_entropy(model(data[2][0]), data[2][1]).backward()
    with pytest.raises(fk.NonFiniteError, match=r"NaturalGradient\.step.*'0\.weight'"):
        optimizer.step()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("structure", ["diagonal", "kfac", "ekfac"])
def test_optimizers__keep_averages_from_rows_that_are_not_finite(structure: str) -> None:
    model, data, _ = case("saturating")
    preconditioner = fk.optim.Preconditioner(model, kind="ief", structure=structure, damping=0.1, ema=0.5)
    for x, y in (data[0], data[2], data[1]):
        model.zero_grad()
        F.cross_entropy(model(x), y).backward()
        if x is data[2][0]:
            with torch.no_grad():
                for p in model.parameters():
                    p.grad = torch.ones_like(p)  # as of a loss that is finite by other means
            with pytest.raises(fk.NonFiniteError, match=r"Preconditioner\.step, forward pass 0.*0\.weight"):
                preconditioner.step()
            continue
        preconditioner.step()
    assert all(bool(torch.isfinite(p.grad).all()) for p in model.parameters() if p.grad is not None)


def test_gradient_scaler__skips_steps_as_before() -> None:
    model, data, _ = case("saturating")
    before = copy.deepcopy(model.state_dict())
    optimizer = fk.optim.NaturalGradient(model, lr=0.1, damping=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=1e38)
    for _ in range(2):
        scaler.scale(100 * F.cross_entropy(model(data[0][0]), data[0][1])).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        if _ == 0:
            assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
            scaler.update(1.0)
    assert not all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_evaluation__names_batch_and_parameters() -> None:
    model, data, _ = case("saturating")
    with pytest.raises(fk.NonFiniteError, match=r"data, batch 2.*'0\.weight'"):
        fk.evaluation.loss_gradient(model, data)
    with pytest.raises(fk.NonFiniteError, match=r"data, batch 0.*0\.weight"):
        fk.evaluation.compare(model, data[2], kinds=["ef"])


# -- finite rows whose squares are not ---------------------------------------------------------------------------------


def large(size: float, dtype: torch.dtype) -> tuple[nn.Module, list[tuple[Tensor, Tensor]]]:
    """Three batches, of which the second has an example with an input, and so a gradient, of this size."""
    torch.manual_seed(0)
    model, x, y = nn.Linear(4, 3), torch.randn(9, 4), torch.randint(3, (9,))
    x[4, 1] = size
    y[4] = model(x[4]).argmin()
    return model.to(dtype), [(x[i : i + 3].to(dtype), y[i : i + 3]) for i in (0, 3, 6)]


@pytest.mark.parametrize(
    "options",
    [*({"structure": name} for name in (*STRUCTURES, "nkp")), {"max_rows": 5}, {"storage": "stream"}],
    ids=lambda options: "-".join(map(str, options.values())),
)
@pytest.mark.parametrize("kind", ["ef", "ief"])
def test_squares__that_overflow_are_refused_by_name(kind: str, options: dict[str, Any]) -> None:
    words = r"infinite sums of squares: .*'weight'.*too large for torch\.float32, whose largest number is 3\.4e\+38"
    with pytest.raises(fk.NonFiniteError, match=words + r".*Try: model and data in float64"):
        fk.FisherApproximation(*large(1e21, torch.float32), kind, **options).trace()
    fk.FisherApproximation(*large(1e21, torch.float64), kind, **options).trace()
    found, expected = (
        fk.FisherApproximation(*large(1e15, dtype), kind, **options).trace().double()
        for dtype in (torch.float32, torch.float64)
    )
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=0)


@pytest.mark.parametrize("kind", ["ef", "exact"])
def test_squares__that_overflow_in_a_streamed_product_are_refused(kind: str) -> None:
    model, data = large(1e21, torch.float32)
    data, likelihood = (data, "categorical") if kind == "ef" else ([(x, None) for x, _ in data], "gaussian")
    fisher = fk.FisherApproximation(model, data, kind, likelihood=likelihood, storage="stream")
    with pytest.raises(fk.NonFiniteError, match=r"infinite sums of squares: .*'weight'.*too large for torch\.float32"):
        _ = fisher @ torch.arange(float(fisher.size))


@pytest.mark.parametrize("structure", [*STRUCTURES, "nkp"])
@pytest.mark.parametrize("beside", [False, True], ids=["natural", "preconditioner"])
def test_steps__of_squares_that_overflow_are_refused_and_change_nothing(structure: str, beside: bool) -> None:
    (model, (first, second, third)), found = large(1e21, torch.float32), []
    for whole in (True, False):
        own = copy.deepcopy(model)
        options: dict[str, Any] = {"kind": "ef", "structure": structure, "damping": 0.1}
        if structure not in ("full", "block"):
            options["ema"] = 0.5
        optimizer: Any = (
            fk.optim.Preconditioner(own, **options) if beside else fk.optim.NaturalGradient(own, 0.1, **options)
        )
        for x, y in (first, second, third) if whole else (first, third):
            own.zero_grad()
            F.cross_entropy(own(x), y).backward()
            if x is not second[0]:
                optimizer.step()
                continue
            before = str((optimizer.state_dict(), own.state_dict()))
            with pytest.raises(fk.NonFiniteError, match=r"\.step: got .*infinite sums of squares: 'weight'"):
                optimizer.step()
            assert str((optimizer.state_dict(), own.state_dict())) == before
        found.append([p.grad if beside else p for p in own.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("structure", [*STRUCTURES, "nkp"])
@pytest.mark.parametrize("depth", [1, 2])
def test_squares__of_rows_that_are_made_a_vector_at_a_time(depth: int, structure: str) -> None:
    torch.manual_seed(0)
    model = nn.Linear(4, 3) if depth == 1 else nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 3))
    x = torch.randn(6, 4)
    options: dict[str, Any] = {"likelihood": "gaussian", "structure": structure, "chunk_size": 6}
    fk.ExactFisher(model, (x, None), **options)
    x[4, 1] = 1e21
    with pytest.raises(fk.NonFiniteError, match=r"infinite sums of squares: .*'([01]\.)?weight'"):
        fk.ExactFisher(model, (x, None), **options).trace()


@pytest.mark.parametrize("structure", [*STRUCTURES, "nkp"])
@pytest.mark.parametrize("params", [None, ["1.weight", "1.bias"]], ids=["above others", "alone"])
def test_squares__of_a_last_layer_whose_rows_are_never_made(params: Any, structure: str) -> None:
    """Inputs of 1e15 and a loss whose Hessian is 1e10: each Kronecker factor is finite, and their products are not."""
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 20)), torch.rand(6, 4) + 0.5
    with torch.no_grad():
        model[0].weight.mul_(1e15)
        model[1].weight.zero_()
        model[1].bias.fill_(23.0)
    options: dict[str, Any] = {"likelihood": "poisson", "structure": structure, "params": params}
    with pytest.raises(fk.NonFiniteError, match=r"infinite sums of squares: .*'1\.weight'"):
        fk.ExactFisher(model, (x, None), **options).trace()
    fk.ExactFisher(model.double(), (x.double(), None), **options).trace()


@pytest.mark.parametrize("where", ["next_pass", "operator"])
def test_an_error__of_a_users_own_structure_stays_as_it_is(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base, "_BY_NAME", dict(base._BY_NAME))  # so that no other test meets it

    class Own(fk.structures.LayerStructure):
        name = "own"

        def record(self, rows: UnitRows) -> Squares:
            return Squares(rows.squared_sum())

    def fail(*_: Any) -> None:
        raise fk.NonFiniteError("my structure", "a logarithm of 0", "a number above 0")

    monkeypatch.setattr(Own, where, fail)
    with pytest.raises(fk.NonFiniteError, match=r"^my structure: got a logarithm of 0"):
        fk.EmpiricalFisher(*large(1.0, torch.float32), structure="own")


def test_sums__of_squares_that_overflow_together_are_refused() -> None:
    model, ((_, _), (x, y), _) = large(1e19, torch.float32)
    one = [(x[1:2], y[1:2])]
    for structure in STRUCTURES:
        assert bool(torch.isfinite(fk.EmpiricalFisher(model, one, structure=structure).trace()))
        with pytest.raises(fk.NonFiniteError, match="infinite sums of squares"):
            fk.EmpiricalFisher(model, one * 4, structure=structure)


@pytest.mark.parametrize("passes", [1, 4])
@pytest.mark.parametrize("structure", [*STRUCTURES, "nkp"])
def test_steps__of_squares_that_overflow_in_sum_or_in_eigenvectors_leave_averages_alone(
    structure: str, passes: int
) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))
    x, y = torch.randn(8, 6), torch.randn(8, 3)
    averaged: dict[str, Any] = {} if structure in ("full", "block") else {"ema": 0.9}
    refused = 0
    for size in (5e18, 6e18, 7e18, 9e18):
        before = fk.optim.Preconditioner(
            model, kind="ef", likelihood="gaussian", structure=structure, damping=fk.RelativeDamping(0.1), **averaged
        )
        found = []
        for targets in (y, y * size, y):
            model.zero_grad()
            for part in range(passes):
                loss = (model(x[part::passes]) - targets[part::passes]).square().sum(1).mean()
                (loss / (2 * passes)).backward()
            try:
                before.step()
            except fk.NonFiniteError:
                refused += 1
                continue
            found.append(torch.cat([p.grad.flatten() for p in model.parameters()]).double())
        before.close()
        assert all(bool(torch.isfinite(g).all()) and bool(g.any()) for g in found)
        if len(found) == 2 or structure in ("full", "block"):  # nothing is left of what was refused or is over
            torch.testing.assert_close(found[-1], found[0], rtol=1e-4, atol=1e-6)
    assert refused


def test_nkp__of_large_gradients_is_that_of_small_ones_rescaled() -> None:
    torch.manual_seed(0)
    model, x, y = nn.Linear(4, 3), torch.randn(6, 4), torch.randn(6, 3)
    for size in (1e15, 1e18):
        small, large_ones = (
            fk.EmpiricalFisher(one, (a, y.to(a) * size), likelihood="gaussian", structure="nkp").trace()
            for one, a in ((copy.deepcopy(model).double(), x.double()), (model, x))
        )
        torch.testing.assert_close(large_ones.double(), small.double(), rtol=1e-4, atol=0)


# -- what is not refused -----------------------------------------------------------------------------------------------


def test_pixels_that_no_window_sees__do_not_count() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 2, 1, stride=2), nn.Flatten(), nn.Linear(8, 3))
    x, y = torch.randn(4, 1, 4, 4), torch.randint(3, (4,))
    clean = fk.EmpiricalFisher(model, (x, y), structure="kfac").to_dense()
    spoilt = x.clone()
    spoilt[3, 0, 1, 1] = INF
    assert torch.equal(fk.EmpiricalFisher(model, (spoilt, y), structure="kfac").to_dense(), clean)


def test_large_numbers__whose_sum_overflows_are_finite() -> None:
    assert all_finite(torch.full((4,), 3e38), torch.full((9,), 6e4, dtype=torch.float16))
    assert all_finite(torch.empty(0), torch.ones(2, dtype=torch.long))
    assert not all_finite(torch.tensor([INF, -INF]))
    assert not all_finite(torch.ones(3), torch.tensor([math.nan], dtype=torch.float16))


@pytest.mark.parametrize("place", [0, 3], ids=["of the first two", "behind them"])
def test_outputs__that_are_not_finite_are_no_influence_of_company(place: int) -> None:
    """The model is tried on some of the first batch before any row is made: NaN is not equal to itself."""
    torch.manual_seed(0)
    model, x, y = nn.Linear(4, 3), torch.randn(8, 4), torch.randint(3, (8,))
    x[place, 1] = math.nan
    with pytest.raises(fk.NonFiniteError, match="data, batch 0: got model outputs with NaN"):
        fk.EmpiricalFisher(model, (x, y), structure="diagonal")
