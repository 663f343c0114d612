"""Graphs: nodes as examples are refused with advice, and the advice works."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fisherkit as fk

NODES = 12
ADVICE = r'a graph as one element of the batch.*example="token"'


def adjacency() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    a = (torch.rand(NODES, NODES, generator=generator) < 0.3).double() + torch.eye(NODES, dtype=torch.float64)
    return a / a.sum(1, keepdim=True)


class Dense(nn.Module):
    """Means over neighbours, of a graph that the model knows, before a layer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(5, 3).double()
        self.register_buffer("a", adjacency())

    def forward(self, x: Tensor) -> Tensor:
        return self.a @ self.layer(x)  # type: ignore[operator]


class One(Dense):
    """The same, of a batch that is one graph."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x[0])[None]


class Edges(nn.Module):
    """Sums over edges, given beside the nodes."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(5, 3).double()

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        return torch.zeros(len(x), 3, dtype=x.dtype).index_add(0, edges[1], self.layer(x)[edges[0]])


def data() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(NODES, 5, dtype=torch.float64, generator=generator)
    edges = torch.cat([torch.arange(NODES).expand(2, -1), torch.randint(NODES, (2, 30), generator=generator)], 1)
    return x, edges, torch.randint(3, (NODES,), generator=generator)


@pytest.mark.parametrize("structure", ["full", "kfac"])
def test_nodes__as_examples_are_refused_with_advice(structure: str) -> None:
    x, edges, y = data()
    with pytest.raises(fk.DataError, match=ADVICE):
        fk.EmpiricalFisher(Dense(), (x, y), structure=structure)
    with pytest.raises(fk.DataError, match=ADVICE):
        fk.EmpiricalFisher(Edges(), ((x, edges), y), structure=structure)


def test_nodes__as_examples_of_an_optimizer_are_refused_with_advice() -> None:
    x, edges, _ = data()
    model = Edges()
    optimizer = fk.optim.NaturalGradient(model, lr=1.0, damping=1.0)
    with pytest.raises(fk.DataError, match=ADVICE):
        model(x, edges)
    optimizer.close()


def test_nodes__that_only_influence_each_other_are_refused_with_advice() -> None:
    class Mean(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x - x.mean(0))

    x, _, y = data()
    with pytest.raises(fk.ModelError, match='example="token"'):
        fk.EmpiricalFisher(Mean(5, 3).double(), (x, y))


@pytest.mark.parametrize("form", [Dense, One])
@pytest.mark.parametrize("kind", [fk.EmpiricalFisher, fk.ImprovedEmpiricalFisher, fk.ExactFisher], ids=str)
def test_graph__as_one_element_of_the_batch_has_a_row_a_node(kind: Any, form: type[Dense]) -> None:
    """By one autograd call for each node; nodes without a label do not count."""
    x, _, y = data()
    y = y.clone()
    y[:4] = -100
    model = Dense()
    fisher = kind(form(), (x[None], y[None]), example="token")
    total: Any = 0
    for node in range(4, NODES):
        z = model(x)[node]
        p = z.detach().softmax(0)
        u = p - nn.functional.one_hot(y[node], 3)
        h = p.diag() - torch.outer(p, p)
        metric = {
            "ef": torch.outer(u, u), "ief": torch.outer(u, u) / (u @ u), "exact": h
        }[fisher.metadata["kind"]]  # fmt: skip
        own = [torch.autograd.grad(out, list(model.parameters()), retain_graph=True) for out in z]
        jacobian = torch.stack([torch.cat([g.flatten() for g in row]) for row in own])
        total = total + jacobian.T @ metric @ jacobian
    assert fisher.examples == NODES - 4
    torch.testing.assert_close(fisher.to_dense(), total / (NODES - 4))


def test_failing_model__says_its_own_words() -> None:
    class Failing(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            raise RuntimeError("no such thing")

    x, _, y = data()
    with pytest.raises(RuntimeError, match="no such thing") as caught:
        fk.EmpiricalFisher(Failing(5, 3).double(), (x, y))
    assert not isinstance(caught.value, fk.FisherkitError)
