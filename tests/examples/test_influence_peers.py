"""Other libraries in the influence experiments: left out where they are missing, right where they are not."""

from __future__ import annotations

import importlib.util
from functools import partial

import pytest
import torch
from torch import Tensor, nn

import fisherkit as fk
from examples.influence import peers
from examples.influence.dattri_peer import dattri_trak
from examples.influence.methods import methods
from examples.influence.scorer import Method, needed, seed_of
from examples.influence.traker_peer import traker

N, DAMPING = 20, 0.5
UNPROJECTED = {"dattri": partial(dattri_trak, None), "traker": partial(traker, None)}


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 6), nn.GELU(), nn.Linear(6, 3))


def data(count: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(count)
    return torch.randn(count, 5, generator=generator), torch.randint(3, (count,), generator=generator)


def installed(library: str) -> None:
    if library in peers.missing():
        pytest.skip(f"{library} is not installed")


@pytest.mark.parametrize("gone", peers.METHODS)
def test_peers__leave_out_what_is_not_installed(gone: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == peers.MODULES[gone] else object())
    assert peers.missing() == [gone]
    others = {name for library, own in peers.METHODS.items() if library != gone for name in own}
    assert set(peers.peers()) == others
    assert others <= set(methods())
    assert set(peers.UNDAMPED) <= {name for own in peers.METHODS.values() for name in own}


@pytest.mark.parametrize("library", UNPROJECTED)
def test_unprojected_trak__is_its_formula(library: str, model: nn.Module) -> None:
    installed(library)
    train, queries = data(N), data(4)

    def rows(pair: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Gradients of the margin, and 1 − p."""
        found, wrong = [], []
        for x, y in zip(*pair, strict=True):
            p = model(x).softmax(0)[y]
            grads = torch.autograd.grad((p / (1 - p)).log(), list(model.parameters()))
            found.append(torch.cat([g.flatten() for g in grads]))
            wrong.append(1 - p.detach())
        return torch.stack(found).double(), torch.stack(wrong).double()

    (j, r), (q, s) = rows(train), rows(queries)
    damping = DAMPING * j.square().sum() / j.shape[1]
    inverse = torch.linalg.inv(j.mT @ j + damping * torch.eye(j.shape[1], dtype=torch.float64))
    expected = s[:, None] * (q @ inverse @ j.mT) * r
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = UNPROJECTED[library](model, train)(queries, DAMPING).double()
    # A library may choose its scale.
    torch.testing.assert_close(found / found.norm(), expected / expected.norm(), rtol=1e-3, atol=1e-5)
    assert (found * expected).sum() > 0
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("library", UNPROJECTED)
def test_unprojected_trak__is_nearly_ief(library: str, model: nn.Module) -> None:
    """Its rows are the gradients over 1 − p, the improved empirical Fisher's over their norm, up to √2 times that."""
    installed(library)
    train, queries = data(N), data(4)
    fisher = fk.ImprovedEmpiricalFisher(model, train, structure="full")
    relative = fk.RelativeDamping(DAMPING)
    ours = fk.influence.InfluenceScores(fisher, model, likelihood="categorical", examples=N, damping=relative)
    found = UNPROJECTED[library](model, train)(queries, DAMPING)
    both = torch.stack([found.flatten().double(), ours.scores(queries, train).flatten().double()])
    assert torch.corrcoef(both)[0, 1] > 0.98


@pytest.mark.parametrize("name", [name for own in peers.METHODS.values() for name in own])
def test_peers__score_every_pair_and_keep_the_model(name: str, model: nn.Module) -> None:
    found: Method | None = peers.peers().get(name)
    if found is None:
        pytest.skip("not installed")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    scorer = found(model, data(N))
    damping = None if name in peers.UNDAMPED else DAMPING
    scores = scorer(data(4), damping)
    assert scores.shape == (4, N)
    if "dimensions" not in name:  # more than examples: singular
        assert torch.isfinite(scores).all()
        with pytest.raises(ValueError, match="damping"):
            scorer(data(4), None if damping else DAMPING)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_seed_of__depends_on_the_parameters(model: nn.Module) -> None:
    first = seed_of(model)
    assert seed_of(model) == first
    with torch.no_grad():
        next(model.parameters()).mul_(2)
    assert seed_of(model) != first


def test_needed__refuses_none() -> None:
    assert needed(0.5) == 0.5
    with pytest.raises(ValueError, match="needs a damping"):
        needed(None)
