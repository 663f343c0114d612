"""`RowDamped`: its output Fisher is the kind's plus ε ûûᵀ, and steps with it are bounded where the kind's are not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fisherkit as fk
from fisherkit import likelihoods
from fisherkit.optim import NaturalGradient, Preconditioner, RowDamped
from fisherkit.outputs import OutputRule, Outputs
from fisherkit.vectors import rule_of

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


@pytest.mark.parametrize("positions", [1, 3])
@pytest.mark.parametrize("likelihood", TARGETS)
@pytest.mark.parametrize(("kind", "options"), KINDS, ids=str)
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
    assert (rule.kind_name, rule.kind_options()) == ("truncated", {"rank": "1", "row_damping": "0.1"})
    assert rule.along_gradient
    assert not RowDamped("truncated", 0.1, rank=2).along_gradient
    assert RowDamped(rule, 1).kind_options()["row_damping"] == "1.0"


@pytest.mark.parametrize(
    ("arguments", "error", "said"),
    [
        (("ief", 0.0), fk.InvalidArgumentError, "a positive number"),
        (("ief", float("inf")), fk.InvalidArgumentError, "a positive number"),
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
    loss = F.cross_entropy(model(x), y)
    g = torch.cat([p.flatten() for p in torch.autograd.grad(loss, list(model.parameters()))])
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


def test_preconditioner__takes_it() -> None:
    torch.manual_seed(0)
    model = nn.Linear(3, 4)
    preconditioner = Preconditioner(model, kind=RowDamped("truncated", 0.1, rank=2), structure="kfac", damping=1e-2)
    F.cross_entropy(model(torch.randn(8, 3)), torch.randint(4, (8,))).backward()
    preconditioner.step()
    assert all(bool(p.grad.isfinite().all()) for p in model.parameters() if p.grad is not None)
    assert preconditioner.state_dict()["options"] == {"rank": "2", "row_damping": "0.1"}
