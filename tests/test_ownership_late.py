"""Whose entries are: batches that nothing tells apart, and positions that are apart."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fisherkit as fk
from tests import by_hand
from tests.test_fixed_cost import passes

F64 = torch.float64


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


class Sides(nn.Module):
    """Examples of two sorts apart, each with one table of places that the first two do not share."""

    def __init__(self) -> None:
        super().__init__()
        self.places, self.head = nn.Embedding(5, 2), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        z, high = x.new_zeros(len(x), 3), x[:, 0] > 0.15
        for part, scale in ((high, 1.0), (~high, 0.5)):
            h = torch.tanh(x[part].unflatten(1, (2, 2)) + self.places(torch.arange(2)))
            z = z.index_put((part.nonzero().squeeze(1),), scale * self.head(h.flatten(1)))
        return z


@pytest.mark.parametrize("net", [Swapping, Parted, Recurrent, Unbatched, Rolled, Sides])
@pytest.mark.parametrize("chunk_size", [None, 4, 3, 1])
def test_fisher__is_the_reference_s(net: type[nn.Module], chunk_size: int | None) -> None:
    torch.manual_seed(0)
    model, x = net().double(), torch.randn(7, 4, dtype=F64)
    x[:, 0] = torch.tensor([0.1, 0.2, 0.9, -0.5, 0.4, -0.7, 0.3])
    expected = by_hand.fisher(model, (x, None), "gaussian")
    fisher = fk.ExactFisher(model, (x, None), likelihood="gaussian", chunk_size=chunk_size)
    torch.testing.assert_close(fisher.to_dense(), expected, rtol=1e-9, atol=1e-11)


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
    assert Watched.of(model, Recorder(names, batch.size, batch.batched), batch).regular


# -- positions that nothing mixes are examples of their own ------------------------------------------------------------


V, T = 11, 5
TOKENS = torch.randint(V, (6, T), generator=torch.Generator().manual_seed(0))
LABELS = torch.randint(V, (6, T), generator=torch.Generator().manual_seed(1))
LABELS[0, 1] = LABELS[3] = -100


class Words(nn.Module):
    """Embedding, a residual block at every position, and a head over a vocabulary."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.up, self.down = nn.Embedding(V, 4), nn.Linear(4, 8), nn.Linear(8, 4)
        self.norm, self.head = nn.LayerNorm(4), nn.Linear(4, V)

    def mixed(self, x: Tensor) -> Tensor:
        """What else happens to the positions."""
        return x

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.mixed(self.embed(tokens))
        z: Tensor = self.head(self.norm(x + self.down(F.gelu(self.up(x)))))
        return z


class Merged(Words):
    def mixed(self, x: Tensor) -> Tensor:
        return (2 * x.flatten(0, 1)).unflatten(0, (-1, T))


class Placed(Words):
    def __init__(self) -> None:
        super().__init__()
        self.place = nn.Parameter(torch.zeros(T, 4))

    def mixed(self, x: Tensor) -> Tensor:
        return x + self.place


class Turned(Words):
    def forward(self, tokens: Tensor) -> Tensor:
        return super().forward(tokens.mT.contiguous()).transpose(0, 1)

    def mixed(self, x: Tensor) -> Tensor:
        return x.sin()


class Summed(Words):
    def mixed(self, x: Tensor) -> Tensor:
        return x.cumsum(1)


class Averaged(Words):
    def mixed(self, x: Tensor) -> Tensor:
        return x + x.mean(1, keepdim=True)


class Moved(Words):
    def mixed(self, x: Tensor) -> Tensor:
        return x + torch.roll(x, 1, 1)


class Attending(Words):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)

    def mixed(self, x: Tensor) -> Tensor:
        return x + self.attention(x, x, x)[0]


class Recurring(Words):
    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.GRU(4, 4, batch_first=True)

    def mixed(self, x: Tensor) -> Tensor:
        y: Tensor = self.rnn(x)[0]
        return y


class Tied(Words):
    def __init__(self) -> None:
        super().__init__()
        self.head.weight = self.embed.weight


class Twice(Words):
    def forward(self, tokens: Tensor) -> Tensor:
        return super().forward(tokens) + self.head(self.embed(tokens))


APART, MIXED = (Words, Merged), (Placed, Turned, Summed, Averaged, Moved, Attending, Recurring, Tied, Twice)


def matrix(model: nn.Module, exact: bool, examples: int) -> Tensor:
    """F, one backward pass for every vector of every position that counts."""
    rows: list[Tensor] = []
    for tokens, labels in zip(TOKENS, LABELS, strict=True):
        z = model(tokens[None])[0]
        for out, label in zip(z, labels, strict=True):
            if label == -100:
                continue
            p = out.softmax(0).detach()
            vectors = (p - F.one_hot(label, V)).unsqueeze(0)
            if exact:
                values, basis = torch.linalg.eigh(torch.diag(p) - p.outer(p))
                vectors = (basis * values.clamp_min(0).sqrt()).mT
            rows += [by_hand.gradient(out, model, v) for v in vectors]
    return torch.stack(rows).mT @ torch.stack(rows) / examples


BATCHES = {
    "one": (TOKENS, LABELS), "several": [(TOKENS[:1], LABELS[:1]), (TOKENS[1:3], LABELS[1:3]), (TOKENS[3:], LABELS[3:])]
}  # fmt: skip


@pytest.mark.parametrize("batches", BATCHES)
@pytest.mark.parametrize("make", [*APART, *MIXED])
def test_tokens__are_those_of_one_backward_pass_each(make: Callable[[], Words], batches: str) -> None:
    model = make().double().eval()
    expected = matrix(model, False, int((LABELS != -100).sum()))
    options: dict[str, Any] = {"example": "token"}
    full = fk.EmpiricalFisher(model, BATCHES[batches], storage="rows", **options)
    torch.testing.assert_close(full.to_dense(), expected)
    diagonal = fk.EmpiricalFisher(model, BATCHES[batches], structure="diagonal", **options)
    torch.testing.assert_close(diagonal.diagonal(), expected.diagonal())


class RolledWords(Twice):
    """The same function of its parameters, in which positions are seen to be apart in no batch."""

    def forward(self, tokens: Tensor) -> Tensor:
        z: Tensor = super().forward(tokens)
        return z.roll(1, 1).roll(-1, 1)


@pytest.mark.parametrize("kind", ["ef", "exact"])
def test_kfac__of_layers_used_twice_counts_what_it_counts_elsewhere(kind: str) -> None:
    own, other = (
        fk.FisherApproximation(make().double().eval(), BATCHES["one"], kind, structure="kfac", example="token")
        for make in (Twice, RolledWords)
    )
    torch.testing.assert_close(own.to_dense(), other.to_dense())


@pytest.mark.parametrize("make", [*APART, *MIXED])
@pytest.mark.parametrize("example", ["sequence", "token"])
def test_exact__diagonal_is_that_of_one_backward_pass_an_output(make: Callable[[], Words], example: str) -> None:
    model, counted = make().double().eval(), LABELS != -100
    number = int(counted.sum() if example == "token" else counted.any(1).sum())
    fisher = fk.ExactFisher(model, BATCHES["several"], structure="diagonal", example=example)
    torch.testing.assert_close(fisher.diagonal(), matrix(model, True, number).diagonal())
    assert (fisher.examples, fisher.rows) == (number, int(counted.sum()) * (V - 1))


def classifier() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 3), nn.Tanh(), nn.Linear(3, V)).double()


class Bent(nn.Module):
    """The same with an identity behind the last layer that no closed form looks through."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = classifier()

    def forward(self, x: Tensor) -> Tensor:
        z: Tensor = self.inner(x)
        return z * 1.0


LOSSES: dict[str, tuple[Any, Tensor]] = {
    "categorical": ("categorical", torch.randint(V, (7,))),
    "weighted": (nn.CrossEntropyLoss(weight=torch.rand(V).double(), label_smoothing=0.1), torch.randint(V, (7,))),
    "bernoulli": ("bernoulli", torch.randint(2, (7, V)).double()),
    "positives": (nn.BCEWithLogitsLoss(pos_weight=torch.rand(V).double()), torch.randint(2, (7, V)).double()),
    "gaussian": ("gaussian", torch.randn(7, V).double()),
}


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("structure", ["diagonal", "kfac", "ekfac"])
def test_exact__below_a_head_is_what_it_is_elsewhere(structure: str, loss: str) -> None:
    likelihood, targets = LOSSES[loss]
    data = (torch.randn(7, 6, generator=torch.Generator().manual_seed(0)).double(), targets)
    own, other = (fk.ExactFisher(m, data, likelihood=likelihood, structure=structure) for m in (classifier(), Bent()))
    torch.testing.assert_close(own.to_dense(), other.to_dense())
    assert own.rows == other.rows


class Refilled:
    """Batches that all come in the same two tensors."""

    def __init__(self, batches: list[tuple[Tensor, Tensor]]) -> None:
        self.batches, self.raw = batches, tuple(part.clone() for part in batches[0])

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        for batch in self.batches:
            for own, part in zip(self.raw, batch, strict=True):
                own.copy_(part)
            yield self.raw


@pytest.mark.parametrize("params", [None, ["2.weight", "2.bias"]], ids=["all", "last"])
@pytest.mark.parametrize("structure", ["diagonal", "kfac", "ekfac"])
def test_exact__of_batches_in_one_memory(structure: str, params: list[str] | None) -> None:
    loss, generator = LOSSES["weighted"][0], torch.Generator().manual_seed(0)
    data = [
        (torch.randn(3, 6, generator=generator).double(), torch.randint(V, (3,), generator=generator)) for _ in range(3)
    ]
    own, other = (
        fk.ExactFisher(classifier(), batches, likelihood=loss, structure=structure, params=params)
        for batches in (data, Refilled(data))
    )
    torch.testing.assert_close(own.to_dense(), other.to_dense())


def test_backward_passes__one_for_all_tokens_and_none_for_every_output(monkeypatch: pytest.MonkeyPatch) -> None:
    model, data = Words().double().eval(), BATCHES["one"]
    for build in (
        lambda: fk.EmpiricalFisher(model, data, example="token", structure="diagonal"),
        lambda: fk.ExactFisher(model, data, structure="kfac"),
    ):
        build()
        with passes(model, monkeypatch) as (forwards, backwards):
            build()
        assert forwards == {6: 1}
        assert len(backwards) == 1  # of all vectors at once where there are several


@pytest.mark.parametrize("structure", ["full", "diagonal", "block", "kfac", "ekfac", "nkp"])
def test_structures__of_a_bias_that_comes_before_its_weight(structure: str) -> None:
    class Layer(nn.Module):
        def __init__(self, first: str) -> None:
            super().__init__()
            torch.manual_seed(0)
            values = {"weight": torch.randn(3, 4).double(), "bias": torch.randn(3).double()}
            for name in sorted(values, key=lambda name: name != first):
                self.register_parameter(name, nn.Parameter(values[name]))

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, self.weight, self.bias)

    torch.manual_seed(0)
    data = torch.randn(9, 4).double(), torch.randint(3, (9,))
    usual, other = (
        fk.EmpiricalFisher(Layer(first), data, structure=structure).to_dense() for first in ("weight", "bias")
    )
    order = torch.cat([torch.arange(12, 15), torch.arange(12)])
    torch.testing.assert_close(other, usual[order][:, order])


class Masked(Words):
    """Takes an attention mask, as a language model's batches have one."""

    def forward(self, tokens: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return super().forward(tokens)


@pytest.mark.parametrize("structure", ["diagonal", "kfac", "ekfac"])
def test_attention_mask__that_only_later_batches_of_one_have(structure: str) -> None:
    model, mask = Masked().double().eval(), torch.ones(6, T, dtype=torch.long)
    mask[4, 2:] = mask[5, 1:] = 0
    several = [({"tokens": TOKENS[:4]}, LABELS[:4])]
    several += [({"tokens": TOKENS[i : i + 1], "attention_mask": mask[i : i + 1]}, LABELS[i : i + 1]) for i in (4, 5)]
    masked = [({"tokens": TOKENS[c], "attention_mask": mask[c]}, LABELS[c]) for c in (slice(4), slice(4, 6))]
    options: dict[str, Any] = {"structure": structure, "example": "token"}
    found = fk.EmpiricalFisher(model, several, **options)
    v = torch.randn(found.size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    torch.testing.assert_close(found @ v, fk.EmpiricalFisher(model, masked, **options) @ v)
