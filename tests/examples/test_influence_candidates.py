"""What the influence experiments try beside the package's structures, against dense matrices in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import fisherkit as fk
from examples.influence.candidates import Candidate, fit

N, DAMPING = 12, 0.5


class Dense:
    """A small perceptron's gradients and exact Fisher by autograd, flat order as the model's."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(5, 4), nn.GELU(), nn.Linear(4, 3)).double()
        self.train = torch.randn(N, 5).double(), torch.randint(3, (N,))
        self.queries = torch.randn(4, 5).double(), torch.randint(3, (4,))
        rows = []
        for x in self.train[0]:
            z = self.model(x)
            p = z.detach().softmax(0)
            root = torch.linalg.eigh(torch.diag(p) - torch.outer(p, p))
            half = root.eigenvectors * root.eigenvalues.clamp_min(0).sqrt()
            rows += [self._flat((z * v).sum()) for v in half.mT]
        self.rows = torch.stack(rows)
        self.fisher = self.rows.mT @ self.rows / N
        self.sizes = [4 * 5 + 4, 3 * 4 + 3]

    def _flat(self, value: Tensor) -> Tensor:
        found = torch.autograd.grad(value, list(self.model.parameters()), retain_graph=True)
        return torch.cat([g.flatten() for g in found])

    def gradients(self, pair: tuple[Tensor, Tensor]) -> Tensor:
        return torch.stack(
            [self._flat(nn.functional.cross_entropy(self.model(x[None]), y[None])) for x, y in zip(*pair, strict=True)]
        )

    def scores(self, matrix: Tensor) -> Tensor:
        """With the whole of F + B."""
        return self.gradients(self.queries) @ torch.linalg.solve(matrix, self.gradients(self.train).mT) / N


@pytest.fixture(scope="module")
def dense() -> Dense:
    return Dense()


def close(candidate: Candidate, dense: Dense, matrix: Tensor) -> None:
    found = fit(candidate, dense.model, dense.train)(dense.queries, DAMPING)
    torch.testing.assert_close(found, dense.scores(matrix), rtol=1e-8, atol=1e-12)


def test_fit__is_the_damped_fisher(dense: Dense) -> None:
    damping = DAMPING * dense.fisher.trace() / len(dense.fisher)
    close(Candidate(fk.ExactFisher), dense, dense.fisher + damping * torch.eye(len(dense.fisher), dtype=torch.float64))


@pytest.mark.parametrize("blocks", [False, True])
def test_by_layer__damps_each_layer_by_its_own_mean(dense: Dense, blocks: bool) -> None:
    parts = dense.fisher.diagonal().split(dense.sizes)
    damping = torch.cat([DAMPING * part.mean().expand(len(part)) for part in parts])
    matrix = dense.fisher.clone()
    if blocks:
        first = dense.sizes[0]
        matrix[:first, first:] = matrix[first:, :first] = 0
    close(Candidate(fk.ExactFisher, by_layer=True, blocks=blocks), dense, matrix + torch.diag(damping))


def test_keep__keeps_the_largest_rows(dense: Dense) -> None:
    found = fk.ExactFisher(dense.model, dense.train).gram()
    kept = fk.ExactFisher(dense.model, dense.train, max_rows=N)
    assert float(kept.trace()) == pytest.approx(float(found.diagonal().topk(N).values.sum()))
    matrix = kept.to_dense()
    damping = DAMPING * matrix.trace() / len(matrix)
    close(Candidate(fk.ExactFisher, keep=1), dense, matrix + damping * torch.eye(len(matrix), dtype=torch.float64))


def test_floor__adds_ekfac(dense: Dense) -> None:
    ekfac = fk.ExactFisher(dense.model, dense.train, structure="ekfac").to_dense()
    damping = DAMPING * dense.fisher.trace() / len(dense.fisher)
    matrix = 0.7 * dense.fisher + 0.3 * ekfac + damping * torch.eye(len(ekfac), dtype=torch.float64)
    close(Candidate(fk.ExactFisher, floor=0.3), dense, matrix)


def test_kronecker__adds_kfac_with_factored_damping(dense: Dense) -> None:
    inputs = [dense.train[0], dense.model[:2](dense.train[0]).detach()]
    pairs = []
    start = 0
    for a, size in zip(inputs, dense.sizes, strict=True):
        with_bias = torch.cat([a, torch.ones(N, 1).double()], 1)
        outputs = size // with_bias.shape[1]
        g = dense.rows[:, start + size - outputs : start + size]  # a bias's gradient is its output's
        pairs.append((with_bias.mT @ with_bias / N, g.mT @ g / N))
        start += size
    root = (DAMPING * sum(a.trace() * g.trace() for a, g in pairs) / len(dense.fisher)) ** 0.5
    blocks = []
    for a, g in pairs:
        ratio = ((a.trace() / len(a)) / (g.trace() / len(g))) ** 0.5
        left = 0.3**0.5 * g + root / ratio * torch.eye(len(g), dtype=torch.float64)
        right = 0.3**0.5 * a + root * ratio * torch.eye(len(a), dtype=torch.float64)
        place = torch.arange(len(a) * len(g)).view(len(g), len(a))
        order = torch.cat([place[:, :-1].flatten(), place[:, -1]])  # weight, then bias
        blocks.append(torch.kron(left, right)[order][:, order])
    close(Candidate(fk.ExactFisher, kronecker=0.3), dense, dense.fisher + torch.block_diag(*blocks))
