"""Where the classes are: the last axis, axis 1 as in torch's own losses, or an error that asks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fisherkit as fk
from fisherkit.likelihoods import Categorical

ASKS = r"class_axis=-1\) if they are the last axis, or class_axis=1"
KINDS: dict[str, tuple[Any, dict[str, Any], bool]] = {
    "ef": (fk.EmpiricalFisher, {}, True),
    "ief": (fk.ImprovedEmpiricalFisher, {}, True),
    "truncated": (fk.TruncatedFisher, {}, True),
    "exact": (fk.ExactFisher, {}, False),
    "sf": (fk.SampledFisher, {"draws": 3}, False),
}


class Last(nn.Module):
    """A model with its classes moved to the end."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x).movedim(1, -1)


def conv(length: int, classes: int = 5) -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    model = nn.Conv1d(2, classes, 3, padding=1).double()
    return model, torch.randn(6, 2, length, dtype=torch.float64), torch.randint(classes, (6, length))


def images() -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.Tanh(), nn.Conv2d(4, 3, 1)).double()
    return model, torch.randn(5, 2, 4, 3, dtype=torch.float64), torch.randint(3, (5, 4, 3))


@pytest.mark.parametrize(
    ("case", "kind", "example"),
    [*(("(B, C, L)", kind, "sequence") for kind in KINDS), *(("(B, C, H, W)", kind, "token") for kind in KINDS),
     ("(B, C, C)", "truncated", "sequence"), ("(B, C, C)", "exact", "token")],
)  # fmt: skip
def test_axis_1__is_what_the_model_with_its_classes_moved_last_has(case: str, kind: str, example: str) -> None:
    model, x, y = {"(B, C, L)": lambda: conv(9), "(B, C, C)": lambda: conv(5), "(B, C, H, W)": images}[case]()
    make, options, needs = KINDS[kind]
    y = y.clone()
    y[0, 1] = -100
    right = make(Last(model), (x, y), likelihood=Categorical(class_axis=-1), example=example, **options)
    for likelihood in (Categorical(class_axis=1), nn.CrossEntropyLoss()):
        found = make(model, (x, y), likelihood=likelihood, example=example, **options)
        assert found.examples == right.examples
        torch.testing.assert_close(found.to_dense(), right.to_dense())
        kfac = make(model, (x, y), likelihood=likelihood, example=example, structure="kfac", **options)
        moved = make(
            Last(model), (x, y), likelihood=Categorical(class_axis=-1), example=example, structure="kfac", **options
        )
        torch.testing.assert_close(kfac.diagonal(), moved.diagonal())
    if not needs:
        right = make(Last(model), (x, None), likelihood=Categorical(class_axis=-1), example=example, **options)
        found = make(model, (x, None), likelihood=nn.CrossEntropyLoss(), example=example, **options)
        torch.testing.assert_close(found.to_dense(), right.to_dense())


@pytest.mark.parametrize("kind", KINDS)
def test_default__asks_where_labels_fit_both_ways(kind: str) -> None:
    model, x, y = conv(5)
    make, options, _ = KINDS[kind]
    with pytest.raises(fk.DataError, match=ASKS):
        make(model, (x, y), **options)
    with pytest.raises(fk.DataError, match=ASKS):
        fk.evaluation.loss_gradient(model, (x, y))


@pytest.mark.parametrize("length", [5, 9])
@pytest.mark.parametrize("kind", ["exact", "sf"])
def test_default__asks_without_labels_unless_positions_stay_on_axis_1(kind: str, length: int) -> None:
    model, x, _ = conv(length)
    make, options, _ = KINDS[kind]
    with pytest.raises(fk.DataError, match=ASKS):
        make(model, (x, None), **options)
    strided = nn.Conv1d(2, 5, 3, stride=2).double()
    with pytest.raises(fk.DataError, match=ASKS):
        make(strided, (x, None), **options)


@pytest.mark.parametrize("inputs", ["features", "tokens", "several"])
@pytest.mark.parametrize("kind", KINDS)
def test_default__takes_a_models_positions_from_its_inputs(kind: str, inputs: str) -> None:
    """As Hugging Face's models have them, also where there are as many positions as classes."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.embedding, self.layer = nn.Embedding(7, 3).double(), nn.Linear(3, 4).double()

        def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
            return self.layer(x if x.is_floating_point() else self.embedding(x))

    x = torch.randint(7, (6, 4)) if inputs != "features" else torch.randn(6, 4, 3, dtype=torch.float64)
    y = torch.randint(4, (6, 4))
    arguments: Any = (x, torch.ones(6, 4)) if inputs == "several" else x
    model = Model()
    make, options, needs = KINDS[kind]
    params = ["layer.weight", "layer.bias"]
    for targets in (y, *([] if needs else [None])):
        found = make(model, (arguments, targets), params=params, **options)
        chosen = make(model, (arguments, targets), params=params, likelihood=Categorical(class_axis=-1), **options)
        torch.testing.assert_close(found.to_dense(), chosen.to_dense())


def test_torchs_loss__with_classes_last_says_how_to_name_them() -> None:
    torch.manual_seed(0)
    model, x = nn.Linear(3, 4).double(), torch.randn(6, 5, 3, dtype=torch.float64)
    y = torch.randint(4, (6, 5))
    with pytest.raises(fk.DataError, match=r"axis 1 of the outputs.*Categorical\(class_axis=-1\)"):
        fk.EmpiricalFisher(model, (x, y), likelihood=nn.CrossEntropyLoss())
    with pytest.raises(fk.DataError, match=ASKS):
        fk.ExactFisher(model, (x, None), likelihood=nn.CrossEntropyLoss())


def test_default__says_how_to_name_classes_on_axis_1() -> None:
    model, x, y = conv(9)
    with pytest.raises(fk.DataError, match=r"Categorical\(class_axis=1\)"):
        fk.EmpiricalFisher(model, (x, y))
    model, x, y = images()
    with pytest.raises(fk.DataError, match=r"Categorical\(class_axis=1\)"):
        fk.EmpiricalFisher(model, (x, y))


def test_shifted_labels__go_with_either_axis() -> None:
    model, x, y = conv(9)
    found = fk.EmpiricalFisher(model, (x, y), likelihood=nn.CrossEntropyLoss(), shift_labels=True)
    right = fk.EmpiricalFisher(Last(model), (x, y), shift_labels=True)
    torch.testing.assert_close(found.to_dense(), right.to_dense())


class Letters(nn.Module):
    """As many features as classes, so that neither inputs nor labels tell where as many positions are."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(4, 4).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def batches(*lengths: int) -> list[tuple[Tensor, Tensor]]:
    torch.manual_seed(1)
    return [(torch.randn(3, n, 4).double(), torch.randint(4, (3, n))) for n in lengths]


@pytest.mark.parametrize("structure", ["full", "diagonal", "ekfac"])
@pytest.mark.parametrize("kind", KINDS)
def test_default__is_settled_by_the_first_batch(kind: str, structure: str) -> None:
    make, options, _ = KINDS[kind]
    model, data, default = Letters(), batches(6, 4, 5), Categorical()
    right = make(model, data, likelihood=Categorical(class_axis=-1), structure=structure, **options)
    for likelihood in ("categorical", default):
        found = make(model, data, likelihood=likelihood, structure=structure, **options)
        torch.testing.assert_close(found.to_dense(), right.to_dense())
    # What one model's data have settled says nothing of another's.
    with pytest.raises(fk.DataError, match=ASKS):
        make(model, data[1:], likelihood=default, structure=structure, **options)


def test_default__is_settled_in_all_that_follows(tmp_path: Path) -> None:
    model, data = Letters(), batches(6, 4)
    torch.testing.assert_close(
        fk.evaluation.loss_gradient(model, data),
        fk.evaluation.loss_gradient(model, data, likelihood=Categorical(class_axis=-1)),
    )
    with pytest.raises(fk.DataError, match=ASKS):
        fk.evaluation.loss_gradient(model, data[1:])
    fisher = fk.EmpiricalFisher(model, data, structure="kfac")
    right = fk.influence.InfluenceScores(fisher, model, likelihood=Categorical(class_axis=-1)).scores(data[1], data)
    torch.testing.assert_close(fk.influence.InfluenceScores(fisher, model).scores(data[1], data), right)
    fisher.save(tmp_path / "f.safetensors")
    loaded = fk.load(tmp_path / "f.safetensors")
    torch.testing.assert_close(fk.influence.InfluenceScores(loaded, model).scores(data[1], data), right)
    ewc = fk.continual.EWC(model)
    ewc.consolidate(fisher)
    optimizer = fk.optim.NaturalGradient(model, lr=0.1, damping=1e-2)
    for x, y in reversed(data):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x).flatten(0, 1), y.flatten()).backward()
        optimizer.step()
    assert bool(ewc.penalty() > 0)
