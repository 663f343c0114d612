"""Whose each position is: models that pack, route, sort and fold examples, against one autograd call an example."""

import random
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import fisherkit as fk
from fisherkit.rows import batch_axis
from fisherkit.rows.ownership import Owned, Regular, arrangement, codes, owners
from tests import by_hand
from tests.axes import seeds

WIDTH, CLASSES = 4, 3


class Packed(nn.Module):
    """Layers see the tokens that are not padding, in one row, as implementations without padding do."""

    def __init__(self, choose: random.Random) -> None:
        super().__init__()
        self.first, self.norm = nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH)
        self.second, self.head = nn.Linear(WIDTH, WIDTH, bias=choose.random() < 0.5), nn.Linear(WIDTH, CLASSES)
        self.backwards = choose.random() < 0.3

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        tokens = x[mask].flip(0) if self.backwards else x[mask]
        tokens = torch.tanh(self.second(self.norm(torch.tanh(self.first(tokens)))))
        whole = x.new_zeros(*x.shape)
        whole[mask] = tokens.flip(0) if self.backwards else tokens
        return self.head(whole.sum(1))


class Routed(nn.Module):
    """A mixture of experts: each sees the tokens that are routed to it."""

    def __init__(self, choose: random.Random) -> None:
        super().__init__()
        number = choose.randint(2, 5)
        self.router = nn.Linear(WIDTH, number)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH)) for _ in range(number)
        )
        self.head = nn.Linear(WIDTH, CLASSES)
        self.top, self.by_where = choose.randint(1, 2), choose.random() < 0.5

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        flat = x.reshape(-1, WIDTH)
        weights, chosen = self.router(flat).softmax(-1).topk(self.top, -1)
        out = torch.zeros_like(flat)
        for number, expert in enumerate(self.experts):
            token, place = torch.where(chosen == number)
            if len(token) == 0:
                continue
            own = expert(flat[token]) * weights[token, place, None]
            out = (
                out.index_add(0, token, own) if self.by_where else torch.index_put(out, (token,), own, accumulate=True)
            )
        return self.head((out.view_as(x) * mask.unsqueeze(-1)).sum(1))


class Dispatched(nn.Module):
    """A mixture of experts whose tokens are moved by products with one-hot matrices: no index in sight."""

    def __init__(self, choose: random.Random) -> None:
        super().__init__()
        number = choose.randint(2, 3)
        self.router = nn.Linear(WIDTH, number)
        self.experts = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(number))
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        flat = x.reshape(-1, WIDTH)
        chosen = self.router(flat).argmax(-1)
        out = torch.zeros_like(flat)
        for number, expert in enumerate(self.experts):
            own = (chosen == number).nonzero().squeeze(1)
            dispatch = nn.functional.one_hot(own, len(flat)).to(flat)
            out = out + dispatch.mT @ torch.tanh(expert(dispatch @ flat))
        return self.head(out.view_as(x).mul(mask.unsqueeze(-1)).mean(1))


class Sorted(nn.Module):
    """Examples are sorted by length inside, as packed recurrent layers want them, and put back at the end."""

    def __init__(self, choose: random.Random) -> None:
        super().__init__()
        self.body, self.gain = nn.Linear(WIDTH, WIDTH), nn.Parameter(torch.ones(WIDTH))
        self.head = nn.Linear(WIDTH, CLASSES)
        self.second = choose.random() < 0.5
        self.back_last = choose.random() < 0.5

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        order = mask.sum(1).argsort(descending=True, stable=True)
        y = torch.tanh(self.body(x[order].transpose(0, 1) if self.second else x[order])) * self.gain
        y = (y.transpose(0, 1) if self.second else y) * mask[order].unsqueeze(-1)
        z = y.sum(1)
        return self.head(z)[order.argsort()] if self.back_last else self.head(z[order.argsort()])


class Folded(nn.Module):
    """Views of an example are folded into the batch, before a convolution and linear layers."""

    def __init__(self, choose: random.Random) -> None:
        super().__init__()
        self.conv, self.body = nn.Conv1d(1, 2, 3, padding=1), nn.Linear(2 * WIDTH, WIDTH)
        self.norm, self.head = nn.GroupNorm(1, 2), nn.Linear(WIDTH, CLASSES)
        self.outside = choose.random() < 0.5

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        views = (x.transpose(0, 1) if self.outside else x).reshape(-1, 1, WIDTH)
        y = torch.tanh(self.body(self.norm(self.conv(views)).flatten(1)))
        y = y.unflatten(0, (x.shape[1], -1) if self.outside else (-1, x.shape[1]))
        return self.head((y.transpose(0, 1) if self.outside else y).mean(1))


class Doubled(torch.autograd.Function):
    """A function of which nothing is known."""

    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    def backward(ctx: object, gradient: Tensor) -> Tensor:
        return 2 * gradient


class Opaque(nn.Module):
    """Another number of uses in every batch, positions picked by content, and a function that cannot be seen into."""

    def __init__(self, choose: random.Random) -> None:
        super().__init__()
        self.body, self.table = nn.Linear(WIDTH, WIDTH), nn.Embedding(5, WIDTH)
        self.head = nn.Linear(WIDTH, CLASSES)
        self.hidden = choose.random() < 0.5

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        y = x + self.table((x[..., 0].abs() * 2).long().clamp_max(4))
        for _ in range(x.shape[1] % 3 + 1):
            y = torch.tanh(self.body(y))
            y = Doubled.apply(y) if self.hidden else y
        last = y[torch.arange(len(y)), mask.sum(1) - 1] + y[:, torch.tensor([0, 0])].sum(1)
        return self.head(last)


class Shared(nn.Module):
    """A layer that computes once for all examples, beside one that does not."""

    def __init__(self, choose: random.Random) -> None:
        super().__init__()
        self.common, self.body, self.head = nn.Linear(2, WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        places = torch.arange(x.shape[1], dtype=x.dtype).unsqueeze(1).expand(-1, 2) / 7
        return self.head((torch.tanh(self.body(x) + self.common(places)) * mask.unsqueeze(-1)).sum(1))


MODELS: tuple[Callable[[random.Random], nn.Module], ...] = (
    Packed, Routed, Dispatched, Sorted, Folded, Opaque, Shared,
)  # fmt: skip


def problem(seed: int) -> tuple[nn.Module, list[tuple[tuple[Tensor, Tensor], Tensor]]]:
    """A model, and some batches of different sizes and lengths."""
    choose = random.Random(seed)
    torch.manual_seed(seed)
    model = MODELS[seed % len(MODELS)](choose).double()
    batches = []
    for _ in range(choose.randint(1, 3)):
        size, length = choose.choice((1, 2, 3, 4, 6)), choose.randint(1, 5)
        lengths = torch.tensor([choose.randint(1, length) for _ in range(size)])
        mask = torch.arange(length) < lengths.unsqueeze(1)
        batches.append(((torch.randn(size, length, WIDTH).double(), mask), torch.randint(CLASSES, (size,))))
    return model, batches


def rows(model: nn.Module, batches: list[tuple[tuple[Tensor, Tensor], Tensor]], classes: bool) -> Tensor:
    """By autograd from each example's own outputs in its batch: loss gradients, or of an exact Fisher's vectors."""
    found = []
    for (x, mask), y in batches:
        z = model(x, mask)
        p = z.detach().softmax(-1)
        for n in range(len(x)):
            root = p[n].sqrt()
            exact = torch.diag(root) - p[n].unsqueeze(1) * root
            loss = p[n] - nn.functional.one_hot(y[n], CLASSES)
            found += [by_hand.gradient(z[n], model, v) for v in (exact.mT if classes else loss.unsqueeze(0))]
    return torch.stack(found)


@pytest.mark.parametrize("block", seeds(3, 12))  # of 7 models, 2 kinds and 3 forms, which 42 seeds go through
def test_fisher__is_that_of_one_autograd_call_an_example_however_the_model_moves_them(block: int) -> None:
    for seed in range(28 * block, 28 * (block + 1)):
        model, batches = problem(seed)
        exact = seed // len(MODELS) % 2 == 1
        kind = fk.ExactFisher if exact else fk.EmpiricalFisher
        j = rows(model, batches, exact)
        expected = j.mT @ j / sum(len(y) for _, y in batches)
        if seed % 3 == 0:
            found, expected = kind(model, batches, structure="diagonal").diagonal(), expected.diagonal()
        else:
            fisher = kind(model, batches, memory_budget=1 if seed % 3 == 1 else None)
            found = fisher @ torch.eye(fisher.size, dtype=fisher.dtype)
        error = float((found - expected).norm() / expected.norm())
        assert error < 1e-9, f"seed {seed}, {type(model).__name__}: {error:.2g}"


@pytest.mark.parametrize("seed", range(21))
def test_natural_gradient__sees_each_examples_row(seed: int) -> None:
    model, batches = problem(seed)
    expected = by_hand.natural(rows(model, batches[:1], classes=False), 1e-2)
    optimizer = fk.optim.NaturalGradient(model, lr=1.0, kind="ef", damping=1e-2)
    step = by_hand.stepped(model, optimizer, *batches[0])
    # As in torch, what the loss does not depend on has no gradient and no step.
    assert (step - expected).norm() <= 1e-8 * expected.norm()


def test_natural_gradient__a_layer_that_the_first_batch_did_not_use_takes_part_when_it_is_used() -> None:
    class Late(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.extra, self.late = nn.Linear(WIDTH, CLASSES), nn.Linear(WIDTH, CLASSES), False

        def forward(self, x: Tensor) -> Tensor:
            return self.body(x) + self.extra(x.tanh()) if self.config["late"] else self.body(x)

    torch.manual_seed(0)
    model, x, y = Late().double(), torch.randn(5, WIDTH).double(), torch.randint(CLASSES, (5,))
    optimizer = fk.optim.NaturalGradient(model, lr=1.0, kind="ef", damping=1e-2)
    for late in (False, True):
        model.config = {"late": late}  # type: ignore[assignment]
        j = by_hand.rows(model, (x, y))
        step = by_hand.stepped(model, optimizer, x, y)
        torch.testing.assert_close(step, by_hand.natural(j, 1e-2), rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("kind", [fk.EmpiricalFisher, fk.ExactFisher])
def test_kfac__of_packed_tokens_counts_the_tokens_that_there_are(kind: type[fk.FisherApproximation]) -> None:
    """Whether tokens are packed or masked, the factors are sums over the same tokens."""

    class Tokens(nn.Module):
        def __init__(self, packed: bool) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.body, self.head, self.packed = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, CLASSES), packed
            self.double()

        def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
            if not self.packed:
                return self.head((torch.tanh(self.body(x)) * attention_mask.unsqueeze(-1)).sum(1))
            whole = torch.zeros_like(x)
            whole[attention_mask] = torch.tanh(self.body(x[attention_mask]))
            return self.head(whole.sum(1))

    torch.manual_seed(1)
    mask = torch.arange(5) < torch.tensor([[5], [2], [1], [4]])
    data = {"x": torch.randn(4, 5, WIDTH).double(), "attention_mask": mask, "labels": torch.randint(CLASSES, (4,))}
    for structure in ("kfac", "ekfac"):
        packed, masked = (kind(Tokens(packed), data, structure=structure) for packed in (True, False))
        torch.testing.assert_close(packed.to_dense(), masked.to_dense(), rtol=1e-10, atol=1e-14)


def test_experts__have_a_rule_also_where_the_first_two_examples_do_not_use_them() -> None:
    torch.manual_seed(0)
    model = Routed(random.Random(3)).double()
    x, y = torch.randn(40, 5, WIDTH).double(), torch.randint(CLASSES, (40,))
    mask = torch.ones(40, 5, dtype=torch.bool)
    one_by_one = [((x[n : n + 1], mask[n : n + 1]), y[n : n + 1]) for n in range(40)]
    for data in (((x, mask), y), one_by_one):
        fisher = fk.EmpiricalFisher(model, data, structure="diagonal")
        assert {entry.rule for entry in fisher.coverage().entries} == {"linear"}


def test_examples_that_mix__are_refused_also_in_a_later_batch() -> None:
    class Late(nn.Module):
        """Adds the batch's mean where an input says so."""

        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, CLASSES)

        def forward(self, x: Tensor) -> Tensor:
            y = torch.tanh(self.body(x))
            return self.head(y + y.mean(0) if bool(x.max() > 5) else y)

    torch.manual_seed(0)
    model, x, y = Late().double(), torch.randn(8, WIDTH).double(), torch.randint(CLASSES, (8,))
    x[6, 0] = 9.0
    data = [(x[:4], y[:4]), (x[4:], y[4:])]
    for structure in ("full", "diagonal", "kfac"):
        with pytest.raises(fk.ModelError, match="change with the rest of the batch"):
            fk.EmpiricalFisher(model, data, structure=structure)


# -- the two proofs ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("batch", [2, 3, 40, 700, 3000])
def test_owners__are_found(batch: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(batch)
    g = torch.randn(2 * batch, 3, generator=generator).to(dtype)
    owner = torch.randint(batch, (2 * batch,), generator=generator)
    g[1] = 0
    numbers = codes(batch, g)
    found = owners(g, [g * row[owner].unsqueeze(1) for row in numbers], numbers)
    assert found is not None
    owner[1] = -1
    assert torch.equal(found, owner)


@pytest.mark.parametrize("width", [1, 3])
def test_owners__an_entry_of_several_examples_has_none(width: int) -> None:
    generator = torch.Generator().manual_seed(0)
    mistaken = 0
    for _ in range(200):
        batch = int(torch.randint(2, 60, (), generator=generator))
        parts = torch.randn(batch, width, generator=generator).double()
        numbers = codes(batch, parts)
        one, two = torch.randperm(batch, generator=generator)[:2].tolist()
        multiplied = [row[one] * parts[one] + row[two] * parts[two] for row in numbers]
        mistaken += owners((parts[one] + parts[two])[None], [m[None] for m in multiplied], numbers) is not None
    assert mistaken == 0


@pytest.mark.parametrize("inner", [1, 2, 6])
def test_arrangement__is_regular_where_owners_are(inner: int) -> None:
    batch, outer = 4, 3
    owner = torch.arange(batch).repeat_interleave(inner).repeat(outer)
    found = arrangement(owner, torch.Size((outer, batch, inner)), batch)
    assert found == Regular(batch, inner)
    x = torch.randn(2, len(owner), 1, 5)
    both = found.arranged(x), Owned(owner, batch).arranged(x)
    torch.testing.assert_close(*both)


def test_batch_axis__of_every_function_is_where_a_loop_over_examples_finds_it() -> None:
    """Each function that is said to keep the batch apart: its outputs for an example alone are those in the batch."""
    batch = 3
    x = torch.randn(batch, 4, 6, 6, requires_grad=True)
    calls: list[tuple[Callable[..., Tensor], tuple[object, ...]]] = [
        (torch.transpose, (0, 1)),
        (torch.permute, ((1, 2, 0, 3),)),
        (torch.movedim, (0, 2)),
        (torch.flatten, (0, 1)),
        (torch.flatten, (1, 2)),
        (torch.reshape, ((batch * 2, 2, 36),)),
        (torch.unsqueeze, (0,)),
        (torch.sum, (1,)),
        (torch.mean, ((1, 2), True)),
        (torch.softmax, (1,)),
        (torch.cumsum, (2,)),
        (torch.select, (1, 2)),
        (torch.flip, ((1, 3),)),
        (torch.roll, (1, 2)),
        (torch.narrow, (1, 1, 2)),
        (torch.repeat_interleave, (2, 0)),
        (torch.matmul, (torch.randn(6, 2),)),
        (torch.nn.functional.pad, ((1, 1),)),
        (torch.nn.functional.gelu, ()),
        (torch.Tensor.__getitem__, ((slice(None), 1),)),
        (torch.Tensor.__getitem__, ((..., None, slice(1, 3)),)),
        (torch.Tensor.__getitem__, ((slice(None), torch.tensor([2, 0, 1, 1])),)),
        (torch.nn.functional.linear, (torch.randn(2, 6),)),
        (torch.nn.functional.layer_norm, ((6,),)),
        (torch.nn.functional.group_norm, (2,)),
        (torch.Tensor.expand, (5, batch, 4, 6, 6)),
        (torch.nn.functional.conv2d, (torch.randn(2, 4, 3, 3),)),
        (torch.nn.functional.max_pool2d, (2,)),
        (torch.norm, (2, 1)),
        (torch.einsum, ()),
    ]
    for function, rest in calls:
        args = (x, *rest) if function is not torch.einsum else ("bchw,dw->bdch", x, torch.randn(2, 6))
        tracker = batch_axis.Tracker(batch)
        tracker.mark(x, batch_axis.Axis(0))
        z = function(*args)
        tracker.see(function, args, {}, z)
        axis = tracker.status(z)
        assert isinstance(axis, batch_axis.Axis), function
        entries = z.movedim(axis.dim, 0).reshape(axis.outer, batch, axis.inner, -1)
        for n in range(batch):
            (g,) = torch.autograd.grad(entries[:, n].sum(), x, retain_graph=True)
            others = [m for m in range(batch) if m != n]
            assert bool(g[n].any()) or function is torch.nn.functional.group_norm or function is torch.softmax, function
            assert not bool(g[others].any()), function


def test_batch_axis__ends_where_examples_may_mix() -> None:
    x = torch.randn(3, 3, requires_grad=True)
    calls: list[tuple[Callable[..., Tensor], tuple[object, ...]]] = [
        (torch.sum, ()),
        (torch.sum, (0,)),
        (torch.softmax, (0,)),
        (torch.cumsum, (0,)),
        (torch.Tensor.__getitem__, (torch.tensor([2, 0, 1]),)),
        (torch.index_select, (0, torch.tensor([1, 0, 2]))),
        (torch.matmul, (x,)),
        (torch.Tensor.add, (x.t(),)),
        (torch.flip, ((0,),)),
        (torch.Tensor.flip, (1, 0)),
        (torch.roll, (1, 0)),
        (torch.norm, (1, 0)),
        (torch.cat, ()),
        (torch.sort, (0,)),
        (torch.topk, (2, 0)),
        (torch.Tensor.__getitem__, (torch.tensor([True, False, True]),)),
        (torch.sparse.softmax, (0,)),
    ]
    for function, rest in calls:
        args = ([x, x],) if function is torch.cat else (x, *rest)
        tracker = batch_axis.Tracker(3)
        tracker.mark(x, batch_axis.Axis(0))
        z = torch.randn(3, 3, requires_grad=True) * 1 if function is torch.sparse.softmax else function(*args)
        if function is torch.Tensor.add:
            turned = args[1]
            tracker.see(torch.t, (x,), {}, turned)
        tracker.see(function, args, {}, z)
        first = batch_axis.tensors(z)[0]
        assert tracker.status(first) is batch_axis.Mark.UNKNOWN, function
