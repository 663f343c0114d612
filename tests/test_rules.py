"""Layer rules: which function gets which rule, that autograd has the last word, and how rows are kept."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fisherkit as fk
from fisherkit.operators import unwrap
from fisherkit.rows import rules
from tests import by_hand
from tests.reference.fisher import full, rows
from tests.reference.models import FAMILIES
from tests.reference.outputs import EF
from tests.reference.zoo import Compose
from tests.test_later_uses import Model, X, check


def build(name: str, **options: object) -> fk.EmpiricalFisher:
    family = FAMILIES[name]
    model, inputs, targets = family.build()
    data = {**inputs, "labels": targets} if isinstance(inputs, dict) else (inputs, targets)
    return fk.EmpiricalFisher(model, data, likelihood=family.likelihood, example=family.example, **options)


def generic_names(fisher: fk.FisherApproximation) -> set[str]:
    return {name for e in fisher.coverage().entries if e.rule in {"torch.func", "loop"} for name in e.parameters}


@pytest.mark.parametrize("name", FAMILIES)
def test_coverage__nothing_goes_the_generic_way(name: str) -> None:
    """A broken rule is replaced, not believed, so that only the coverage shows it."""
    assert generic_names(build(name)) == set()


@pytest.mark.parametrize(
    ("name", "function"),
    [
        ("mlp", F.linear),
        ("conv2d", F.conv2d),
        ("conv_transpose2d", F.conv_transpose2d),
        ("embedding", F.embedding),
        ("layernorm", F.layer_norm),
        ("batchnorm2d", F.batch_norm),
        ("bare_parameters", torch.Tensor.add),
        ("residual_conv", torch.Tensor.mul),
    ],
)
def test_wrong_rule__is_not_believed(name: str, function: object, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that autograd does not confirm are made the generic way: the matrix stays right."""
    good = type(rules.RULES[function])

    class Wrong(good):  # type: ignore[misc, valid-type]
        def gradients(self, use, gradient):  # type: ignore[no-untyped-def]
            return 1.01 * super().gradients(use, gradient)

    wrong = Wrong.__new__(Wrong)
    wrong.__dict__.update(rules.RULES[function].__dict__)
    monkeypatch.setitem(rules.RULES, function, wrong)
    fisher, expected = build(name), full(rows(FAMILIES[name].problem(), EF))
    assert generic_names(fisher)
    assert any("autograd does not confirm" in e.reason for e in fisher.coverage().entries)
    assert (fisher.to_dense() - expected).norm() <= 1e-10 * expected.norm()


class Flattened(nn.Module):
    """Linear layers that see their examples first, second, and flattened either way round."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.major, self.minor = (nn.Linear(3, 3) for _ in range(4))
        self.head = nn.Linear(3, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, t, c = x.shape
        x = torch.tanh(self.first(x))
        x = torch.tanh(self.second(x.transpose(0, 1))).transpose(0, 1)
        x = torch.tanh(self.major(x.reshape(b * t, c))).reshape(b, t, c)
        x = torch.tanh(self.minor(x.transpose(0, 1).reshape(t * b, c))).reshape(t, b, c)
        return self.head(x.transpose(0, 1)).mean(1)


@pytest.mark.parametrize("positions", [2, 3, 5])
def test_layouts__are_told_apart_even_when_positions_are_as_many_as_examples(positions: int) -> None:
    torch.manual_seed(0)
    model = Flattened().double()
    x, y = torch.randn(3, positions, 3).double(), torch.tensor([0, 1, 1])
    fisher = fk.ExactFisher(model, [(x[:2], y[:2]), (x[2:], y[2:])])
    reasons = {e.parameters[0]: e.reason for e in fisher.coverage().entries}
    assert "batch second" in reasons["second.weight"]
    assert "flattened, batch major" in reasons["major.weight"]
    assert "flattened, position major" in reasons["minor.weight"]
    jacobian = torch.autograd.functional.jacobian(
        lambda *p: torch.func.functional_call(model, dict(zip(names, p, strict=True)), (x,)),
        tuple(dict(model.named_parameters()).values()),
    ) if (names := list(dict(model.named_parameters()))) else ()  # fmt: skip
    j = torch.cat([g.reshape(3, 2, -1) for g in jacobian], 2)
    p = torch.softmax(model(x), -1).detach()
    h = torch.diag_embed(p) - p.unsqueeze(-1) * p.unsqueeze(-2)
    expected = torch.einsum("nci,ncd,ndj->ij", j, h, j) / 3
    assert (fisher.to_dense() - expected).norm() <= 1e-10 * expected.norm()


def test_cost_model__keeps_whichever_is_smaller() -> None:
    torch.manual_seed(0)
    wide = nn.Sequential(nn.Linear(40, 50), nn.Tanh(), nn.Linear(50, 3))
    x, y = torch.randn(8, 40), torch.randint(0, 3, (8,))
    entries = {e.parameters[0]: e for e in fk.EmpiricalFisher(wide, (x, y)).coverage().entries}
    assert "factored" in entries["0.weight"].structure
    assert entries["0.weight"].memory == 8 * (40 + 50) * 4  # never N × D
    long = nn.Sequential(nn.Conv1d(2, 3, 3), nn.Flatten(), nn.Linear(3 * 62, 3))
    x = torch.randn(8, 2, 64)
    entries = {e.parameters[0]: e for e in fk.EmpiricalFisher(long, (x, y)).coverage().entries}
    assert "stored" in entries["0.weight"].structure
    assert entries["0.weight"].memory == 8 * (2 * 3 * 3 + 3) * 4


def test_rows__do_not_change_with_the_batch_that_they_came_from() -> None:
    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    x, y = torch.randn(6, 4), torch.randint(0, 3, (6,))
    fisher = fk.EmpiricalFisher(model, (x, y))
    before = fisher.to_dense()
    x.zero_()
    assert torch.equal(fisher.to_dense(), before)


def branching() -> Compose:
    """Uses one of two layers, by the data."""
    return Compose(lambda m, x: m.a(x) if bool((x.mean() < 5).item()) else m.b(x), a=nn.Linear(3, 2), b=nn.Linear(3, 2))


@pytest.mark.parametrize("structure", ["full", "block", "diagonal", "kfac", "ekfac"])
def test_layer_that_a_batch_does_not_use__has_zero_rows(structure: str) -> None:
    torch.manual_seed(0)
    x, y = torch.randn(4, 3).double(), torch.tensor([0, 1, 0, 1])
    model = branching().double()
    fisher = fk.EmpiricalFisher(model, [(x, y), (x + 10, y)], structure=structure)
    alone = [fk.EmpiricalFisher(model, (x + shift, y), structure=structure) for shift in (0, 10)]
    expected = 0.5 * (alone[0].trace() + alone[1].trace())
    torch.testing.assert_close(fisher.trace(), expected)
    assert {entry.rule for entry in fisher.coverage().entries} == {"linear"}


@pytest.mark.parametrize("kind", [fk.EmpiricalFisher, fk.ExactFisher])
def test_parameter_that_nothing_depends_on__has_zero_rows(kind: type[fk.FisherApproximation]) -> None:
    torch.manual_seed(0)
    model = branching().double()
    fisher = kind(model, (torch.randn(4, 3).double(), torch.tensor([0, 1, 0, 1])))
    diagonal = fisher.space.unflatten(fisher.diagonal())
    assert float(diagonal["a.weight"].sum()) > 0
    assert not bool(diagonal["b.weight"].any())


def test_streamed_fisher__refuses_a_model_that_was_trained_on() -> None:
    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    fisher = fk.EmpiricalFisher(model, (torch.randn(6, 4), torch.randint(0, 3, (6,))), memory_budget=1)
    assert torch.isfinite(fisher.diagonal()).all()
    with torch.no_grad():
        model.weight.add_(1.0)
    with pytest.raises(fk.ModelError, match=r"changed since the Fisher was built: \['weight'\]"):
        fisher.diagonal()


def through_data(model: nn.Module) -> None:
    model[0].weight.data.mul_(2)


def other_data(model: nn.Module) -> None:
    model[0].weight.data = 2 * model[0].weight.data


def other_parameter(model: nn.Module) -> None:
    model[0].weight = nn.Parameter(2 * model[0].weight.detach())


def buffer(model: nn.Module) -> None:
    model[1].running_mean.add_(1)


@pytest.mark.parametrize("kind", [fk.EmpiricalFisher, fk.ExactFisher])
@pytest.mark.parametrize("change", [through_data, other_data, other_parameter, buffer])
def test_streamed_fisher__refuses_weights_that_were_replaced(
    change: Callable[[nn.Module], None], kind: type[fk.FisherApproximation]
) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 4)).eval()
    fisher = kind(model, (torch.randn(6, 4), torch.randint(0, 4, (6,))), memory_budget=1)
    v = torch.ones(fisher.size)
    torch.testing.assert_close(fisher @ v, fisher @ v)
    change(model)
    for operation in (lambda: fisher @ v, fisher.diagonal):
        with pytest.raises(fk.ModelError, match="changed since the Fisher was built"):
            operation()


@pytest.mark.parametrize("chunk_size", [1, 2, 5, 64])
def test_gram__has_its_rows_in_the_order_of_examples_for_any_chunks(chunk_size: int) -> None:
    """Chunks cut every example's vectors; rows come back by example, position and vector."""
    model, inputs, targets = FAMILIES["token_mlp"].build()
    expected = fk.ExactFisher(model, (inputs, targets)).gram()
    split = [(inputs[:3], targets[:3]), (inputs[3:], targets[3:])]
    for data in ((inputs, targets), split):
        found = fk.ExactFisher(model, data, chunk_size=chunk_size).gram()
        assert (found - expected).norm() <= 1e-12 * expected.norm()


class Positions(nn.Module):
    """Tokens and their positions, which come from the model itself and so have no batch axis."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.token, self.position = nn.Embedding(11, 6), nn.Embedding(7, 6)
        self.head, self.scale = nn.Linear(6, 3), nn.Parameter(torch.tensor(1.3))

    def forward(self, x: Tensor) -> Tensor:
        place = torch.arange(x.shape[1])
        h = self.token(x)
        if self.how == "no axis":
            h = h + self.position(place)
        elif self.how == "axis of one":
            h = self.position(place.unsqueeze(0)) + h
        else:
            h = h + self.position(place.unsqueeze(0)).repeat(len(x), 1, 1)
        return self.head(torch.tanh(self.scale * h).mean(1))


@pytest.mark.parametrize("batch", [1, 2, 5, 7])  # one a position too: 7 tokens
@pytest.mark.parametrize("how", ["no axis", "axis of one", "repeated"])
def test_positions__that_all_examples_share_have_rows_of_their_own(how: str, batch: int) -> None:
    torch.manual_seed(0)
    model = Positions(how).double()
    x, y = torch.randint(11, (batch, 7)), torch.randint(3, (batch,))
    # Batches of another size than the first, down to one example.
    data = [(x[:3], y[:3]), (x[3:], y[3:])] if batch > 3 else (x, y)
    fisher = fk.EmpiricalFisher(model, data)
    expected = by_hand.fisher(model, (x, y))
    assert (fisher.to_dense() - expected).norm() <= 1e-12 * expected.norm()
    assert generic_names(fisher) == set()


@pytest.mark.parametrize("name", ["embedding", "mlp", "conv2d", "token_attention"])
def test_rows__in_any_order_and_number_are_those_rows(name: str) -> None:
    rows = unwrap(build(name)).row_source
    order = torch.randperm(rows.count, generator=torch.Generator().manual_seed(0))[: rows.count // 2 + 1]
    torch.testing.assert_close(rows.reordered(order).dense(), rows.dense()[order], rtol=0, atol=0)


@pytest.mark.parametrize("structure", ["full", "diagonal", "kfac", "ekfac", "nkp"])
@pytest.mark.parametrize(
    ("shape", "turned"), [((15,), False), ((15,), True), ((3, 5), False), ((5, 3), True), ((1, 15), False)], ids=str
)
def test_weight__that_is_a_view_of_another_shape_has_no_factors_of_it(
    shape: tuple[int, ...], turned: bool, structure: str
) -> None:
    """The parameter's own block, as it is small: Kronecker factors are of its own first axis and the others."""

    def viewed(x: Tensor, w: Tensor) -> Tensor:
        return F.linear(x, w.view(3, 5).T if turned else w.view(5, 3)).tanh()

    check(Model(viewed, shape), X, structure=structure)


@pytest.mark.parametrize("structure", ["kfac", "ekfac"])
def test_last_layer__of_a_view_of_another_shape(structure: str) -> None:
    """Of the exact kind, a last layer of many outputs has a closed form; not this one."""

    def viewed(x: Tensor, w: Tensor, head: Tensor) -> Tensor:
        return F.linear((x @ w).tanh(), head.view(7, 2))

    model = Model(viewed, (3, 2), (2, 7))
    fisher = fk.ExactFisher(model, (X, None), likelihood="gaussian", structure=structure)
    torch.testing.assert_close(fisher.to_dense()[6:, 6:], by_hand.fisher(model, (X, None), "gaussian")[6:, 6:])
