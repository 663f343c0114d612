"""What bounds an optimizer's steps, and what it warns of."""

import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fisherkit as fk
from fisherkit.errors import FisherkitError, InvalidArgumentError, InvalidTypeError
from fisherkit.optim.sample_space import with_layer_rms
from tests.bad_input import X, Y, mlp, normal
from tests.optim_cases import backward, close, damped, fisher, jacobian, one_step, places, problem
from tests.optim_loops import natural
from tests.reference.fisher import Problem, block_indices
from tests.reference.fisher import rows as reference_rows
from tests.reference.outputs import EF
from tests.test_optim_averages import averaged_factors, gradients, kfac_factors


def stepped(preconditioner: Any, of: Problem, reduction: str = "mean") -> Tensor:
    of.model.zero_grad()
    backward(of, reduction)
    preconditioner.step()
    return gradients(of.model)


def by_layer(of: Problem, matrix: Tensor, g: Tensor, scale: float) -> Tensor:
    """(Fₗ + λₗI)⁻¹ gₗ of each module, λₗ so many times the mean eigenvalue of its block."""
    found = torch.zeros_like(g)
    for index in modules(of):
        block = matrix[index][:, index]
        found[index] = damped(block, g[index], scale * float(block.trace()) / len(index))
    return found


def modules(of: Problem) -> list[Tensor]:
    """Where the parameters of each module lie."""
    return list(block_indices(reference_rows(of, EF)).values())


def with_rms(of: Problem, update: Tensor, rms: float = 0.2) -> Tensor:
    """Each module's entries at this root mean square."""
    found = torch.zeros_like(update)
    for index in modules(of):
        found[index] = update[index] * rms / update[index].square().mean().sqrt()
    return found


def layered(of: Problem, factors: list[tuple[Tensor, Tensor]]) -> Tensor:
    """⊕ G ⊗ A in the parameters' order, in which a layer's bias comes after its weight."""
    found = torch.zeros(2 * [sum(len(a) * len(g) for a, g in factors)], dtype=torch.float64)
    for index, (a, g) in zip(modules(of), factors, strict=True):
        grid = torch.arange(len(index)).reshape(len(g), len(a))
        found[index[:, None], index] = torch.kron(g, a)[order := torch.cat([grid[:, :-1].flatten(), grid[:, -1]])][
            :, order
        ]
    return found


# -- without a damping -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("structure", ["kfac", "ekfac"])
@pytest.mark.parametrize("kind", ["ief", "exact"])
def test_defaults__are_of_each_layers_own_scale_and_length(kind: str, structure: str) -> None:
    of = problem("mlp")
    expected = by_layer(of, fisher(of, kind, structure), jacobian(of)[0].mean(0), 0.3)
    preconditioner = fk.optim.Preconditioner(of.model, kind=kind, structure=structure)
    close(stepped(preconditioner, of), with_rms(of, expected))


def test_defaults__average_gradients_and_factors_and_renew_the_inverse_every_ten_steps() -> None:
    of = problem("mlp")
    seen, momentum = list[list[tuple[Tensor, Tensor]]](), torch.zeros(())
    matrix = fisher(of, "ief", "kfac")
    preconditioner = fk.optim.Preconditioner(of.model)
    for step in range(24):
        with preconditioner.paused():
            g = jacobian(of)[0].mean(0)
            momentum = 0.9 * momentum + g
            if step % 5 == 0:
                seen.append(kfac_factors(of))
        if step in (10, 20):
            matrix = layered(of, averaged_factors(seen, 0.95))
        close(stepped(preconditioner, of), with_rms(of, by_layer(of, matrix, g + 0.9 * momentum, 0.3)))
        with torch.no_grad():
            of.model.get_parameter("2.weight").mul_(1.05)
    assert preconditioner.state_dict()["updates"] == len(seen) == 5


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_defaults__give_way_to_what_is_passed(reduction: str) -> None:
    of = problem("mlp")
    matrix, g = fisher(of, "ief", "kfac"), jacobian(of)[0].mean(0)
    options: dict[str, Any] = {"damping": fk.optim.LayerDamping(2.0), "reduction": reduction}
    expected = by_layer(of, matrix, g, 2.0)
    for own, what in (
        ({}, expected), ({"layer_rms": 0.5}, with_rms(of, expected, 0.5)),
        ({"trust_region": 0.25 * float(expected @ matrix @ expected)}, expected / 2),
    ):  # fmt: skip
        close(stepped(fk.optim.Preconditioner(of.model, **options, **own), of, reduction), what)
    own = {"gradient_momentum": 0.5, "update_every": 3, "refresh_every": 1}
    free = fk.optim.Preconditioner(of.model, trust_region=math.inf, reduction=reduction, **own)
    expected = by_layer(of, matrix, g, 0.3)
    for times in (1, 1.5, 1.75, 1.875):
        close(stepped(free, of, reduction), (1 + 0.5 * times) * expected)
    assert free.state_dict()["updates"] == 2


def test_layer_damping__of_an_own_optimizer_and_of_a_diagonal() -> None:
    of = problem("mlp")
    matrix, g = fisher(of, "exact", "kfac"), jacobian(of)[0].mean(0)
    options: dict[str, Any] = {"kind": "exact", "damping": fk.optim.LayerDamping(0.5)}
    close(one_step(of, structure="kfac", **options), by_layer(of, matrix, g, 0.5))
    diagonal, expected = fisher(of, "exact", "diagonal").diagonal(), torch.zeros_like(g)
    for place in places(of).values():
        expected[place] = g[place] / (diagonal[place] + 0.5 * diagonal[place].mean())
    close(one_step(of, structure="diagonal", **options), expected)


def test_defaults__of_a_diagonal() -> None:
    of = problem("mlp")
    diagonal, g = fisher(of, "ief", "diagonal").diagonal(), jacobian(of)[0].mean(0)
    for place in places(of).values():
        g[place] = g[place] / (diagonal[place] + 0.3 * diagonal[place].mean())
    close(stepped(fk.optim.Preconditioner(of.model, kind="ief", structure="diagonal"), of), with_rms(of, g))


def test_layer_rms__of_a_gradient_that_becomes_zero_is_zero_and_of_the_smallest_is_finite() -> None:
    of = problem("mlp")
    still, preconditioner = of.model.get_submodule("0"), fk.optim.Preconditioner(of.model)
    stepped(preconditioner, of)
    of.model.zero_grad()
    backward(of)
    for p in still.parameters():
        p.grad = torch.zeros_like(p)
    preconditioner.step()
    assert not any(p.grad.any() for p in still.parameters())  # momentum or not
    assert gradients(of.model).any()
    tiny = {"a.weight": torch.full((4, 4), 1e-40), "b.weight": torch.zeros(2)}
    found = with_layer_rms(tiny, tiny, 0.2)
    torch.testing.assert_close(found["a.weight"], torch.full((4, 4), 0.2))
    assert not found["b.weight"].any()


def test_layer_rms__of_a_gradient_of_zero_is_zero() -> None:
    of = problem("mlp")
    preconditioner = fk.optim.Preconditioner(of.model)
    backward(of)
    of.model.get_parameter("2.weight").grad.zero_()  # type: ignore[union-attr]  # there
    of.model.get_parameter("2.bias").grad.zero_()  # type: ignore[union-attr]  # there
    preconditioner.step()
    found = gradients(of.model)
    assert not found[modules(of)[1]].any()
    close(found[modules(of)[0]].square().mean().sqrt(), torch.tensor(0.2, dtype=torch.float64))


def test_layer_damping__of_a_fisher_of_zero_leaves_a_gradient_of_zero() -> None:
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


def train(lr: float, kind: str, structure: str, momentum: float = 0.9, **options: Any) -> tuple[str, float, float]:
    """What is said while a net that can diverge is trained, the loss at that moment and the loss at the start."""
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(96, 6, generator=generator), torch.randint(4, (96,), generator=generator)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4))
    sgd = torch.optim.SGD(model.parameters(), lr=lr, momentum=momentum)
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
        own = {"damping": fk.optim.LayerDamping(scale), "trust_region": 0.01, "update_every": 5}
        for options in (own, {"damping": scale * 1e-3, "update_every": 2, "refresh_every": 5, "ema": 0.9}):
            said, last, first = train(lr, kind, structure, **options)
            diverged = not last < 10 * first
            assert not said or diverged, (lr, options)
            assert not said or "the loss has diverged" in said or "a loss that has diverged" in said, (lr, options)
            assert said or last < 1e30, (lr, options)


def test_defaults__train_a_small_net_over_a_decade_of_learning_rates() -> None:
    for kind in ("ief", "exact"):
        for lr in (0.02, 0.06, 0.2):
            said, last, first = train(lr, kind, "kfac", momentum=0.0)  # the defaults have their own
            assert not said
            assert last < 0.95 * first, (kind, lr)


def test_layer_damping__is_refused_where_there_are_no_layers() -> None:
    torch.manual_seed(0)
    model, damping = nn.Linear(3, 2), fk.optim.LayerDamping(10.0)
    x, y = torch.randn(4, 3), torch.tensor([0, 1, 1, 0])
    with pytest.raises(InvalidTypeError, match="damping of type LayerDamping"):
        fk.EmpiricalFisher(model, (x, y)).solve(torch.ones(8), damping=damping)  # type: ignore[arg-type]
    for structure in ("full", "block"):
        optimizer = fk.optim.NaturalGradient(model, lr=0.1, damping=damping, structure=structure)
        F.cross_entropy(model(x), y).backward()
        with pytest.raises(InvalidArgumentError, match="keeps rows"):
            optimizer.step()
        optimizer.close()


# -- what a step would lose without a word is said once ----------------------------------------------------------------


Loss = Callable[[nn.Module], Tensor]
GRAM: dict[str, Any] = {"gram_damping": 0.1}
DAMPED: dict[str, Any] = {"damping": 0.1, "gram_damping": None}
WEIGHT = torch.tensor([1.0, 5.0, 0.2], dtype=torch.float64)


def penalized(model: nn.Module) -> Tensor:
    return F.cross_entropy(model(X), Y) + sum((p.square().sum() for p in model.parameters()), torch.zeros(()))


CASES: dict[str, tuple[dict[str, Any], Loss, str]] = {
    "penalty": (GRAM, penalized, "no effect on the update of gram_damping=. Try: damping="),
    "weights": (
        GRAM,
        lambda m: F.cross_entropy(m(X), Y, weight=WEIGHT),
        "weights of examples in the loss have no effect",
    ),
    "a sum": (DAMPED, lambda m: F.cross_entropy(m(X), Y, reduction="sum"), 'the loss is a sum: reduction="sum"'),
    "a mean": ({**DAMPED, "reduction": "sum"}, lambda m: F.cross_entropy(m(X), Y), 'a mean: reduction="mean"'),
}
FINE: dict[str, tuple[dict[str, Any], Loss]] = {
    "gram, sum": (GRAM, lambda m: F.cross_entropy(m(X), Y, reduction="sum")),
    "gram, scaled": (GRAM, lambda m: 1024 * F.cross_entropy(m(X), Y)),
    "damped, mean": (DAMPED, lambda m: F.cross_entropy(m(X), Y)),
    "damped, sum": ({**DAMPED, "reduction": "sum"}, lambda m: F.cross_entropy(m(X), Y, reduction="sum")),
    "damped, scaled": (DAMPED, lambda m: 1024 * F.cross_entropy(m(X), Y)),
    "damped, penalty": (DAMPED, penalized),
}


def steps(options: dict[str, Any], loss: Loss, number: int = 3) -> list[str]:
    model = mlp()
    optimizer = natural(model, **options)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for _ in range(number):
            optimizer.zero_grad()
            loss(model).backward()
            optimizer.step()
    return [str(one.message) for one in said if "NaturalGradient" in str(one.message)]


@pytest.mark.parametrize("case", CASES)
def test_surprise__is_said_once(case: str) -> None:
    options, loss, message = CASES[case]
    said = steps(options, loss)
    assert len(said) == 1
    assert message in said[0]


@pytest.mark.parametrize("case", FINE)
def test_surprise__nothing_is_said_of_what_is_as_expected(case: str) -> None:
    assert steps(*FINE[case]) == []


def test_surprise__undivided_accumulation() -> None:
    def loss(model: nn.Module) -> Tensor:
        F.cross_entropy(model(X[:3]), Y[:3]).backward()
        return F.cross_entropy(model(X[3:]), Y[3:])

    (said,) = steps(DAMPED, loss)
    assert "divide the loss of each of the 2 passes by 2" in said


def test_surprise__a_step_without_a_label_that_counts_moves_nothing() -> None:
    model = mlp()
    optimizer = natural(model, **GRAM)
    before = [p.clone() for p in model.parameters()]
    F.cross_entropy(model(X), torch.full_like(Y, -100), reduction="sum").backward()
    optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


@pytest.mark.parametrize("options", [{"kind": kind, **DAMPED} for kind in ("ef", "ief", "exact", "truncated")] + [GRAM])
@pytest.mark.parametrize("label", [0, 1])
def test_step__of_an_example_that_is_certain_right_or_wrong_is_finite(options: dict[str, Any], label: int) -> None:
    model = nn.Linear(2, 3, bias=False)
    with torch.no_grad():
        model.weight.zero_()[0, 0] = 4000.0
    optimizer = natural(model, **options)
    F.cross_entropy(model(torch.tensor([[1.0, 0.0]])), torch.tensor([label])).backward()
    optimizer.step()
    assert bool(model.weight.isfinite().all())


def test_step__of_an_example_whose_gradient_is_lost_to_rounding_has_the_others_rows() -> None:
    """A logit that is 95 ahead leaves a gradient of 5e-42, whose unit vector cannot be made of it in float32."""
    model = nn.Linear(3, 2, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[95.0, 0.5, 0.2], [0.0, 0.1, 0.3]]))
    before = model.weight.detach().double()
    optimizer = natural(model, 1.0, kind="ief", gram_damping=None, damping=0.1)
    y = torch.tensor([0, 1, 0])
    F.cross_entropy(model(torch.eye(3)), y).backward()
    optimizer.step()
    # The inputs are unit vectors, so that of each example (ûûᵀ / 3 + λI)⁻¹ u / 3 is left, û = u / ‖u‖.
    u = torch.softmax(before.mT, 1) - F.one_hot(y, 2)
    torch.testing.assert_close(before - model.weight.detach(), (u / (1 + 0.3)).mT, atol=1e-6, rtol=1e-6)


def no_ops(act: Callable[[nn.Module, Any], None], kind: str) -> list[str]:
    """What three steps without gradients say."""
    model = mlp()
    optimizer = natural(model) if kind == "natural" else fk.optim.Preconditioner(model, damping=0.1)
    before = [p.detach().clone() for p in model.parameters()]
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for _ in range(3):
            act(model, optimizer)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    return [str(one.message) for one in said]


@pytest.mark.parametrize("kind", ["natural", "preconditioner"])
def test_backward__that_was_forgotten_is_said_once(kind: str) -> None:
    def forgotten(model: nn.Module, optimizer: Any) -> None:
        F.cross_entropy(model(X), Y)
        optimizer.step()

    said = no_ops(forgotten, kind)
    assert len(said) == 1
    assert "without a gradient" in said[0]
    assert "loss.backward() before step()" in said[0]


@pytest.mark.parametrize("kind", ["natural", "preconditioner"])
def test_backward__that_nobody_forgot_is_not_missed(kind: str) -> None:
    def frozen(model: nn.Module, optimizer: Any) -> None:
        model.requires_grad_(requires_grad=False)
        model(X)
        optimizer.step()

    def evaluated(model: nn.Module, optimizer: Any) -> None:
        with torch.no_grad():
            model(X)
        optimizer.step()

    for act in (frozen, evaluated, lambda _, optimizer: optimizer.step()):
        assert no_ops(act, kind) == []


def test_default__of_a_layer_without_a_gradient_in_steps_between_updates() -> None:
    torch.manual_seed(0)
    body, skipped, head = nn.Linear(4, 5), nn.Linear(5, 5), nn.Linear(5, 3)
    model = nn.ModuleList([body, skipped, head])
    model.forward = lambda x, skip: head(body(x).tanh() if skip else body(x).tanh() + skipped(body(x).tanh()))
    preconditioner = fk.optim.Preconditioner(model)
    x, y = torch.randn(6, 4), torch.randint(3, (6,))
    for step in range(12):
        model.zero_grad()
        nn.functional.cross_entropy(model(x, step % 5 > 2), y).backward()
        preconditioner.step()
        used = skipped.weight.grad is not None and bool(skipped.weight.grad.any())
        assert used == (step % 5 <= 2)
        assert all(bool(p.grad.any()) for layer in (body, head) for p in layer.parameters())
    preconditioner.close()


def test_layers__that_no_update_has_used_yet_are_named() -> None:
    torch.manual_seed(0)
    body, late = nn.Linear(4, 5), nn.Linear(5, 3)
    model = nn.ModuleList([body, late])
    model.forward = lambda x, skip: body(x)[:, :3] if skip else late(body(x).tanh())
    preconditioner = fk.optim.Preconditioner(model)
    x, y = torch.randn(6, 4), torch.randint(3, (6,))
    said = []
    for step in range(4):
        model.zero_grad()
        nn.functional.cross_entropy(model(x, step == 0), y).backward()
        before = None if late.weight.grad is None else late.weight.grad.clone()
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            preconditioner.step()
        said.append([str(one.message) for one in found])
        assert before is None or torch.equal(late.weight.grad, before)
    preconditioner.close()
    assert [len(one) for one in said] == [0, 1, 0, 0]
    assert (
        "gradients of '1.weight', '1.bias' are left as they are until an update, one in 5 steps, whose batch"
        in said[1][0]
    )


class Skipping(nn.Module):
    """A layer that is used, or not, as a switch says."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.late, self.head = (nn.Linear(*s).double() for s in ((4, 5), (5, 5), (5, 3)))

    def forward(self, x: Tensor, used: bool) -> Tensor:
        h = self.body(x).tanh()
        return self.head(h + self.late(h) if used else h)


def last_gradients(preconditioner: Any, model: Skipping, uses: str, first: int = 0) -> dict[str, Tensor]:
    """After steps of which '+' use the layer, the last one's gradients; their batches are told by their number."""
    for step, use in enumerate(uses, first):
        model.zero_grad()
        nn.functional.cross_entropy(model(normal(6, 4, seed=step), used=use == "+"), Y).backward()
        preconditioner.step()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_layer__first_used_between_updates_is_taken_in_by_the_next_update_that_uses_it() -> None:
    for uses, taken in (("-+-+", None), ("-++", 2), ("-+++", 2), ("-+-++", 4)):
        model = Skipping()
        options: dict[str, Any] = {"kind": "ef", "structure": "diagonal", "damping": 0.1, "ema": 0.5, "update_every": 2}
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            found = last_gradients(fk.optim.Preconditioner(model, **options), model, uses)
        assert len(said) == 1
        assert "until an update" in str(said[0].message)
        for name, p in model.late.named_parameters():
            rows = [
                torch.stack([
                    torch.autograd.grad(nn.functional.cross_entropy(model(x[n : n + 1], used=True), Y[n : n + 1]), p)[0]
                    for n in range(6)
                ])
                for x in (normal(6, 4, seed=step) for step in range(len(uses)))
            ]  # fmt: skip
            plain = rows[-1].mean(0)
            expected = plain if taken is None else plain / (rows[taken].square().mean(0) + 0.1)
            torch.testing.assert_close(found[f"late.{name}"], expected)


@pytest.mark.parametrize("structure", ["diagonal", "kfac", "ekfac"])
@pytest.mark.parametrize("uses", ["+-+", "++--+", "+---"])
def test_gradient_momentum__of_a_layer_that_the_first_updates_after_loading_do_not_use(
    uses: str, structure: str
) -> None:
    options: dict[str, Any] = {"structure": structure, "damping": 0.1, "ema": 0.5, "gradient_momentum": 0.5}
    model, other = Skipping(), Skipping()
    straight, resumed = fk.optim.Preconditioner(model, **options), fk.optim.Preconditioner(other, **options)
    last_gradients(straight, model, uses[:1])
    resumed.load_state_dict(straight.state_dict())
    expected, found = (last_gradients(own, m, uses[1:], 1) for own, m in ((straight, model), (resumed, other)))
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(resumed.state_dict()["momentum"], straight.state_dict()["momentum"])
