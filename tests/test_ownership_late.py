"""Batches whose positions cannot be told apart by what was seen: unseen writes, partial uses, chunks of a loop."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import fisherkit as fk

F64 = torch.float64


def rows(model: nn.Module, x: Tensor, columns: int) -> Tensor:
    """∂z_nc/∂θ of each example and output, as the batch gives them; [N·C, D]."""
    z, parameters = model(x), list(model.parameters())
    found = []
    for n in range(len(x)):
        for c in range(columns):
            g = torch.autograd.grad(z[n, c], parameters, retain_graph=True, materialize_grads=True, allow_unused=True)
            found.append(torch.cat([part.flatten() for part in g]))
    return torch.stack(found)


class Swap(torch.autograd.Function):
    """Examples in another order, written in place where no function mode looks."""

    @staticmethod
    def forward(ctx: object, h: Tensor, order: Tensor) -> Tensor:
        ctx.order = order  # type: ignore[attr-defined]
        ctx.mark_dirty(h)  # type: ignore[attr-defined]
        return h.copy_(h.clone()[order])

    @staticmethod
    def backward(ctx: object, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient[ctx.order.argsort()], None  # type: ignore[attr-defined]


class Swapping(nn.Module):
    """Sorts its examples inside, but for the first two of the data, which are in order."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.mid, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        order = x[:, 0].argsort()
        h = self.body(x) + 0.0
        Swap.apply(h, order)
        h = torch.tanh(self.mid(h))
        return self.head(h[order.argsort()])


class Parted(nn.Module):
    """Uses a layer in some examples, and a function of its bias alone in others."""

    def __init__(self) -> None:
        super().__init__()
        self.k, self.head = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        own = torch.stack([self.k(e) if e[0] > 0 else e * self.k.bias.sum() for e in x])
        return self.head(torch.tanh(own))


class Recurrent(nn.Module):
    """Goes by the loop."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.head = nn.LSTM(4, 3, batch_first=True), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x.unflatten(1, (1, 4)).expand(-1, 3, -1))[0].tanh()[:, -1])


class Unbatched(nn.Module):
    """A convolution of one example at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv1d(1, 2, 3), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.stack([self.conv(e[None]).flatten() for e in x]))


class Rolled(nn.Module):
    """Rolls over all entries, examples included, in the later batch; an empty tuple of axes says so."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.body(x))
        return self.head(torch.roll(torch.roll(h, 1, dims=()), -1, dims=()))


@pytest.mark.parametrize("net", [Swapping, Parted, Recurrent, Unbatched, Rolled])
@pytest.mark.parametrize("chunk_size", [None, 4, 3, 1])
def test_fisher__is_the_reference_s(net: type[nn.Module], chunk_size: int | None) -> None:
    torch.manual_seed(0)
    model, x = net().double(), torch.randn(7, 4, dtype=F64)
    x[:, 0] = torch.tensor([0.1, 0.2, 0.9, -0.5, 0.4, -0.7, 0.3])
    j = rows(model, x, 3)
    fisher = fk.ExactFisher(model, (x, None), likelihood="gaussian", chunk_size=chunk_size)
    torch.testing.assert_close(fisher.to_dense(), j.T @ j / 7, rtol=1e-9, atol=1e-11)


def test_optimizer__gradients_that_are_not_finite_are_the_scaler_s_business_also_with_experts() -> None:
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)
            self.drop = nn.Dropout(0.2)

        def forward(self, x: Tensor) -> Tensor:
            h, first = torch.zeros_like(x), x[:, 0] > 0
            h[first], h[~first] = self.one(x[first]), self.two(x[~first])
            return self.head(self.drop(torch.tanh(h)))

    torch.manual_seed(0)
    model, x, y = Experts().double(), torch.randn(6, 4, dtype=F64), torch.randint(3, (6,))
    optimizer = fk.optim.NaturalGradient(model, lr=0.1, kind="ief", damping=1e-2)
    (nn.functional.cross_entropy(model(x), y) * float("inf")).backward()
    with pytest.raises(fk.NonFiniteError):
        optimizer.step()
    optimizer.zero_grad()
    before = model.head.weight.detach().clone()
    nn.functional.cross_entropy(model(x), y).backward()
    optimizer.step()
    assert not torch.equal(model.head.weight, before)


class Mixing(torch.autograd.Function):
    """Adds each example's neighbour, where no gradients are recorded."""

    @staticmethod
    def forward(ctx: object, h: Tensor) -> Tensor:
        ctx.mixes = bool(h.abs().max() > 3)  # type: ignore[attr-defined]
        return h + h.roll(1, 0) if ctx.mixes else h.clone()  # type: ignore[attr-defined]

    @staticmethod
    def backward(ctx: object, gradient: Tensor) -> Tensor:
        return gradient + gradient.roll(-1, 0) if ctx.mixes else gradient  # type: ignore[attr-defined]


def test_examples_that_a_custom_function_mixes_in_a_later_batch_are_refused() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = nn.Linear(4, 4), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(Mixing.apply(self.body(x)).tanh())

    torch.manual_seed(0)
    model, x, y = Model().double(), torch.randn(8, 4, dtype=F64), torch.randint(3, (8,))
    x[6] = 9.0
    for kind in (fk.EmpiricalFisher, fk.ExactFisher):
        with pytest.raises(fk.ModelError, match="change with the rest of the batch"):
            kind(model, [(x[:4], y[:4]), (x[4:], y[4:])])


class Head(nn.Module):
    """A last layer whose weight is the parameter seen in some way."""

    def __init__(self, form: str, plainly: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.weight, self.bias = nn.Parameter(torch.randn(4, 4)), nn.Parameter(torch.randn(4))
        self.form, self.plainly = form, plainly

    def forward(self, x: Tensor) -> Tensor:
        weight = {"plain": self.weight, "turned": self.weight.t(), "twice": 2 * self.weight,
                  "masked": self.weight * torch.eye(4, dtype=x.dtype)}[self.form]  # fmt: skip
        z = nn.functional.linear(x, weight, self.bias)
        return z if self.plainly else z * 1.0


@pytest.mark.parametrize("form", ["plain", "turned", "twice", "masked"])
def test_last_layer__closed_form_is_that_of_the_rows(form: str) -> None:
    x = torch.randn(6, 4, dtype=F64)
    for structure in ("diagonal", "kfac", "ekfac"):
        closed, by_rows = (
            fk.ExactFisher(Head(form, plainly).double(), (x, None), structure=structure) for plainly in (True, False)
        )
        torch.testing.assert_close(closed.to_dense(), by_rows.to_dense(), rtol=1e-9, atol=1e-12)


def test_batch_axis__layers_that_are_written_to_in_place_keep_it() -> None:
    """Activations in place are usual; they must not cost a backward pass more."""
    from fisherkit.rows.record import Recorder
    from fisherkit.rows.watched import Watched

    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True), nn.Linear(4, 3)).double()
    space, batch = fk.ParameterSpace.of(model, None), fk.data.Batch.of((torch.randn(5, 4, dtype=F64), None), "")
    names = {id(p): name for name, p in model.named_parameters()}
    assert len(space.names) == 4
    assert Watched.of(model, Recorder(names, batch.size, batch.leaves()[0]), batch).regular
