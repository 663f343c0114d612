"""One parameter under several rules: a head tied to its embedding, tables and linear layers of one weight."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import fisherkit as fk
from fisherkit import optim
from fisherkit.influence import InfluenceScores
from fisherkit.rows import base, factored, summed
from fisherkit.rows.base import StoredRows
from fisherkit.rows.factored import FactoredRows
from fisherkit.rows.sparse import SparseRows
from fisherkit.rows.summed import SumRows
from fisherkit.testing import check_fisher

VOCABULARY, WIDTH = 23, 4


class Tied(nn.Module):
    """A language model whose head is its embedding, with a bias of its own."""

    def __init__(self, vocabulary: int = VOCABULARY) -> None:
        super().__init__()
        self.embed, self.body = nn.Embedding(vocabulary, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, vocabulary)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(torch.tanh(self.body(self.embed(ids))).cumsum(1)).mean(1)


class TwoTables(Tied):
    """An encoder and a decoder whose embeddings are the head's weight, one with a padding token."""

    def __init__(self) -> None:
        super().__init__()
        del self.head

    def forward(self, ids: Tensor) -> Tensor:
        source = F.embedding(ids, self.embed.weight, padding_idx=1).mean(1, keepdim=True)
        return F.linear(torch.tanh(self.body(self.embed(ids.flip(1)) + source)), self.embed.weight).sum(1)


class TwoLayers(nn.Module):
    """Two linear layers of one weight with biases of their own, and the weight the other way round."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 3)
        self.second.weight = self.first.weight
        self.embed = nn.Embedding(VOCABULARY, WIDTH)

    def forward(self, ids: Tensor) -> Tensor:
        h = torch.tanh(self.second(torch.tanh(self.first(self.embed(ids)))))
        return self.head(torch.addmm(h.new_zeros(WIDTH), h.mean(1), self.first.weight))


class TiedMatrix(nn.Module):
    """A table that is also the weight of a layer stored the other way round."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.up = nn.Embedding(VOCABULARY, WIDTH), nn.Linear(WIDTH, VOCABULARY)
        self.bias, self.head = nn.Parameter(torch.zeros(WIDTH)), nn.Linear(WIDTH, 3)

    def forward(self, ids: Tensor) -> Tensor:
        h = torch.tanh(self.up(self.embed(ids)))
        down = torch.addmm(self.bias, h.flatten(0, 1), self.embed.weight).unflatten(0, ids.shape)
        return self.head(torch.tanh(down)).mean(1)


class Transposed(Tied):
    """The head multiplies by the table's transpose."""

    def __init__(self) -> None:
        super().__init__()
        del self.head

    def forward(self, ids: Tensor) -> Tensor:
        return (torch.tanh(self.body(self.embed(ids))).cumsum(1) @ self.embed.weight.T).mean(1)


MODELS: dict[str, tuple[Callable[[], nn.Module], int, str]] = {
    "tied": (Tied, VOCABULARY, "embed.weight"),
    "two tables": (TwoTables, VOCABULARY, "embed.weight"),
    "two layers": (TwoLayers, 3, "first.weight"),
    "by its transpose": (Transposed, VOCABULARY, "embed.weight"),
    "stored both ways": (TiedMatrix, 3, "embed.weight"),
}


def problem(name: str, lengths: tuple[int, ...] = (3, 5)) -> tuple[nn.Module, list[tuple[Tensor, Tensor]]]:
    torch.manual_seed(0)
    make, classes, _ = MODELS[name]
    model = make().double()
    data = [(torch.randint(VOCABULARY, (4, t)), torch.randint(classes, (4,))) for t in lengths]
    return model, data


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=1e-8)


def gradients(model: nn.Module, value: Tensor) -> Tensor:
    return torch.cat(
        [g.flatten() for g in torch.autograd.grad(value, list(model.parameters()), materialize_grads=True)]
    )


def brute_force(model: nn.Module, data: list[tuple[Tensor, Tensor]], kind: str) -> Tensor:
    """The Fisher by one autograd call a row."""
    total, count = torch.zeros(0), 0
    for x, y in data:
        for ids, label in zip(x, y, strict=True):
            p = model(ids[None])[0].softmax(0).detach()
            each = [(int(label), 1.0)] if kind == "empirical" else [(c, float(p[c])) for c in range(len(p))]
            for c, weight in each:
                row = gradients(model, F.cross_entropy(model(ids[None]), torch.tensor([c])))
                total = total + weight * torch.outer(row, row) if count else weight * torch.outer(row, row)
                count += 1
    return total / sum(len(y) for _, y in data)


def rules(fisher: fk.Fisher) -> dict[str, str]:
    return {name: entry.rule for entry in fisher.coverage().entries for name in entry.parameters}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("kind", ["empirical", "exact"])
def test_fisher__of_a_shared_parameter_is_autograd_s(name: str, kind: str, tmp_path: Path) -> None:
    model, data = problem(name)
    make = fk.EmpiricalFisher if kind == "empirical" else fk.ExactFisher
    expected = brute_force(model, data, kind)
    full = make(model, data)
    close(full.to_dense(), expected)
    assert "+" in rules(full)[MODELS[name][2]]
    assert not {"loop", "torch.func"}.intersection(rules(full).values())
    close(make(model, data, structure="diagonal").diagonal(), expected.diagonal())
    v = torch.randn(len(expected), 2, dtype=torch.float64)
    close(make(model, data, memory_budget=20_000) @ v, expected @ v)
    full.save(tmp_path / "fisher.safetensors")
    close(fk.load(tmp_path / "fisher.safetensors").to_dense(), expected)
    block = make(model, data, structure="block").to_dense()
    close(block[block != 0], expected[block != 0])


@pytest.mark.parametrize("kind", ["ef", "exact"])
def test_fisher__is_conformant_in_every_structure(kind: str) -> None:
    make = fk.EmpiricalFisher if kind == "ef" else fk.ExactFisher
    model, data = problem("tied")
    for structure in ("full", "block", "diagonal", "kfac", "ekfac"):
        fisher = make(model, data, structure=structure)
        check_fisher(fisher, fisher.to_dense())


def test_sampled__is_of_its_own_draws() -> None:
    model, data = problem("tied")
    drawn = fk.SampledFisher(model, data, draws=2, seed=0)
    diagonal = fk.SampledFisher(model, data, draws=2, seed=0, structure="diagonal").diagonal()
    close(diagonal, drawn.to_dense().diagonal())
    close(fk.SampledFisher(model, data, draws=2, seed=0, memory_budget=20_000).diagonal(), diagonal)


@pytest.mark.parametrize("structure", ["kfac", "ekfac"])
def test_kronecker__is_the_exact_diagonal_of_a_tied_weight_and_says_so(structure: str) -> None:
    torch.manual_seed(0)
    model = Tied(80).double()
    data = [(torch.randint(80, (4, t)), torch.randint(80, (4,))) for t in (3, 5)]
    fisher = fk.EmpiricalFisher(model, data, structure=structure)
    close(fisher.diagonal()[: 80 * WIDTH], brute_force(model, data, "empirical").diagonal()[: 80 * WIDTH])
    entry = next(e for e in fisher.coverage().entries if "embed.weight" in e.parameters)
    assert "diagonal" in entry.structure
    assert entry.rule == "embedding + linear"


def test_rows__of_a_batch_that_uses_one_of_two_are_right() -> None:
    class Sometimes(Tied):
        def forward(self, ids: Tensor) -> Tensor:
            if ids.shape[1] == 4:  # an example of zeros, with nothing looked up
                return F.linear(torch.tanh(self.body.bias).expand(len(ids), WIDTH), self.embed.weight)
            return super().forward(ids)

    torch.manual_seed(0)
    model = Sometimes().double()
    data = [(torch.randint(VOCABULARY, (3, t)), torch.randint(VOCABULARY, (3,))) for t in (3, 4)]
    expected = brute_force(model, data, "empirical")
    fisher = fk.EmpiricalFisher(model, data)
    close(fisher.to_dense(), expected)
    close(fk.EmpiricalFisher(model, data, structure="diagonal").diagonal(), expected.diagonal())


def test_influence__scores_are_those_of_the_gradients() -> None:
    model, data = problem("tied", (4,))
    (x, y), damping = data[0], 0.1
    scores = InfluenceScores(fk.EmpiricalFisher(model, data), model, damping=damping).scores(data[0], data[0])
    rows = torch.stack([gradients(model, F.cross_entropy(model(a[None]), b[None])) for a, b in zip(x, y, strict=True)])
    F_ = rows.mT @ rows / len(rows)
    own = rows @ torch.linalg.solve(F_ + damping * torch.eye(len(F_), dtype=F_.dtype), rows.mT)
    ratio = scores / own
    close(ratio, ratio.flatten()[0].expand_as(ratio))


def test_natural_gradient__a_step_is_damped_least_squares() -> None:
    model, data = problem("tied", (4,))
    x, y = data[0]
    rows = torch.stack([gradients(model, F.cross_entropy(model(a[None]), b[None])) for a, b in zip(x, y, strict=True)])
    before = torch.cat([p.detach().flatten() for p in model.parameters()])
    optimizer = optim.NaturalGradient(model, lr=0.5, damping=0.1, kind="ef")
    F.cross_entropy(model(x), y).backward()
    optimizer.step()
    step = before - torch.cat([p.detach().flatten() for p in model.parameters()])
    fisher = rows.mT @ rows / len(rows)
    expected = torch.linalg.solve(fisher + 0.1 * torch.eye(len(fisher), dtype=fisher.dtype), rows.mean(0))
    close(step, 0.5 * expected)


class Largest(TorchDispatchMode):
    """Notes the most entries of a tensor that is made."""

    entries = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(output):
            if isinstance(tensor, Tensor):
                self.entries = max(self.entries, tensor.numel())
        return output


def test_memory__no_row_over_the_table_is_made_for_each_example(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (base, factored, summed):
        monkeypatch.setattr(module, "TILE", 1 << 18)
    for name in ("WRITTEN", "CACHED"):
        monkeypatch.setattr(factored, name, 1 << 18)
    torch.manual_seed(0)
    vocabulary, examples = 1500, 24
    model = Tied(vocabulary)
    model.embed = nn.Embedding(vocabulary, 96)
    model.body, model.head.weight = nn.Linear(96, 96), model.embed.weight
    data = (torch.randint(vocabulary, (examples, 6)), torch.randint(vocabulary, (examples,)))
    v = torch.randn(sum(p.numel() for p in model.parameters()))
    with Largest() as made:
        fisher = fk.EmpiricalFisher(model, data)
        fisher @ v
        fisher.solve(v, damping=0.1)
        fk.EmpiricalFisher(model, data, structure="diagonal").diagonal()
    assert made.entries < examples * vocabulary * 96 / 3


# -- the rows themselves ----------------------------------------------------------------------------------------------


def parts(seed: int, rows: int = 6) -> SumRows:
    """A sparse part, two factored ones of different orientation, and one written out, over a table of 7 × 3."""
    torch.manual_seed(seed)

    def numbers(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float64)

    return SumRows(
        [
            SparseRows.gathered(torch.randint(7, (rows, 2)), numbers(rows, 2, 3), 7),
            FactoredRows(numbers(3, 2, 3), numbers(rows, 2, 7), torch.arange(rows) % 3, bias=False),
            FactoredRows(numbers(3, 4, 7), numbers(rows, 4, 3), torch.arange(rows) % 3, bias=False, transposed=True),
            SparseRows.gathered(torch.randint(7, (rows, 2)), numbers(rows, 2, 3), 7),
            StoredRows(numbers(rows, 21)),
        ]
    )


PAIRS = [(0, 1), (0, 2), (0, 3), (0, 4), (1, 2), (1, 4), (0, 1, 2, 3, 4), (3, 1), (0, 3, 4)]


@pytest.mark.parametrize("which", PAIRS)
def test_sum_rows__answer_as_the_dense_ones(which: tuple[int, ...]) -> None:
    rows, others = (SumRows([parts(seed).parts[i] for i in which]) for seed in (0, 1))
    own, dense = rows.dense(), sum(part.dense() for part in rows.parts)
    close(own, dense)
    u, w, weights = (torch.randn(shape, dtype=torch.float64) for shape in ((21, 2), (6, 2), (21,)))
    close(rows.matmul(u), own @ u)
    close(rows.rmatmul(w), own.mT @ w)
    close(rows.rmatmul(w, torch.empty(21, 2, dtype=torch.float64)), own.mT @ w)
    close(rows.gram(rows), own @ own.mT)
    close(rows.gram(others), own @ others.dense().mT)
    close(rows.gram(others, precise=False), own @ others.dense().mT)
    close(rows.squared_sum(), own.square().sum(0))
    close(rows.weighted_squares(weights), own.square() @ weights)
    order = torch.tensor([4, 1, 2])
    close(rows.reordered(order).compact().dense(), own[order])
    close(rows.reordered(order).squared_sum(), own[order].square().sum(0))
    close(SumRows.cat([rows, others]).dense(), torch.cat([own, others.dense()]))
    close(rows.scaled(2.0).dense(), 2 * own)
    close(SumRows.from_tensors(rows.tensors(), rows.options()).dense(), own)
    simplest = SumRows.of([parts(0).parts[i] for i in which])
    close(simplest.dense(), own)
