"""Bad input to influence scores, with its message."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import fisherkit as fk
from fisherkit.influence import InfluenceScores
from tests.small_data import X, Y, mlp

DATA = (X, Y)
VALUES = (X, torch.zeros(7, 3).double())


SWITCHES = X, torch.ones(len(X), 3).double()


def made(**options: Any) -> InfluenceScores:
    model = mlp()
    return InfluenceScores(fk.EmpiricalFisher(model, DATA), model, **options)


def with_metadata(**changes: str) -> tuple[Any, nn.Module]:
    model = mlp()
    fisher = fk.EmpiricalFisher(model, DATA)
    fisher.metadata.update(changes)
    return fisher, model


def without_grad(z: Tensor, _: Tensor | None) -> Tensor:
    return torch.zeros(len(z))


def dropping() -> DataLoader[Any]:
    return DataLoader(TensorDataset(*DATA), batch_size=3, drop_last=True)


CASES: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "fisher": (lambda: InfluenceScores(torch.eye(3), mlp()), fk.InvalidTypeError, "a Tensor as fisher"),
    "model": (lambda: InfluenceScores(fk.EmpiricalFisher(mlp(), DATA), 3), fk.InvalidTypeError, "an? int as model"),
    "other names": (lambda: InfluenceScores(fk.EmpiricalFisher(mlp(), DATA), nn.Linear(4, 3).double()),
        fk.UnknownParameterError, r"a Fisher over \['0.weight'"),
    "other shapes": (lambda: InfluenceScores(fk.EmpiricalFisher(mlp(), DATA),
            nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()), fk.InvalidArgumentError,
        r"'0.weight': \[5, 4\] and not \[6, 4\]"),
    "other dtype": (lambda: InfluenceScores(fk.EmpiricalFisher(mlp(), DATA), mlp().float()), fk.InvalidTypeError,
        r"a Fisher of torch.float64; .*Try: the model in torch.float64"),
    "other values": (lambda: InfluenceScores(*with_metadata(parameters_hash="0" * 64)), fk.ModelError,
        "not those that the Fisher"),
    "own likelihood": (lambda: InfluenceScores(*with_metadata(likelihood="weibull")), fk.InvalidArgumentError,
        "named 'weibull'"),
    "likelihood": (lambda: made(likelihood="softmax"), fk.InvalidArgumentError, "softmax"),
    "damping": (lambda: made(damping=-1.0), fk.InvalidArgumentError, "damping -1.0"),
    "singular": (lambda: made(damping=0.0), fk.SingularMatrixError, "singular"),
    "examples": (lambda: made(examples=0), fk.InvalidArgumentError, "examples=0"),
    "no labels": (lambda: made().scores((X, None), DATA), fk.DataError, "queries: got no targets"),
    "no train labels": (lambda: made().scores(DATA, (X, None)), fk.DataError, "no targets"),
    "soft margin": (lambda: made(likelihood="bernoulli").scores((X, torch.full((len(X), 3), 0.3).double()), SWITCHES,
            measurement="margin"), fk.DataError, "a bernoulli likelihood with class probabilities"),
    "no margin": (lambda: made(likelihood="gaussian").scores(VALUES, VALUES, measurement="margin"), fk.DataError,
        "a gaussian likelihood"),
    "measurement": (lambda: made().scores(DATA, DATA, measurement="accuracy"), fk.InvalidArgumentError,
        "one of .'loss', 'margin'"),
    "measurement type": (lambda: made().scores(DATA, DATA, measurement=3), fk.InvalidTypeError, "an? int"),
    "measurement shape": (lambda: made().scores(DATA, DATA, measurement=lambda z, _: z), fk.InvalidArgumentError,
        "one number for each"),
    "measurement value": (lambda: made().scores(DATA, DATA, measurement=lambda z, _: 3.0), fk.InvalidTypeError,
        "a float"),
    "measurement graph": (lambda: made().scores(DATA, DATA, measurement=without_grad), fk.InvalidArgumentError,
        "without a graph"),
    "measurement infinite": (lambda: made().scores(DATA, DATA, measurement=lambda z, _: (z[:, 0] - z[:, 0]).sqrt()),
        fk.NonFiniteError, "NaN"),
    "by": (lambda: made().scores(DATA, DATA, by="layer"), fk.InvalidArgumentError, "by='layer'"),
    "normalize": (lambda: made().scores(DATA, DATA, normalize="cosine"), fk.InvalidArgumentError, "normalize='cosine'"),
    "token with groups": (lambda: made().scores(DATA, DATA, by="token", groups=torch.zeros(7, dtype=torch.long)),
        fk.InvalidArgumentError, "whole examples"),
    "relatif with groups": (
        lambda: made().scores(DATA, DATA, normalize="relatif", groups=torch.zeros(7, dtype=torch.long)),
        fk.InvalidArgumentError, "one example's own"),
    "groups short": (lambda: made().scores(DATA, DATA, groups=torch.zeros(6, dtype=torch.long)),
        fk.InvalidArgumentError, "6. for 7"),
    "groups long": (lambda: made().scores(DATA, dropping(), groups=torch.zeros(7, dtype=torch.long)),
        fk.InvalidArgumentError, "7. for 6"),
    "prepare by": (lambda: made().prepare(DATA, by="tokens"), fk.InvalidArgumentError,
        r"by='tokens'; expected one of \[None, 'token'"),
    "groups float": (lambda: made().scores(DATA, DATA, groups=torch.zeros(7)), fk.InvalidTypeError, "torch.float32"),
    "groups negative": (lambda: made().scores(DATA, DATA, groups=torch.full((7,), -1)), fk.InvalidArgumentError,
        "group -1"),
    "k": (lambda: made().top(DATA, DATA, 0), fk.InvalidArgumentError, "k=0"),
    "k large": (lambda: made().top(DATA, DATA, 8), fk.InvalidArgumentError, "7 training examples"),
    "prepared": (lambda: (i := made()).scores(DATA, i.prepare(DATA), by="token"), fk.InvalidArgumentError,
        "with by=None"),
    "budget": (lambda: made(memory_budget=0), fk.InvalidArgumentError, "memory_budget=0"),
    "chunk": (lambda: made(chunk_size=0), fk.InvalidArgumentError, "chunk_size=0"),
    "empty": (lambda: made().scores([], DATA), fk.DataError, "no batch"),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_bad_input__is_refused_with_a_reason(case: str) -> None:
    call, error, message = CASES[case]
    with pytest.raises(error, match=message):
        call()


def test_prepared_rows__of_another_model_parameters_or_loss_are_refused(tmp_path: Path) -> None:
    own, other = made(), mlp()
    with torch.no_grad():
        next(other.parameters()).add_(0.1)
    part = fk.EmpiricalFisher(own._model_rows.model, DATA, params=["0.weight"])
    smooth = fk.likelihoods.Categorical(label_smoothing=0.1)
    for scores, named in (
        (InfluenceScores(fk.EmpiricalFisher(other, DATA), other), "parameters_hash"),
        (InfluenceScores(part, own._model_rows.model), "space"),
        (made(likelihood=smooth), "likelihood"),
    ):
        for rows in (own.prepare(DATA), own.prepare(DATA, folder=tmp_path / "rows")):
            with pytest.raises(fk.InvalidArgumentError, match=f"rows prepared with different {named};"):
                scores.scores(DATA, rows)
            with pytest.raises(fk.InvalidArgumentError, match=f"different {named}"):
                scores.self_influence(rows)


def test_groups_of_a_wrong_number__are_refused_before_anything_is_computed() -> None:
    influence, calls = made(), 0

    def measurement(z: Tensor, _: Tensor | None) -> Tensor:
        nonlocal calls
        calls += 1
        return z[:, 0]

    for train in (DATA, influence.prepare(DATA)):
        with pytest.raises(fk.InvalidArgumentError, match=r"\[6\] for 7"):
            influence.scores(DATA, train, groups=torch.zeros(6, dtype=torch.long), measurement=measurement)
    assert calls == 0


def test_train_mode__is_refused() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.Dropout(0.5)).double().eval()
    influence = InfluenceScores(fk.EmpiricalFisher(model, DATA), model)
    model.train()
    with pytest.raises(fk.ModelError, match="Dropout"):
        influence.scores(DATA, DATA)


def test_scores__refuse_a_model_that_has_changed_since_and_loaders_that_shuffle() -> None:
    torch.manual_seed(0)
    model, data = nn.Linear(4, 3), (torch.randn(12, 4), torch.randint(3, (12,)))
    influence = fk.influence.InfluenceScores(fk.EmpiricalFisher(model, data), model)
    rows = influence.prepare(data)
    loader = DataLoader(TensorDataset(*data), batch_size=4, shuffle=True)
    with pytest.raises(fk.DataError, match="shuffles"):
        influence.scores(data, loader)
    with torch.no_grad():
        model.weight.mul_(2)
    for call in (
        lambda: influence.scores(data, data), lambda: influence.scores(data, rows),
        lambda: influence.top(data, rows, 2), lambda: influence.self_influence(data),
        lambda: influence.leverages(data), lambda: influence.prepare(data),
    ):  # fmt: skip
        with pytest.raises(fk.ModelError, match="have changed since"):
            call()
