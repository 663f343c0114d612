"""Nearest Kronecker products, against the leading singular pair of each layer's dense block, rearranged."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fisherkit as fk
from fisherkit.structures import nkp
from tests import by_hand

KINDS = [fk.EmpiricalFisher, fk.ExactFisher]


class Transposed(nn.Module):
    """A layer with its weight stored as [I, O]."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(inputs, outputs) / 2), nn.Parameter(torch.randn(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x, self.weight)


def task(name: str, batches: int = 3) -> tuple[nn.Module, list[tuple[Tensor, Tensor]]]:
    """A small model in float64, and batches of data."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layers: dict[str, nn.Module] = {
            "linear": nn.Sequential(nn.Linear(4, 3, bias=False), nn.Tanh(), nn.Linear(3, 3, bias=False)),
            "biased": nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 3)),
            "transposed": nn.Sequential(Transposed(4, 3), nn.Tanh(), Transposed(3, 3)),
            "conv": nn.Sequential(nn.Conv2d(1, 2, 2), nn.Tanh(), nn.Flatten(), nn.Linear(8, 3)),
            "narrow_conv": nn.Sequential(nn.Conv2d(1, 1, 1), nn.Tanh(), nn.Flatten(), nn.Linear(9, 3)),
            "positions": nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(6, 3)),
        }
        shape = {"conv": (1, 3, 3), "narrow_conv": (1, 3, 3), "positions": (2, 4)}.get(name, (4,))
        data = [(torch.randn(5 + i, *shape).double(), torch.randint(3, (5 + i,))) for i in range(batches)]
        return layers[name].double(), data


def blocks(model: nn.Module, dense: Tensor) -> list[tuple[Tensor, int, int]]:
    """Each layer's block in the order [O, I + 1], with O and I + 1, of a matrix in flat order."""
    found, start = [], 0
    for layer in model:
        if not list(layer.parameters()):
            continue
        weight, bias = layer.weight, layer.bias
        outputs = weight.shape[1] if isinstance(layer, Transposed) else weight.shape[0]
        index = torch.arange(start, start + weight.numel()).reshape(weight.shape)
        index = index.T if isinstance(layer, Transposed) else index.flatten(1)
        start += weight.numel()
        if bias is not None:
            index = torch.cat([index, torch.arange(start, start + outputs)[:, None]], 1)
            start += outputs
        found.append((dense[index.flatten()][:, index.flatten()], outputs, index.shape[1]))
    return found


def nearest(block: Tensor, outputs: int, width: int) -> Tensor:
    """The nearest G ⊗ A to a block over [outputs, width], by the singular value decomposition."""
    rearranged = block.reshape(outputs, width, outputs, width).transpose(1, 2).reshape(outputs**2, width**2)
    u, s, v = torch.linalg.svd(rearranged)
    return s[0] * torch.kron(u[:, 0].reshape(outputs, outputs), v[0].reshape(width, width))


def expected_blocks(model: nn.Module, full: Tensor) -> list[Tensor]:
    return [nearest(*block) for block in blocks(model, full)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["linear", "biased", "transposed", "conv", "narrow_conv", "positions"])
def test_build__is_the_nearest_product_of_each_block(name: str, kind: type[fk.FisherApproximation]) -> None:
    model, data = task(name)
    full = kind(model, data).to_dense()
    found = kind(model, data, structure="nkp")
    for (block, _, _), expected in zip(blocks(model, found.to_dense()), expected_blocks(model, full), strict=True):
        torch.testing.assert_close(block, expected, rtol=1e-6, atol=1e-7 * float(expected.norm()))
        assert float(torch.linalg.eigvalsh(block).min()) > -1e-12 * float(block.norm())
    assert {entry.structure for entry in found.coverage().entries} == {"nkp"}


def test_build__is_never_farther_than_kfac() -> None:
    model, data = task("positions")
    full = fk.ExactFisher(model, data).to_dense()
    own = [blocks(model, fk.ExactFisher(model, data, structure=s).to_dense()) for s in ("nkp", "kfac")]
    for (block, _, _), (ours, _, _), (kfac, _, _) in zip(blocks(model, full), *own, strict=True):
        assert float((ours - block).norm()) <= float((kfac - block).norm())


def test_build__reads_the_data_again_where_rows_do_not_fit() -> None:
    model, data = task("biased")
    kept = fk.ExactFisher(model, data, structure="nkp")
    read = fk.ExactFisher(model, data, structure="nkp", memory_budget=1200)
    torch.testing.assert_close(read.to_dense(), kept.to_dense(), rtol=1e-7, atol=1e-10)


def test_build__says_where_it_has_not_converged(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nkp, "MOST", 3)
    model, data = task("biased")
    with pytest.warns(fk.NotConvergedWarning, match='structure="nkp": after 3 passes'):
        fk.ExactFisher(model, data, structure="nkp")


def test_average__is_nearest_to_the_sum_of_both() -> None:
    model, data = task("biased", batches=2)
    preconditioner = fk.optim.Preconditioner(model, kind="exact", structure="nkp", damping=0.1, ema=0.7)
    for x, y in data:
        model.zero_grad()
        F.cross_entropy(model(x), y).backward()
        preconditioner.step()
    parts = [expected_blocks(model, fk.ExactFisher(model, batch).to_dense()) for batch in data]
    model_gradient = torch.autograd.grad(F.cross_entropy(model(data[1][0]), data[1][1]), list(model.parameters()))
    start = 0
    for i, (first, second) in enumerate(zip(*parts, strict=True)):
        weight, bias = model_gradient[start : start + 2]
        start += 2
        g = torch.cat([weight, bias[:, None]], 1)
        matrix = nearest(0.7 * first + 0.3 * second, *g.shape) + 0.1 * torch.eye(g.numel()).double()
        step = torch.linalg.solve(matrix, g.flatten()).reshape(g.shape)
        layer = model[2 * i]
        found = torch.cat([layer.weight.grad, layer.bias.grad[:, None]], 1)
        torch.testing.assert_close(found, step, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("options", [{}, {"ema": 0.5, "refresh_every": 2}, {"ema": 0.5, "max_rank": 2}])
def test_optimizer__goes_on_bit_for_bit(options: dict[str, float]) -> None:
    ends = []
    for stop in (False, True):
        model, data = task("biased")
        optimizer = fk.optim.NaturalGradient(model, 0.2, kind="ief", structure="nkp", damping=0.1, **options)
        for number, (x, y) in enumerate(data * 2):
            if stop and number == 3:
                state = optimizer.state_dict()
                optimizer.close()
                optimizer = fk.optim.NaturalGradient(model, 0.2, kind="ief", structure="nkp", damping=0.1, **options)
                optimizer.load_state_dict(state)
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()
        ends.append(by_hand.weights(model))
    assert torch.equal(*ends)


def test_file__comes_back(tmp_path: Path) -> None:
    model, data = task("conv")
    fisher = fk.ExactFisher(model, data, structure="nkp")
    fisher.save(tmp_path / "f.safetensors")
    torch.testing.assert_close(fk.load(tmp_path / "f.safetensors").to_dense(), fisher.to_dense())


def test_applications__take_it() -> None:
    (first, data), (second, _) = task("biased"), task("biased")
    with torch.no_grad():
        for p in second.parameters():
            p.add_(0.1 * torch.ones_like(p).cumsum(0))
    fishers = [fk.ExactFisher(model, data, structure="nkp") for model in (first, second)]
    matrices = [fisher.to_dense() for fisher in fishers]
    eye = torch.eye(len(matrices[0])).double()

    penalty = fk.continual.EWC(first, strength=2.0, normalize=None)
    penalty.consolidate(fishers[0])
    change = by_hand.weights(second) - by_hand.weights(first)
    with torch.no_grad():
        for p, q in zip(first.parameters(), second.parameters(), strict=True):
            p.copy_(q)
    torch.testing.assert_close(penalty.penalty().detach(), change @ matrices[0] @ change)

    first, _ = task("biased")
    merged = fk.merging.merge([first, second], fishers, damping=1e-3, normalize=None, output_damping=0.0)
    total, ends = (matrices[0] + matrices[1]) / 2, (by_hand.weights(first), by_hand.weights(second))
    weighed = (matrices[0] @ ends[0] + matrices[1] @ ends[1]) / 2 + 1e-3 * (ends[0] + ends[1]) / 2
    expected = torch.linalg.solve(total + 1e-3 * eye, weighed)
    found = torch.cat([merged[name].flatten() for name in fishers[0].space.names])
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)

    x, y = data[0]
    J = by_hand.rows(second, (x, y))
    scores = fk.influence.InfluenceScores(fishers[1], second, damping=0.1).scores((x[:2], y[:2]), (x, y))
    expected = J[:2] @ torch.linalg.solve(matrices[1] + 0.1 * eye, J.T) / fishers[1].examples
    torch.testing.assert_close(scores, expected, rtol=1e-7, atol=1e-9)
