"""What an optimizer inverts: damping for each row, and the leading part of large factors."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fisherkit as fk
from fisherkit import likelihoods
from fisherkit.operators import EigenKroneckerOperator
from fisherkit.operators.layer_layout import LayerLayout
from fisherkit.operators.linalg import Spectrum, leading_spectrum
from fisherkit.optim import NaturalGradient, Preconditioner, RowDamped
from fisherkit.outputs import OutputRule, Outputs
from fisherkit.space import ParameterSpace
from fisherkit.testing import check_fisher
from fisherkit.vectors import rule_of
from tests import by_hand
from tests.axes import pairwise

KINDS: list[tuple[str, dict[str, Any]]] = [
    ("ef", {}), ("ief", {}), ("ief", {"power": 0.5}), ("sf", {"draws": 2}), ("exact", {}),
    ("truncated", {"rank": 1}), ("truncated", {"rank": 2}), ("truncated", {"tolerance": 1e-2}),
]  # fmt: skip
TARGETS = {
    "categorical": lambda n, positions: torch.randint(4, (n, positions)),
    "gaussian": lambda n, positions: torch.randn(n, positions, 4, dtype=torch.float64),
    "bernoulli": lambda n, positions: torch.randint(2, (n, positions, 4)).double(),
}


def outputs_of(likelihood: str, positions: int = 1) -> Outputs:
    torch.manual_seed(0)
    z = 2 * torch.randn(5, positions, 4, dtype=torch.float64)
    keys = torch.arange(5 * positions).reshape(5, positions)
    mask = torch.ones(5, positions, dtype=torch.bool)
    return Outputs(z, TARGETS[likelihood](5, positions), mask, keys, likelihoods.resolve(likelihood))


def output_fisher(rule: OutputRule, outputs: Outputs) -> Tensor:
    """Σ_m v vᵀ of each unit, ``[n, P·C, P·C]``."""
    found, n = rule.output_vectors(outputs), len(outputs.z)
    total = torch.zeros(n, *2 * [outputs.z[0].numel()], dtype=torch.float64)
    for m in range(found.number):
        v = found.select(torch.arange(n), torch.full((n,), m)).flatten(1)
        v = v if found.keep is None else v * found.keep[:, m, None]
        total += v[:, :, None] * v[:, None, :]
    return total


@pytest.mark.parametrize(
    ("kind", "options", "likelihood", "positions"), [(*kind, *rest) for kind, *rest in pairwise(KINDS, TARGETS, [1, 3])]
)
def test_output_fisher__is_the_kinds_and_a_multiple_of_iefs(
    kind: str, options: dict[str, Any], likelihood: str, positions: int
) -> None:
    outputs = outputs_of(likelihood, positions)
    if rule_of(kind, call="test", options=options).positionwise:
        outputs = outputs.positionwise()
    expected = output_fisher(rule_of(kind, call="test", options=options), outputs) + 0.3 * output_fisher(
        rule_of("ief", call="test"), outputs
    )
    torch.testing.assert_close(output_fisher(RowDamped(kind, 0.3, **options), outputs), expected)


def test_rule__is_recorded_and_may_be_an_object() -> None:
    rule = RowDamped("truncated", 0.1, rank=1)
    assert (rule.kind_name, rule.kind_options()) == ("row-damped truncated", {"rank": "1", "row_damping": "0.1"})
    assert rule.along_gradient
    assert not RowDamped("truncated", 0.1, rank=2).along_gradient
    assert RowDamped(rule, 1).kind_options()["row_damping"] == "1.0"


@pytest.mark.parametrize(
    ("arguments", "error", "said"),
    [
        (("ief", 0.0), fk.InvalidArgumentError, "a finite number above 0"),
        (("ief", float("inf")), fk.InvalidArgumentError, "a finite number above 0"),
        (("ief", "much"), fk.InvalidTypeError, "row_damping of type str"),
        (("newton", 0.1), fk.InvalidArgumentError, "kind='newton'"),
    ],
    ids=str,
)
def test_rule__says_what_is_wrong(arguments: tuple[Any, Any], error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said):
        RowDamped(*arguments)


def step(model: nn.Module, kind: str | OutputRule, x: Tensor, y: Tensor, **options: Any) -> Tensor:
    """How far one step of the natural gradient moves the parameters."""
    before = nn.utils.parameters_to_vector(model.parameters()).detach().clone()
    optimizer = NaturalGradient(model, lr=1.0, kind=kind, damping=1e-6, **options)
    F.cross_entropy(model(x), y).backward()
    optimizer.step()
    optimizer.close()
    return nn.utils.parameters_to_vector(model.parameters()).detach() - before


def test_step__is_the_dense_solution() -> None:
    torch.manual_seed(0)
    model = nn.Linear(3, 4).double()
    x, y = torch.randn(6, 3).double(), torch.randint(4, (6,))
    g = by_hand.gradient(F.cross_entropy(model(x), y), model)
    kinds = (fk.TruncatedFisher(model, (x, y), rank=2), fk.ImprovedEmpiricalFisher(model, (x, y)))
    dense, floor = (fisher.to_dense() for fisher in kinds)
    expected = -torch.linalg.solve(dense + 0.2 * floor + 1e-6 * torch.eye(len(g)).double(), g)
    torch.testing.assert_close(step(model, RowDamped("truncated", 0.2, rank=2), x, y), expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("kind", ["truncated", "exact"])
def test_step__of_a_surely_wrong_example_is_bounded(kind: str) -> None:
    """Along û the logits move by no more than ‖∂ℓ/∂z‖ / ε; without row damping by about 1 / p."""
    x, y = torch.tensor([[1.0, 0.0, 0.0]]).double(), torch.tensor([0])
    moves = []
    u = torch.tensor([0.0, 8.0, 0.0, 0.0]).double().softmax(0) - torch.tensor([1.0, 0.0, 0.0, 0.0])
    for rule in (kind, RowDamped(kind, 0.1)):
        model = nn.Linear(3, 4, bias=False).double()
        with torch.no_grad():
            model.weight.zero_()
            model.weight[1, 0] = 8.0
        step(model, rule, x, y)
        with torch.no_grad():
            moves.append(float((model.weight[:, 0] - torch.tensor([0.0, 8.0, 0.0, 0.0])) @ u) / float(u.norm()))
    assert moves[0] < -100
    assert -float(u.norm()) / 0.1 < moves[1] < 0


def test_step__of_a_prediction_that_underflows_is_finite() -> None:
    """p of the label is 0 in float32: without ε there are no rows."""
    model = nn.Linear(2, 3, bias=False)
    with torch.no_grad():
        model.weight.zero_()
        model.weight[1, 0] = 4000.0
    moved = step(model, RowDamped("truncated", 0.1, rank=1), torch.tensor([[1.0, 0.0]]), torch.tensor([0]))
    assert bool(moved.isfinite().all())
    assert 0 < float(moved.norm()) < 20


def test_kind__is_not_that_of_the_rule_that_is_damped() -> None:
    model = nn.Linear(3, 2)
    fisher = fk.FisherApproximation(model, (torch.ones(2, 3), torch.tensor([0, 1])), RowDamped("ef", 0.1))
    assert "row-damped ef full" in repr(fisher)
    with pytest.raises(fk.InvalidArgumentError, match="of kind 'row-damped ef'; expected one of kind 'ef'"):
        fk.continual.convert_strength(1.0, normalize="trace", fisher=fisher)


def test_preconditioner__takes_it() -> None:
    torch.manual_seed(0)
    model = nn.Linear(3, 4)
    preconditioner = Preconditioner(model, kind=RowDamped("truncated", 0.1, rank=2), structure="kfac", damping=1e-2)
    F.cross_entropy(model(torch.randn(8, 3)), torch.randint(4, (8,))).backward()
    preconditioner.step()
    assert all(bool(p.grad.isfinite().all()) for p in model.parameters() if p.grad is not None)
    assert preconditioner.state_dict()["options"] == {"rank": "2", "row_damping": "0.1"}


# -- leading eigenpairs of Kronecker factors and the damped inverse that is made of them -------------------------------


WIDTH, OUTPUTS, DAMPING = 8, 5, 0.1


def factor(width: int, seed: int) -> Tensor:
    x = torch.randn(20, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return x.T @ x / 20


def layer(transposed: bool) -> ParameterSpace:
    shape = (WIDTH - 1, OUTPUTS) if transposed else (OUTPUTS, WIDTH - 1)
    return ParameterSpace(("weight", "bias"), (shape, (OUTPUTS,)))


def dense(spectrum: Spectrum) -> Tensor:
    q = spectrum.basis
    eye = torch.eye(len(q), dtype=torch.float64)
    return q @ torch.diag(spectrum.values) @ q.T + spectrum.others * (eye - q @ q.T)


@pytest.mark.parametrize("rank", [1, 3, None])
def test_leading_spectrum__keeps_the_trace_and_the_largest_eigenvalues(rank: int | None) -> None:
    matrix = factor(40, 0) + torch.diag(torch.logspace(3, -3, 40, dtype=torch.float64))
    found = leading_spectrum(matrix, rank, None, "here")
    expected = torch.linalg.eigvalsh(matrix).flip(0)[:rank]
    torch.testing.assert_close(found.values.sort(descending=True)[0], expected, rtol=1e-3, atol=0)
    torch.testing.assert_close(found.basis.T @ found.basis, torch.eye(found.basis.shape[1], dtype=torch.float64))
    torch.testing.assert_close(dense(found).trace(), matrix.trace())


def test_leading_spectrum__comes_closer_from_where_it_was() -> None:
    matrix = torch.diag(torch.linspace(2, 1, 80, dtype=torch.float64))
    expected = torch.linalg.eigvalsh(matrix).flip(0)[:4]
    errors, start = [], None
    for _ in range(6):
        found = leading_spectrum(matrix, 4, start, "here")
        errors.append(float((found.values.sort(descending=True)[0] - expected).norm()))
        start = found.basis
    assert errors[-1] < 0.5 * errors[0]


def test_leading_spectrum__is_the_same_every_time_and_draws_no_random_number() -> None:
    before = torch.get_rng_state()
    first, second = (leading_spectrum(factor(30, 1), 5, None, "here") for _ in range(2))
    assert torch.equal(first.basis, second.basis)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("ranks", [(3, 2), (3, None), (None, 2), (None, None)])
def test_inverse__is_that_of_the_dense_matrix(ranks: tuple[int | None, int | None], transposed: bool) -> None:
    a, g = (
        leading_spectrum(factor(width, seed), rank, None, "here")
        for width, seed, rank in ((WIDTH, 0, ranks[0]), (OUTPUTS, 1, ranks[1]))
    )
    layout, space = LayerLayout(OUTPUTS, WIDTH - 1, True, transposed), layer(transposed)
    flat = torch.randn(OUTPUTS * WIDTH, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    grid = layout.to_grid(flat.unsqueeze(1))[0]
    matrix = torch.kron(dense(g), dense(a)) + DAMPING * torch.eye(OUTPUTS * WIDTH, dtype=torch.float64)
    expected = torch.linalg.solve(matrix, grid.flatten()).reshape(OUTPUTS, WIDTH)
    operator = EigenKroneckerOperator.of_spectra(space, a, g, None, transposed)
    inverse = operator.factorize(DAMPING)
    found = layout.to_grid(inverse.matvec(flat).unsqueeze(1))[0]
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    order = layout.to_flat(torch.arange(OUTPUTS * WIDTH).reshape(1, OUTPUTS, WIDTH)).squeeze(1)
    check_fisher(operator, torch.kron(dense(g), dense(a))[order][:, order])


def test_inverse__with_measured_eigenvalues() -> None:
    a, g = (leading_spectrum(factor(width, seed), None, None, "here") for width, seed in ((WIDTH, 0), (OUTPUTS, 1)))
    values = torch.rand(OUTPUTS, WIDTH, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    layout, space = LayerLayout(OUTPUTS, WIDTH - 1, True, False), layer(False)
    flat = torch.randn(OUTPUTS * WIDTH, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    basis = torch.kron(g.basis, a.basis)
    matrix = basis @ torch.diag(values.flatten()) @ basis.T + DAMPING * torch.eye(OUTPUTS * WIDTH, dtype=torch.float64)
    expected = torch.linalg.solve(matrix, layout.to_grid(flat.unsqueeze(1)).flatten())
    found = EigenKroneckerOperator.of_spectra(space, a, g, values, False).factorize(DAMPING).matvec(flat)
    torch.testing.assert_close(layout.to_grid(found.unsqueeze(1)).flatten(), expected, rtol=1e-10, atol=1e-12)


def test_inverse__of_a_singular_matrix_is_refused() -> None:
    zero = Spectrum(*(torch.zeros(n, dtype=torch.float64) for n in ((2,), (3, 2), ())))
    with pytest.raises(fk.SingularMatrixError, match="damping > 0"):
        EigenKroneckerOperator.of_spectra(ParameterSpace(("w",), ((3, 3),)), zero, zero, None, False).factorize(0.0)


@pytest.mark.parametrize("structure", ["kfac", "ekfac"])
def test_max_rank__steps_as_with_all_eigenpairs_once_it_has_them(structure: str) -> None:
    steps = []
    for rank in (None, 64):
        model, x, y = _task()
        optimizer = fk.optim.NaturalGradient(model, 0.1, structure=structure, damping=0.1, ema=0.5, max_rank=rank)
        for _ in range(3):
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()
        steps.append(by_hand.weights(model))
    torch.testing.assert_close(*steps, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("structure", ["kfac", "ekfac"])
def test_max_rank__trains_and_goes_on_bit_for_bit(structure: str) -> None:
    ends = []
    for stop in (False, True):
        model, x, y = _task()
        optimizer, losses = _limited(model, structure), []
        for number in range(12):
            if stop and number == 5:
                state = optimizer.state_dict()
                optimizer.close()
                optimizer = _limited(model, structure)
                optimizer.load_state_dict(state)
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        assert losses[-1] < 0.7 * losses[0]
        ends.append(by_hand.weights(model))
    assert torch.equal(*ends)


def test_max_rank__refuses_what_is_no_number_of_eigenpairs() -> None:
    with pytest.raises(fk.InvalidArgumentError, match="max_rank=0"):
        fk.optim.NaturalGradient(_task()[0], 0.1, structure="kfac", damping=0.1, max_rank=0)


def _limited(model: nn.Module, structure: str) -> fk.optim.NaturalGradient:
    return fk.optim.NaturalGradient(
        model, 0.3, structure=structure, damping=0.1, ema=0.5, update_every=2, refresh_every=2, max_rank=3
    )


def _task() -> tuple[nn.Module, Tensor, Tensor]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4)).double()
        return model, torch.randn(30, 6, dtype=torch.float64), torch.randint(4, (30,))
