"""Examples that meet in a batch, noise, and hooks on the graph, where the first examples or builds do not show them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fisherkit as fk
from fisherkit.rows import verified
from fisherkit.rows.plan import make_plan
from tests.test_later_uses import TOKENS, Model, X, check

Change = Callable[[Tensor], Tensor]


def linear(x: Tensor, w: Tensor, b: Tensor, *, change: Change | None = None) -> Tensor:
    return (F.linear(x if change is None else change(x), w, b)).tanh()


def embedded(i: Tensor, w: Tensor, b: Tensor, *, change: Change | None = None) -> Tensor:
    return (F.embedding(i if change is None else change(i), w) + b).tanh().sum(1)


def statistics(x: Tensor) -> Tensor:
    return x - x.mean(0)


def noise(x: Tensor) -> Tensor:
    return x + 0.1 * torch.randn_like(x)


def common(x: Tensor) -> Tensor:
    return x + 0.1 * torch.randn(())


def noise_of_numpy(x: Tensor) -> Tensor:
    return x + 0.1 * torch.from_numpy(np.random.standard_normal(3))  # noqa: NPY002


def noise_of_its_own(x: Tensor) -> Tensor:
    return x + 0.1 * torch.randn(3, generator=OWN)


def read(x: Tensor) -> Tensor:
    return x - torch.from_numpy(x.numpy().mean(0))


def neighbours(i: Tensor) -> Tensor:
    return (i + i.sum()) % 6


def replaced(i: Tensor) -> Tensor:
    return torch.where(torch.rand(i.shape) < 0.02, 0, i)


OWN = torch.Generator()
CHANGES = [
    *[(linear, (3, 3), X, change) for change in (statistics, noise, common, noise_of_numpy, noise_of_its_own, read)],
    (embedded, (6, 3), TOKENS, neighbours), (embedded, (6, 3), TOKENS, replaced),
]  # fmt: skip


@pytest.mark.parametrize("structure", ["full", "kfac"])
@pytest.mark.parametrize("size", [8, 2])
@pytest.mark.parametrize(("function", "shape", "x", "change"), CHANGES)
def test_second_build__refuses_what_reaches_inputs_without_a_gradient(
    function: Callable[..., Tensor], shape: tuple[int, int], x: Tensor, change: Change, size: int, structure: str
) -> None:
    model = Model(function, shape, (3,))
    data = [(part, None) for part in x.split(size)]

    def build() -> fk.FisherApproximation:
        return fk.ExactFisher(model, data, likelihood="gaussian", structure=structure)

    before = build().to_dense()
    model.settings["change"] = change
    for _ in range(2):
        with pytest.raises(fk.ModelError, match="change"):
            build()
    model.settings["change"] = None
    torch.testing.assert_close(build().to_dense(), before)


def test_streamed_products__refuse_examples_that_influence_each_other_since() -> None:
    model = Model(linear, (3, 3), (3,))
    fk.ExactFisher(model, (X, None), likelihood="gaussian")
    model.settings["change"] = statistics
    with pytest.raises(fk.ModelError, match="change"):
        fk.ExactFisher(model, (X, None), likelihood="gaussian", memory_budget=1)


# -- experts with a capacity -------------------------------------------------------------------------------------------

CAPACITY = 24


def within(chosen: Tensor, experts: int) -> Tensor:
    """Which tokens, in the batch's order, an expert has room for."""
    return F.one_hot(chosen, experts).cumsum(0).gather(1, chosen[:, None])[:, 0] <= CAPACITY


def masked(x: Tensor, router: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """Every expert sees all tokens; a mask keeps those that it has room for."""
    flat = x.flatten(0, 1)
    chosen = (flat @ router).argmax(1)
    kept = within(chosen, 2)
    both = torch.stack([flat @ first, flat @ second])
    y = torch.where(chosen[:, None] == 0, both[0], both[1]) * kept[:, None]
    return y.view_as(x).tanh().sum(1)


def dispatched(x: Tensor, router: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """Experts see the tokens that they have room for."""
    flat = x.flatten(0, 1)
    chosen = (flat @ router).argmax(1)
    kept, y = within(chosen, 2), torch.zeros_like(flat)
    for number, w in enumerate((first, second)):
        own = ((chosen == number) & kept).nonzero()[:, 0]
        y = y.index_add(0, own, flat[own] @ w)
    return y.view_as(x).tanh().sum(1)


@pytest.mark.parametrize("structure", ["full", "diagonal"])
@pytest.mark.parametrize("function", [masked, dispatched])
def test_experts__that_run_out_of_room_in_a_large_batch_are_refused(
    function: Callable[..., Tensor], structure: str
) -> None:
    x = torch.randn(32, 3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    model = Model(function, (3, 2), (3, 3), (3, 3))
    for _ in range(2):
        with pytest.raises(fk.ModelError, match="change"):
            fk.ExactFisher(model, (x, None), likelihood="gaussian", structure=structure)
        # No expert is full.
        check(model, x[:6], structure=structure)
    with pytest.raises(fk.ModelError, match="change"):
        fk.ExactFisher(model, [(x[:6], None), (x, None)], likelihood="gaussian", structure=structure)


def masked_along_outputs(x: Tensor, w: Tensor) -> Tensor:
    """A mask that forgets an axis, which shows where there are as many examples as outputs, and one is masked."""
    h = (x @ w).tanh()
    return h * (x[:, 0] > -9).to(h) if len(x) == h.shape[1] else h


@pytest.mark.parametrize("structure", ["full", "diagonal"])
def test_mask_along_another_axis_than_the_examples__is_refused_where_it_masks(structure: str) -> None:
    model, x = Model(masked_along_outputs, (3, 5)), X[:5].clone()
    check(model, X[:5], structure=structure)
    x[4, 0] = -10
    with pytest.raises(fk.ModelError, match="data, batch 1: got outputs that change with the rest"):
        fk.ExactFisher(model, [(X[:5], None), (x, None)], likelihood="gaussian", structure=structure)


# -- hooks on the graph ------------------------------------------------------------------------------------------------


def scaled_by_tensor(h: Tensor) -> None:
    h.register_hook(lambda g: 2 * g)


def scaled_by_node(h: Tensor) -> None:
    assert h.grad_fn is not None
    h.grad_fn.register_prehook(lambda gradients: (2 * gradients[0],))


def exchanged_by_tensor(h: Tensor) -> None:
    h.register_hook(lambda g: g.flip(0))


def exchanged_by_node(h: Tensor) -> None:
    assert h.grad_fn is not None
    h.grad_fn.register_prehook(lambda gradients: (gradients[0].roll(1, 0),))


def mixed_by_node(h: Tensor) -> None:
    assert h.grad_fn is not None
    h.grad_fn.register_prehook(lambda gradients: (gradients[0].mean(0, keepdim=True).expand_as(gradients[0]),))


HOOKS = [scaled_by_tensor, scaled_by_node, exchanged_by_tensor, exchanged_by_node, mixed_by_node]


def hooked(x: Tensor, w: Tensor, b: Tensor, *last: Tensor, hook: Callable[[Tensor], None] | None) -> Tensor:
    h = F.linear(x, w, b)
    if hook is not None:
        hook(h)
    return F.linear(h.tanh(), *last) if last else h


@pytest.mark.parametrize("options", [{}, {"structure": "diagonal"}, {"memory_budget": 1}], ids=str)
@pytest.mark.parametrize("shapes", [[(3, 3), (3,)], [(3, 3), (3,), (2, 3), (2,)]], ids=["last", "hidden"])
@pytest.mark.parametrize("hook", HOOKS)
def test_hooks_on_the_graph__are_part_of_each_examples_own_gradient(
    hook: Callable[[Tensor], None], shapes: list[tuple[int, ...]], options: dict[str, Any]
) -> None:
    fresh, known = (Model(hooked, *shapes, hook=one) for one in (hook, None))
    check(fresh, X, **options)
    check(known, X, **options)
    known.settings["hook"] = hook
    for _ in range(2):
        check(known, X, **options)


# -- inputs that are written to ----------------------------------------------------------------------------------------


def written_before(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return F.linear(x.mul_(2), w, b).tanh()


def written_after(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    h = F.linear(x, w, b).tanh()
    return h + x.mul_(2)


def test_forward_that_writes_to_its_input__before_a_layer_reads_it() -> None:
    for options in ({}, {"structure": "diagonal"}, {"memory_budget": 1}):
        check(Model(written_before, (3, 3), (3,)), X, **options)


def test_forward_that_writes_to_its_input__after_a_layer_has_kept_it_is_named() -> None:
    x = X.clone()
    with pytest.raises(fk.ModelError, match="in place"):
        fk.ExactFisher(Model(written_after, (3, 3), (3,)), (x, None), likelihood="gaussian")
    assert torch.equal(x, X)


class Two(nn.Module):
    """Of two inputs, the first is put into another order in place."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(3, 2).double()

    def forward(self, x: Tensor, scale: Tensor) -> Tensor:
        x[:] = x.flip(0)
        return self.layer(x) * scale


def test_forward_that_puts_examples_in_another_order_in_place__is_named() -> None:
    with pytest.raises(fk.ModelError, match="changes with the rest of its batch"):
        fk.ExactFisher(Two(), ((X.clone(), X[:, :1].clone()), None), likelihood="gaussian")


def test_model_that_draws_without_use__is_verified_once_and_its_noise_is_still_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def drawing(x: Tensor, w: Tensor, b: Tensor, *, noise: float) -> Tensor:
        z = F.linear(x, w, b).tanh()
        return z + noise if float(torch.rand(())) < noise else z

    model, found = Model(drawing, (3, 3), (3,), noise=0.0), []
    monkeypatch.setattr(verified, "make_plan", lambda *args, **kw: found.append(args) or make_plan(*args, **kw))
    for _ in range(2):
        check(model, X)
    assert len(found) == 1
    model.settings["noise"] = 0.5
    torch.manual_seed(0)
    with pytest.raises(fk.ModelError, match="change"):
        fk.ExactFisher(model, (X, None), likelihood="gaussian")


@pytest.mark.parametrize("structure", ["full", "kfac"])
def test_outputs_that_depend_on_the_batchs_size__are_refused(structure: str) -> None:
    def shared_out(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return F.linear(x, w, b).tanh() / len(x)

    with pytest.raises(fk.ModelError, match="changes with the rest of its batch"):
        fk.ExactFisher(Model(shared_out, (3, 3), (3,)), (X, None), likelihood="gaussian", structure=structure)
