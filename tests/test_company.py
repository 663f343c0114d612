"""Examples that influence each other, states that batches leave, and what they are told."""

import inspect
import warnings
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
from tests.axes import pairwise
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


@pytest.mark.parametrize(
    ("function", "shape", "x", "change", "size", "structure"),
    [(*change, *rest) for change, *rest in pairwise(CHANGES, [8, 2], ["full", "kfac"])],
)
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


@pytest.mark.parametrize(
    ("hook", "shapes", "options"),
    pairwise(
        HOOKS, [[(3, 3), (3,)], [(3, 3), (3,), (2, 3), (2,)]], [{}, {"structure": "diagonal"}, {"memory_budget": 1}]
    ),
)
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


# -- what a model keeps of a batch's shape -----------------------------------------------------------------------------


class Kept(nn.Module):
    """Adds what it kept of the batch before, or what it has for a batch of a size."""

    def __init__(self, size: int | None) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(4, 4), nn.Linear(4, 3)
        self.state = None if size is None else torch.zeros(size, 4)

    def forward(self, x: Tensor) -> Tensor:
        self.state = (self.body(x) + (0 if self.state is None else 0.5 * self.state.detach())).tanh()
        z: Tensor = self.head(self.state)
        return z


def data(size: int = 6) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(size, 4, generator=generator), torch.randint(3, (size,), generator=generator)


@pytest.mark.parametrize("size", [None, 6, 1])
@pytest.mark.parametrize("cut", [6, 3, 1])
def test_state_of_a_batchs_shape__is_refused_in_words(size: int | None, cut: int) -> None:
    x, y = data()
    with pytest.raises(fk.ModelError, match=r"keeps|changes with the rest of its batch"):
        fk.EmpiricalFisher(Kept(size), list(zip(x.split(cut), y.split(cut), strict=True)), structure="diagonal")


def test_outputs_as_long_as_the_longest_example__are_refused_with_what_to_do() -> None:
    class Packed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn, self.head = nn.GRU(3, 4, batch_first=True), nn.Linear(4, 5)

        def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
            packed = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
            z: Tensor = self.head(nn.utils.rnn.pad_packed_sequence(self.rnn(packed)[0], batch_first=True)[0])
            return z

    inputs = torch.randn(4, 5, 3), torch.tensor([3, 2, 5, 4])
    with pytest.raises(fk.ModelError, match="total_length"):
        fk.ExactFisher(Packed(), (inputs, None))


@pytest.mark.parametrize("form", ["pair", "triple"])
def test_variances_beside_targets__are_refused_with_what_to_do(form: str) -> None:
    x, y, variance = torch.randn(6, 4), torch.randn(6, 3), torch.rand(6, 3) + 0.1
    loss, model = nn.GaussianNLLLoss(), nn.Linear(4, 3)
    batch: Any = (x, (y, variance)) if form == "pair" else (x, y, variance)
    with pytest.raises(fk.InvalidTypeError, match=r"torch\.stack\(\(y, variance\), -1\)"):
        fk.EmpiricalFisher(model, [batch], likelihood=loss)
    assert fk.EmpiricalFisher(model, [(x, torch.stack((y, variance), -1))], likelihood=loss).examples == 6


def test_arguments__whole_floats_and_patterns_of_names_are_taken() -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    fisher = fk.EmpiricalFisher(model, data(), params="2.*", memory_budget=1e9)
    assert fisher.space.names == ("2.weight", "2.bias")
    assert fk.EmpiricalFisher(model, data(), params=["*.bias", "0.weight"]).space.names[0] == "0.weight"
    with pytest.raises(fk.UnknownParameterError):
        fk.EmpiricalFisher(model, data(), params="3.*")
    with pytest.raises(fk.InvalidTypeError):
        fk.EmpiricalFisher(model, data(), memory_budget=1.5)


@pytest.mark.parametrize("kind", [fk.EmpiricalFisher, fk.TruncatedFisher])
def test_help__of_a_kind_lists_all_options(kind: type[fk.FisherApproximation]) -> None:
    shared = set(inspect.signature(fk.FisherApproximation).parameters) - {"kind", "options"}
    assert shared <= set(inspect.signature(kind).parameters)
    assert all(f"    {name}: " in (inspect.getdoc(kind) or "") for name in shared - {"model", "data"})


def test_warnings__point_at_the_users_line() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.Softmax(1))
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        fk.EmpiricalFisher(model, data())
    assert [one.filename for one in found if "probabilities" in str(one.message)] == [__file__]


# -- what passes inside of passes take ---------------------------------------------------------------------------------


def jacobian(x: Tensor, w: Tensor) -> Tensor:
    return torch.vmap(torch.func.jacrev(lambda one: (w @ one).tanh()))(x).flatten(1)


def adapted(x: Tensor, w: Tensor) -> Tensor:
    """A step of gradient descent on each example before the output."""

    def one(example: Tensor) -> Tensor:
        return (w - 0.1 * torch.func.grad(lambda v: (v @ example).tanh().square().sum())(w)) @ example

    return torch.vmap(one)(x)


def each(x: Tensor, w: Tensor) -> Tensor:
    """Every example as a batch of its own, with what is made of a parameter alone."""
    return torch.vmap(lambda one: torch.cat([w.tanh()[:1].expand(len(one), 3), one]).sum(0) @ w.mT)(x.unsqueeze(1))


def nested(x: Tensor, w: Tensor, *, layout: torch.layout) -> Tensor:
    rows = torch.nested.as_nested_tensor(list(x), layout=layout)
    return torch.nested.to_padded_tensor(F.linear(rows, w).relu(), 0.0).sum(1)


SEQUENCES = torch.randn(6, 4, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize("options", [{}, {"structure": "diagonal"}, {"storage": "stream"}], ids=str)
@pytest.mark.parametrize(
    ("function", "x", "settings"),
    [
        (jacobian, X, {}),
        (adapted, X, {}),
        (each, X, {}),
        (nested, SEQUENCES, {"layout": torch.jagged}),
        (nested, SEQUENCES, {"layout": torch.strided}),
    ],
    ids=["jacobian", "adapted", "each", "jagged", "strided"],
)
def test_transforms_and_nested_tensors__in_forward_are_taken(
    function: Callable[..., Tensor], x: Tensor, settings: dict[str, Any], options: dict[str, Any]
) -> None:
    check(Model(function, (2, 3), **settings), x, **options)
