"""EWC and the optimizer's step: the largest rate that is stable, and the warning where a run is not."""

from __future__ import annotations

import math
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fisherkit as fk
from fisherkit.continual import EWC
from tests.small_data import mlp
from tests.test_continual import STRUCTURES, learned, move, task


def kept(structure: str = "kfac", strength: float = 1.0) -> tuple[nn.Module, EWC]:
    """A model that has consolidated one task and stands off its centre."""
    model = mlp()
    ewc = EWC(model, strength)
    ewc.consolidate(fk.ImprovedEmpiricalFisher(model, task(0), structure=structure))
    move(model, 1)
    return model, ewc


def train(model: nn.Module, ewc: EWC, optimizer: torch.optim.Optimizer, steps: int, data: bool = True) -> list[float]:
    """The penalties on the way."""
    x, y = task(1)
    values = []
    for _ in range(steps):
        penalty = ewc.penalty()
        values.append(float(penalty.detach()))
        optimizer.zero_grad()
        ((F.cross_entropy(model(x), y) if data else 0.0) + penalty).backward()
        optimizer.step()
    return values


@pytest.mark.parametrize("structure", STRUCTURES)
def test_largest_stable_lr__is_where_gradient_descent_on_one_task_begins_to_diverge(structure: str) -> None:
    ends = []
    for factor in (0.98, 1.02):
        model, ewc = kept(structure, strength=0.7)
        optimizer = torch.optim.SGD(model.parameters(), lr=factor * ewc.largest_stable_lr())
        values = train(model, ewc, optimizer, 15, data=False)
        ends.append([b / a for a, b in zip(values[-4:], values[-3:], strict=False)])
    assert all(ratio < 1 for ratio in ends[0])
    assert all(ratio > 1 for ratio in ends[1])


@pytest.mark.parametrize("structure", STRUCTURES)
def test_largest_stable_lr__is_safe_for_several_tasks(structure: str) -> None:
    _, ewc, reference = learned(
        lambda model, t: fk.ImprovedEmpiricalFisher(model, task(t), structure=structure), tasks=3, decay=0.6
    )
    total = sum(0.6**age * len(F) / F.trace() * F for age, (F, _) in enumerate(reversed(reference)))
    true = 2 / (ewc.strength * float(torch.linalg.eigvalsh(total)[-1]))
    rate = ewc.largest_stable_lr()
    if structure in ("kfac", "ekfac"):
        assert true / 3 < rate <= true * (1 + 1e-9)
    else:
        assert rate == pytest.approx(true, rel=1e-6)


def test_largest_stable_lr__is_infinite_without_a_penalty() -> None:
    model = mlp()
    assert EWC(model).largest_stable_lr() == math.inf
    _, ewc = kept(strength=0.0)
    assert ewc.largest_stable_lr() == math.inf


@pytest.mark.parametrize("factor", [1.2, 4.0, 1e4])
def test_penalty__warns_once_where_a_run_diverges(factor: float) -> None:
    model, ewc = kept(strength=3.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=factor * ewc.largest_stable_lr())
    with pytest.warns(UserWarning, match=r"too long .*largest_stable_lr\(\), which strength=3 is part of") as record:
        train(model, ewc, optimizer, 64)
    assert sum("largest_stable_lr" in str(w.message) for w in record) == 1
    assert record[0].filename == __file__


def test_penalty__warns_of_a_rate_that_is_raised_late_and_again_after_a_consolidation() -> None:
    model, ewc = kept()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1 * ewc.largest_stable_lr())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(model, ewc, optimizer, 100)
    for _ in range(2):
        optimizer.param_groups[0]["lr"] = 2 * ewc.largest_stable_lr()
        with pytest.warns(UserWarning, match="largest_stable_lr"):
            train(model, ewc, optimizer, 160)
        model.load_state_dict(mlp().state_dict())
        ewc.consolidate(fk.ImprovedEmpiricalFisher(model, task(0), structure="kfac"))


@pytest.mark.parametrize(
    "make",
    [
        lambda p, lr: torch.optim.SGD(p, lr=0.9 * lr),
        lambda p, lr: torch.optim.SGD(p, lr=lr, momentum=0.9),
        lambda p, lr: torch.optim.Adam(p, lr=1e-2),
        lambda p, lr: torch.optim.AdamW(p, lr=1e-4),
    ],
)
@pytest.mark.parametrize("strength", [1e-2, 1.0, 1e4])
def test_penalty__is_silent_in_runs_that_are_stable(make: Any, strength: float) -> None:
    model = mlp()
    ewc = EWC(model, strength)
    ewc.consolidate(fk.ImprovedEmpiricalFisher(model, task(0), structure="kfac"))
    optimizer = make(model.parameters(), ewc.largest_stable_lr() if strength > 0.1 else 0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(model, ewc, optimizer, 260)
