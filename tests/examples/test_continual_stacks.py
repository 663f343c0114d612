"""The continual-learning benches: stacks are plain models, stacked penalties the definition, and the command runs."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from examples.continual import fishers
from examples.continual.benches import TaskData, permuted, split
from examples.continual.fishers import Builder, build
from examples.continual.methods import KINDS, METHODS, STRUCTURES, Method
from examples.continual.penalties import FactoredTerm, LinearizedTerm, Penalty
from examples.continual.stacked import Pass, Perceptron, Stack, with_ones
from examples.continual.training import Training, initial, learn, orders, sequence
from tests.small_data import normal

F64 = torch.float64
WIDTHS, SEEDS, EACH = (6, 5, 4, 3), (0, 1), 3
STRENGTHS = torch.tensor([0.5, 2.0, 8.0], dtype=F64).repeat(len(SEEDS))


@pytest.fixture
def tasks() -> list[TaskData]:
    labels = torch.arange(200) % 3
    return permuted(normal(200, 6), labels, tasks=3, train=160, test=40, seeds=SEEDS)


@pytest.fixture
def stack() -> Stack:
    """Every member other than the others."""
    wide = initial(WIDTHS, SEEDS, F64).repeat(EACH)
    return wide.like(wide.storage + 0.3 * normal(len(wide.storage), seed=1))


def module(stack: Stack, number: int, window: slice | None = None) -> Perceptron:
    return Perceptron(stack.widths, window).double().load(stack.flat()[number])


# -- stacks ------------------------------------------------------------------------------------------------------------


def test_flat__is_the_modules_order_and_comes_back(stack: Stack) -> None:
    flat = stack.flat()
    assert flat.shape == (6, stack.size)
    torch.testing.assert_close(stack.like().put(flat).storage, stack.storage, rtol=0, atol=0)
    own = nn.utils.parameters_to_vector(module(stack, 4).parameters())
    torch.testing.assert_close(own.detach(), flat[4], rtol=0, atol=0)
    torch.testing.assert_close(module(stack, 4).linears[1].bias.detach(), stack.layers[1][4, :, -1])


def test_repeat__members_of_a_seed_lie_together() -> None:
    first = initial(WIDTHS, SEEDS, F64)
    flat = first.repeat(EACH).flat()
    for number in range(len(flat)):
        torch.testing.assert_close(flat[number], first.flat()[number // EACH], rtol=0, atol=0)


@pytest.mark.parametrize("window", [slice(0, 3), slice(1, 3)], ids=["all", "some"])
def test_gradient__is_autograds(stack: Stack, tasks: list[TaskData], window: slice) -> None:
    x, y = tasks[1].train[:, :30], tasks[1].train_labels[:, :30] % (window.stop - window.start)
    out = stack.like()
    losses = Pass(stack, window).gradient(with_ones(x), y, out)
    measured, right = Pass(stack, window).measure(with_ones(x), y)
    for number in range(stack.members):
        model, own = module(stack, number, window), number // EACH
        z = model(x[own])
        loss = F.cross_entropy(z, y[own])
        found = nn.utils.parameters_to_vector(torch.autograd.grad(loss, list(model.parameters())))
        torch.testing.assert_close(out.flat()[number], found)
        torch.testing.assert_close(losses[number], loss.detach())
        torch.testing.assert_close(measured[number], loss.detach())
        torch.testing.assert_close(right[number], (z.argmax(1) == y[own]).double().mean())


# -- penalties ---------------------------------------------------------------------------------------------------------


def squared(stack: Stack, number: int, data: TaskData, structure: str) -> Tensor:
    """The mean over batches of the outer product of a batch's mean gradient, by autograd."""
    model, own = module(stack, number), number // EACH
    rows = []
    for x, y in zip(data.train[own].split(fishers.BATCH), data.train_labels[own].split(fishers.BATCH), strict=True):
        if len(y) == fishers.BATCH:
            loss = F.cross_entropy(model(x), y)
            rows.append(nn.utils.parameters_to_vector(torch.autograd.grad(loss, list(model.parameters()))))
    J = torch.stack(rows)
    dense = J.T @ J / len(J)
    return dense.diagonal().diag() if structure == "diagonal" else dense


def weighted(stack: Stack, number: int, data: TaskData) -> Tensor:
    """The mean over examples of the squared gradient times the label's probability, by autograd."""
    model, own = module(stack, number), number // EACH
    total = torch.zeros(stack.size, dtype=F64)
    for x, y in zip(data.train[own], data.train_labels[own], strict=True):
        log_p = model(x).log_softmax(0)[y]
        gradient = nn.utils.parameters_to_vector(torch.autograd.grad(log_p, list(model.parameters())))
        total += log_p.detach().exp() * gradient.square() / len(data.train_labels[own])
    return total.diag()


def dense(method: Method, stack: Stack, number: int, data: TaskData, seed: int, count: int) -> Tensor:
    """A member's Fisher by the package on a model of its own."""
    if method.kind == "l2":
        return torch.eye(stack.size, dtype=F64)
    if method.kind == "squared":
        return squared(stack, number, data, method.structure)
    if method.kind == "mammoth":
        return weighted(stack, number, data)
    _, kind, options = KINDS[method.kind]
    own = number // EACH
    if method.kind == "sf":
        options = {"seed": 1000 * seed + own}
    batch = data.train[own, :count], data.train_labels[own, :count]
    return kind(module(stack, number, data.window), batch, structure=method.structure, **options).to_dense()


@pytest.mark.parametrize("normalize", [None, "trace"], ids=["raw", "trace"])
@pytest.mark.parametrize("key", [key for key, method in METHODS.items() if method.swept])
def test_penalty__is_the_definition(key: str, normalize: str | None, stack: Stack, tasks: list[TaskData]) -> None:
    """½·strength·Σ (θ−θ_t)ᵀF_t(θ−θ_t) by autograd through dense matrices; two tasks, each at parameters of its own.

    Mammoth's is of the newest θ_t alone, and is not normalised.
    """
    method, count = METHODS[key], 20
    builder, penalty = Builder(method, STRENGTHS, normalize), Penalty()
    past = [stack, stack.like(stack.storage + 0.1 * normal(len(stack.storage), seed=2))]
    for number, at in enumerate(past):
        data = tasks[number]
        penalty.append(builder.term(at, data.train, data.train_labels, data.window, count=count, seed=number))
    now = stack.like(stack.storage + normal(len(stack.storage), seed=3))
    out = stack.like(normal(len(stack.storage), seed=4))
    before = out.flat()
    penalty.add_gradient(now, out)
    for member in (1, 5):
        theta = now.flat()[member].clone().requires_grad_()
        value = theta.new_zeros(())
        for number, at in enumerate(past):
            matrix = dense(method, at, member, tasks[number], number, count)
            if normalize == "trace" and method.kind != "mammoth":
                matrix = matrix * stack.size / matrix.trace()
            difference = theta - (past[-1] if method.kind == "mammoth" else at).flat()[member]
            value = value + 0.5 * STRENGTHS[member] * difference @ matrix @ difference
        (expected,) = torch.autograd.grad(value, theta)
        torch.testing.assert_close((out.flat() - before)[member], expected, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("kind", ["truncated-2", "exact"])
def test_terms_of_the_full_structure__agree(
    kind: str, stack: Stack, tasks: list[TaskData], monkeypatch: pytest.MonkeyPatch
) -> None:
    data, found = tasks[0], []
    for many, expected in ((0, LinearizedTerm), (99, FactoredTerm)):
        monkeypatch.setattr(fishers, "MANY", many)
        builder = Builder(Method(kind, "full"), STRENGTHS, None)
        term = builder.term(stack, data.train, data.train_labels, data.window, count=30, seed=0)
        assert isinstance(term, expected)
        found.append(stack.like())
        term.add_product(stack.like(normal(len(stack.storage), seed=5)), found[-1])
    torch.testing.assert_close(found[0].storage, found[1].storage)


def test_a_term__keeps_its_own_parameters(stack: Stack, tasks: list[TaskData]) -> None:
    data = tasks[0]
    term = Builder(METHODS["diagonal-ef"], STRENGTHS, None).term(
        stack, data.train, data.train_labels, data.window, count=10, seed=0
    )
    before = term.center.flat()
    stack.storage += 1
    torch.testing.assert_close(term.center.flat(), before, rtol=0, atol=0)


def test_a_window__leaves_other_heads_free(stack: Stack, tasks: list[TaskData]) -> None:
    data = tasks[0]
    for structure in STRUCTURES:
        for operator in build(Method("ief", structure), stack, data.train, data.train_labels % 2, slice(1, 3), 0):
            last = operator.space.unflatten(operator.diagonal())
            assert float(last["linears.2.weight"][0].abs().max()) == 0
            assert float(last["linears.2.weight"][1:].abs().amax(1).min()) > 0


# -- training ----------------------------------------------------------------------------------------------------------


def alone(
    model: nn.Module,
    data: TaskData,
    own: int,
    batches: list[Tensor],
    training: Training,
    strength: float,
    past: list[tuple[Tensor, Tensor]],
) -> None:
    """What a user writes for one model, its past as centers and matrices."""
    optimizer = torch.optim.Adam(model.parameters(), lr=training.rate)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / len(batches))
    for batch in batches:
        x, y = data.train[own, batch[own]], data.train_labels[own, batch[own]]
        theta, total = nn.utils.parameters_to_vector(model.parameters()), F.cross_entropy(model(x), y)
        for center, matrix in past:
            total = total + 0.5 * strength * (theta - center) @ matrix @ (theta - center)
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        schedule.step()


@pytest.mark.parametrize("key", ["diagonal-ef", "kfac-ief", "full-exact"])
def test_sequence__is_what_each_model_would_do_alone(key: str, tasks: list[TaskData]) -> None:
    training, method = Training(epochs=2, batch=32), METHODS[key]
    builder = Builder(method, STRENGTHS, "trace")

    def consolidate(stack: Stack, task: TaskData, number: int) -> fishers.Term:
        return builder.term(stack, task.train, task.train_labels, task.window, count=40, seed=number)

    outcome = sequence(initial(WIDTHS, SEEDS, F64), tasks, SEEDS, training, EACH, consolidate)
    for member in (1, 5):
        own = member // EACH
        model = Perceptron(WIDTHS).double().load(initial(WIDTHS, SEEDS, F64).flat()[own])
        past: list[tuple[Tensor, Tensor]] = []

        for number, task in enumerate(tasks):
            strength = float(STRENGTHS[member])
            alone(model, task, own, orders(160, SEEDS, number, training), training, strength, past)
            _, kind, options = KINDS[method.kind]
            batch = task.train[own, :40], task.train_labels[own, :40]
            F_t = kind(model, batch, structure=method.structure, **options)
            theta = nn.utils.parameters_to_vector(model.parameters()).detach()
            past.append((theta, F_t.to_dense() * F_t.size / F_t.trace()))
        with torch.no_grad():
            for number, task in enumerate(tasks):
                right = (model(task.test[own]).argmax(1) == task.test_labels[own]).double().mean()
                torch.testing.assert_close(outcome.final[number, member], right)
                loss = F.cross_entropy(model(task.train[own]), task.train_labels[own])
            torch.testing.assert_close(outcome.losses[-1, member], loss, rtol=1e-6, atol=1e-9)


def test_split__gives_each_task_its_own_classes() -> None:
    labels = torch.arange(120) % 6
    found = split(normal(120, 4), labels, each=2, train=10, test=5, seeds=SEEDS)
    assert [task.window for task in found] == [slice(0, 2), slice(2, 4), slice(4, 6)]
    assert all(task.train.shape == (2, 20, 4) and task.test.shape == (2, 10, 4) for task in found)
    assert all(set(task.train_labels.flatten().tolist()) == {0, 1} for task in found)


def test_permuted__the_same_examples_with_columns_moved(tasks: list[TaskData]) -> None:
    for task in tasks[1:]:
        for own in range(len(SEEDS)):
            torch.testing.assert_close(task.train[own].sort(1).values, tasks[0].train[own].sort(1).values)
            assert not torch.equal(task.train[own], tasks[0].train[own])
            assert torch.equal(task.train_labels[own], tasks[0].train_labels[own])


def test_learn__leaves_random_numbers_alone(tasks: list[TaskData]) -> None:
    before = torch.get_rng_state()
    stack = initial(WIDTHS, SEEDS, F64)
    batches = orders(160, SEEDS, 0, Training(1))
    learn(stack, tasks, [(0, batch) for batch in batches], Training(1))
    assert torch.equal(torch.get_rng_state(), before)
