"""Positions that nothing mixes are examples of their own, and layers below many outputs need no vector of each."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fisherkit as fk
from tests.test_fixed_cost import passes

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
    rows, own = [], list(model.parameters())
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
            for v in vectors:
                found = torch.autograd.grad(out @ v, own, retain_graph=True)
                rows.append(torch.cat([g.flatten() for g in found]))
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


class Rolled(Twice):
    """The same function of its parameters, in which positions are seen to be apart in no batch."""

    def forward(self, tokens: Tensor) -> Tensor:
        z: Tensor = super().forward(tokens)
        return z.roll(1, 1).roll(-1, 1)


@pytest.mark.parametrize("kind", ["ef", "exact"])
def test_kfac__of_layers_used_twice_counts_what_it_counts_elsewhere(kind: str) -> None:
    own, other = (
        fk.FisherApproximation(make().double().eval(), BATCHES["one"], kind, structure="kfac", example="token")
        for make in (Twice, Rolled)
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
        (torch.randn(3, 6, generator=generator).double(), torch.randint(V, (3,), generator=generator))
        for _ in range(3)
    ]  # fmt: skip
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
