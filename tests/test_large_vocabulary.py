"""Outputs over a large vocabulary are not held more often than a training step holds them."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
import torch

import fisherkit as fk
from examples.vocabulary import GOAL, peak
from fisherkit import likelihoods
from fisherkit.likelihoods import Categorical

SIZE = 8192, 8, 128


@functools.cache
def training_step() -> int:
    """Bytes."""
    return peak("train", *SIZE)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the system does not tell a process's peak")
@pytest.mark.parametrize("fisher", ["ef:ekfac", "sf:ekfac"])
def test_peak__is_about_a_training_step_s(fisher: str) -> None:
    assert peak(fisher, *SIZE) <= GOAL * training_step()


def test_draws__do_not_depend_on_how_many_are_made_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(5, 3, 7, 11, generator=generator)
    uniform = torch.rand(5, 3, 7, 1, generator=generator, dtype=torch.float64)
    whole = Categorical().sample(z, uniform)
    cumulative = z.double().softmax(-1).cumsum(-1)
    assert torch.equal(whole, torch.searchsorted(cumulative, uniform).squeeze(-1).clamp_max(10))
    for most in (1, 20, 300):
        monkeypatch.setattr(likelihoods, "AT_ONCE", most)
        assert torch.equal(Categorical().sample(z, uniform), whole)


def test_masked_gradient__is_not_mistaken_for_another_view_of_it() -> None:
    """A kind that turns the gradient's axes has its vectors masked by their own positions."""

    class Turned(fk.OutputRule):
        kind_name = "turned"

        def output_vectors(self, outputs: fk.Outputs) -> fk.OutputVectors:
            return fk.OutputVectors(outputs.gradient().mT.unsqueeze(1))

    torch.manual_seed(0)
    model, x = torch.nn.Linear(4, 3).double(), torch.randn(5, 3, 4, dtype=torch.float64)
    y = torch.tensor([[0, -100, 2]] * 5)
    found = fk.FisherApproximation(model, (x, y), Turned()).to_dense()
    z = model(x).detach()
    u = z.softmax(-1) - torch.nn.functional.one_hot(y.clamp_min(0), 3)
    v = (u * (y != -100).unsqueeze(-1)).mT * (y != -100).unsqueeze(-1)
    rows = torch.cat([torch.einsum("btc,bti->bci", v, x).flatten(1), v.sum(1)], 1)
    assert torch.allclose(found, rows.T @ rows / 5, rtol=1e-12)
