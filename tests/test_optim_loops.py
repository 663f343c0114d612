"""The optimizers in training loops as people write them: which batches a step is made of."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fisherkit as fk
from tests import by_hand
from tests.bad_input import X, Y, mlp, normal
from tests.optim_cases import close
from tests.optim_loops import backward, each_setting, expected, flat, made, natural, train
from tests.reference.zoo import Compose

# -- accumulation and several forward passes ---------------------------------------------------------------------------


@each_setting
@pytest.mark.parametrize("set_to_none", [True, False], ids=["none", "zero"])
def test_accumulation__equals_the_whole_batch(setting: dict[str, Any], set_to_none: bool) -> None:
    model = mlp()
    optimizer = made(setting, model)
    for _ in range(2):
        optimizer.zero_grad(set_to_none)
        for take in (slice(0, 1), slice(1, 4), slice(4, 6)):
            (F.cross_entropy(model(X[take]), Y[take], reduction="sum") / 6).backward()
        optimizer.step()
    close(flat(model), expected(setting))


def test_accumulation__survives_a_buffer_that_is_refilled() -> None:
    model = mlp()
    optimizer, buffer = natural(model), torch.empty(3, 4, dtype=torch.float64)
    for _ in range(2):
        optimizer.zero_grad()
        for part in (slice(3), slice(3, 6)):
            buffer.copy_(X[part])
            (F.cross_entropy(model(buffer), Y[part]) / 2).backward()
        buffer.zero_()
        optimizer.step()
    close(flat(model), expected())


def test_autograd_grad__leads_to_no_step() -> None:
    """Attacks on the inputs, penalties and Fishers differentiate the model too; only what is added to .grad counts."""
    model = mlp()
    optimizer = natural(model)
    for _ in range(2):
        optimizer.zero_grad()
        x = X.clone().requires_grad_()
        torch.autograd.grad(F.cross_entropy(model(x), Y), x)
        loss = F.cross_entropy(model(X), Y)
        torch.autograd.grad(model(X).square().sum(), list(model.parameters()))
        fk.ExactFisher(model, [(x[None], y[None]) for x, y in zip(X, Y, strict=True)] * 3)
        loss.backward()
        fk.evaluation.loss_gradient(model, (X, Y))
        fk.EmpiricalFisher(model, (X, Y), memory_budget=1).trace()
        optimizer.step()
    close(flat(model), expected())


def test_autograd_grad__gradients_by_hand_are_refused() -> None:
    model = mlp()
    optimizer = natural(model)
    for p, g in zip(
        model.parameters(), torch.autograd.grad(F.cross_entropy(model(X), Y), list(model.parameters())), strict=True
    ):
        p.grad = g
    with pytest.raises(fk.ModelError, match=r"no forward and backward pass .* Try: loss\.backward\(\)"):
        optimizer.step()


def test_forwards__several_before_one_backward_are_one_batch() -> None:
    model = mlp()
    optimizer = natural(model)
    for _ in range(2):
        optimizer.zero_grad()
        z = [model(X[take]) for take in (slice(2), slice(2, 6))]
        F.cross_entropy(torch.cat(z), Y).backward()
        optimizer.step()
    close(flat(model), expected())


def test_forwards__several_with_a_backward_each_in_any_order() -> None:
    model = mlp()
    optimizer = natural(model)
    for _ in range(2):
        optimizer.zero_grad()
        first, second = (F.cross_entropy(model(X[t]), Y[t]) / 2 for t in (slice(3), slice(3, 6)))
        second.backward()
        first.backward()
        optimizer.step()
    close(flat(model), expected())


def test_forwards__without_backward_leave_nothing() -> None:
    model = mlp()
    close(train(model, natural(model), before=lambda: model(normal(3, 4))), expected())


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode], ids=["no_grad", "inference_mode"])
def test_evaluation__between_steps_and_between_forward_and_backward_is_not_captured(mode: Any) -> None:
    model = mlp()
    optimizer = natural(model)
    for _ in range(2):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(X), Y)
        model.eval()
        with mode():
            model(normal(5, 4))
        model.train()
        loss.backward()
        optimizer.step()
    close(flat(model), expected())


def test_paused__uses_with_gradients_are_not_captured() -> None:
    model = mlp()
    optimizer = natural(model)

    def saliency() -> None:
        with optimizer.paused():
            x = normal(3, 4).requires_grad_()
            torch.autograd.grad(model(x).sum(), x)

    close(train(model, optimizer, before=saliency), expected())


# -- gradients that are thrown away ------------------------------------------------------------------------------------


@pytest.mark.parametrize("zero", ["optimizer", "optimizer-zero", "model", "model-zero"])
def test_zero_grad__after_a_backward_pass_forgets_its_batch(zero: str) -> None:
    model = mlp()
    optimizer = natural(model)
    owner: Any = optimizer if zero.startswith("optimizer") else model

    def thrown_away() -> None:
        backward(model, normal(4, 4), Y[:4])
        owner.zero_grad(set_to_none=not zero.endswith("zero"))

    close(train(model, optimizer, before=thrown_away), expected())


def test_zero_grad__beside_a_preconditioner_forgets_too() -> None:
    results = []
    for thrown in (False, True):
        model = mlp()
        preconditioner = fk.optim.Preconditioner(model, damping=1e-2)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(2):
            optimizer.zero_grad()
            if thrown:
                backward(model, normal(4, 4), Y[:4])
                optimizer.zero_grad(set_to_none=False)
            backward(model)
            preconditioner.step()
            optimizer.step()
        results.append(flat(model))
    close(results[1], results[0])


# -- parameters --------------------------------------------------------------------------------------------------------


@each_setting
def test_freezing__late_unfrozen_layers_join_and_frozen_ones_stay(setting: dict[str, Any]) -> None:
    model = mlp()
    first, last = model[0], model[2]
    optimizer = made(setting, model)
    first.requires_grad_(False)
    before = first.weight.detach().clone()
    train(model, optimizer)
    assert torch.equal(first.weight, before)
    first.requires_grad_(True)
    last.requires_grad_(False)
    optimizer.zero_grad()
    kept = last.weight.detach().clone()
    train(model, optimizer)
    assert torch.equal(last.weight, kept)
    assert not torch.equal(first.weight, before)


def test_freezing__between_updates_leaves_momentum_and_decay_out() -> None:
    model = mlp()
    optimizer = natural(
        model, gram_damping=None, damping=1e-2, structure="kfac", update_every=3, momentum=0.9, weight_decay=0.1
    )
    train(model, optimizer, 1)
    model[0].requires_grad_(False)
    kept = model[0].weight.detach().clone()
    train(model, optimizer, 1)
    assert torch.equal(model[0].weight, kept)


@pytest.mark.parametrize("dropout", [False, True], ids=["plain", "dropout"])
def test_unused_parameters__are_left_alone(dropout: bool) -> None:
    """A pooler that the loss does not use is no reason to refuse dropout."""
    torch.manual_seed(0)
    model = Compose(
        lambda m, x: m.body(x), body=mlp(nn.Dropout(0.5 if dropout else 0.0)), rest=nn.Linear(3, 2)
    ).double()
    before = model.get_parameter("rest.weight").detach().clone()
    optimizer = natural(model, weight_decay=0.1, momentum=0.9)
    train(model, optimizer)
    assert torch.equal(model.get_parameter("rest.weight"), before)


def test_clipping__changes_the_damped_gradient_and_not_the_papers_update() -> None:
    for setting in ({"damping": 1e-2, "gram_damping": None}, {"gram_damping": 1e-2}):
        changes = []
        for bound in (1e9, 1e-3):
            model = mlp()
            optimizer, before = natural(model, **setting), flat(model)
            backward(model)
            total = nn.utils.clip_grad_norm_(model.parameters(), bound)
            optimizer.step()
            changes.append((flat(model) - before) * max(1.0, float(total) / bound if "damping" in setting else 1.0))
        close(changes[1], changes[0], 1e-2 if "damping" in setting else 1e-12)


def test_schedulers__set_the_rate_and_the_momentum() -> None:
    model, twin = mlp(), mlp()
    optimizer = natural(model, lr=1.0, momentum=0.5)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.2, total_steps=5)
    by_hand = natural(twin, lr=1.0, momentum=0.5)
    for _ in range(4):
        for key in ("lr", "momentum"):
            by_hand.param_groups[0][key] = optimizer.param_groups[0][key]
        for own, one in ((model, optimizer), (twin, by_hand)):
            one.zero_grad()
            backward(own)
            one.step()
        scheduler.step()
    close(flat(model), flat(twin))


def test_closure__is_run_once_and_its_loss_returned() -> None:
    model = mlp()
    optimizer, losses = natural(model), []

    def closure() -> Tensor:
        optimizer.zero_grad()
        losses.append(backward(model))
        return losses[-1]

    with torch.no_grad():
        for number in (1, 2):
            assert optimizer.step(closure) is losses[-1]
            assert len(losses) == number
    close(flat(model), expected())


class Late(nn.Module):
    """Two layers of which a pass uses those that its inputs ask for."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.norm, self.head = nn.Linear(4, 3), nn.LayerNorm(3), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        first, second = bool((x[:, 0] > 0).any()), bool((x[:, 1] > 0).any())
        z = torch.zeros(len(x), 3, dtype=x.dtype)
        z = z + self.body(x) if first else z
        return z + self.norm(self.head(x.tanh())) if second else z


@pytest.mark.parametrize("structure", ["full", "block", "diagonal", "kfac", "ekfac"])
@pytest.mark.parametrize("kind", ["ef", "exact"])
def test_accumulation__takes_a_layer_that_a_later_pass_uses_first(kind: str, structure: str) -> None:
    """As an expert that nothing was routed to before; in another order of the passes the step is the same."""
    x, steps = X.detach().clone(), []
    x[:, 0] = x[:, 0].abs() * torch.tensor([1, 1, -1, -1, 1, 1])
    x[:, 1] = x[:, 1].abs() * torch.tensor([-1, -1, 1, 1, 1, 1])
    for order in ((0, 1, 2), (2, 1, 0)):
        torch.manual_seed(3)
        model = Late().double()
        before = flat(model)
        optimizer = fk.optim.NaturalGradient(model, lr=1.0, kind=kind, damping=1e-2, structure=structure)
        for number in order:
            take = slice(2 * number, 2 * number + 2)
            (F.cross_entropy(model(x[take]), Y[take]) / 3).backward()
        optimizer.step()
        steps.append(before - flat(model))
        if structure == "full" and kind == "ef":
            torch.manual_seed(3)
            close(steps[-1], by_hand.natural(by_hand.rows(Late().double(), (x, Y)), 1e-2))
    close(steps[0], steps[1])


def test_accumulation__refuses_a_layer_that_was_frozen_in_an_earlier_pass() -> None:
    model = mlp()
    optimizer = natural(model)
    model[0].requires_grad_(False)
    (F.cross_entropy(model(X[:3]), Y[:3]) / 2).backward()
    model[0].requires_grad_(True)
    (F.cross_entropy(model(X[3:]), Y[3:]) / 2).backward()
    with pytest.raises(fk.ModelError, match="different trainable parameters"):
        optimizer.step()
