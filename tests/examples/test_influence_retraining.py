"""Retraining against an ordinary training loop, models to be scored, and what is refused."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fisherkit as fk
from examples.influence.evaluation import TrainingRecipe, retrain, train_models
from examples.influence.evaluation.training import epoch_orders
from tests.examples.retraining_cases import (
    ADAMW,
    F64,
    MASKS,
    QUERIES,
    SGD,
    TOKENS,
    TRAIN,
    WHOLE,
    N,
    Q,
    X,
    Y,
    halves,
    mlp,
    random,
)


class Convolution(nn.Module):
    """Keywords, a normalization, a frozen random layer, a buffer, dropout in eval mode, logits in an object."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv1d(1, 3, 3)
        self.norm, self.dropout, self.head = nn.BatchNorm1d(3), nn.Dropout(0.5), nn.Linear(9, 3)
        self.convolution.weight.requires_grad_(False)

    def forward(self, signal: Tensor) -> dict[str, Tensor]:
        hidden = self.dropout(torch.relu(self.norm(self.convolution(signal.unsqueeze(1)))))
        return {"logits": self.head(hidden.flatten(1))}


class Tied(nn.Module):
    """A weight that two layers use."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(6, 4)
        self.head = nn.Linear(4, 6, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.embedding(tokens))


Losses = Callable[[Tensor, Tensor], Tensor]


def alone(build: Callable[[int], nn.Module], inputs: Any, y: Tensor, recipe: TrainingRecipe, loss: Losses) -> Tensor:
    """Outputs of models trained one at a time by an ordinary loop, [S, R, Q] of −loss."""

    def at(index: Tensor | slice) -> Any:
        return {k: v[index] for k, v in inputs.items()} if isinstance(inputs, dict) else inputs[index]

    def call(model: nn.Module, x: Any) -> Tensor:
        z = model(**x) if isinstance(x, dict) else model(x)
        return z["logits"] if isinstance(z, dict) else z

    out = torch.empty(len(MASKS), 2, Q, dtype=F64)
    for s, mask in enumerate(MASKS):
        for r, seed in enumerate((3, 1)):
            with torch.random.fork_rng():
                torch.manual_seed(seed)
                model = build(seed)
            parameters = [p for p in model.parameters() if p.requires_grad]
            if recipe.optimizer == "sgd":
                optimizer: Any = torch.optim.SGD(
                    parameters, recipe.learning_rate, recipe.momentum, weight_decay=recipe.weight_decay
                )
            else:
                optimizer = torch.optim.AdamW(parameters, recipe.learning_rate, weight_decay=recipe.weight_decay)
            batch = recipe.batch_size or N
            total, done = recipe.epochs * -(-int(mask.sum()) // batch), 0
            for order in epoch_orders(seed, recipe.epochs, N):
                for index in order[mask[order]].split(batch):
                    if recipe.schedule == "linear":
                        optimizer.param_groups[0]["lr"] = recipe.learning_rate * (1 - done / total)
                    optimizer.zero_grad()
                    loss(call(model, at(index)), y[index]).mean().backward()
                    optimizer.step()
                    done += 1
            out[s, r] = -loss(call(model, at(slice(N, None))), y[N:]).detach()
    return out


def categorical(z: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(z, y, reduction="none")


def tokens(z: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(z.mT, y, reduction="none").sum(1)


def squared(z: Tensor, y: Tensor) -> Tensor:
    return 0.5 * (z - y).square().sum(1)


def binary(z: Tensor, y: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(z, y, reduction="none").sum(1)


def huber(z: Tensor, y: Tensor) -> Tensor:
    return F.huber_loss(z, y, reduction="none").sum(1)


CASES: dict[str, tuple[Callable[[int], nn.Module], Any, Tensor, Any, Losses]] = {
    "mlp": (mlp, X, Y, "categorical", categorical),
    "convolution": (lambda seed: Convolution().double().eval(), {"signal": X}, Y, "categorical", categorical),
    "tied": (lambda seed: Tied().double(), TOKENS, torch.where(TOKENS == 2, -100, TOKENS), "categorical", tokens),
    "regression": (mlp, X, random(N + Q, 3, seed=1), "gaussian", squared),
    "binary": (mlp, X, (random(N + Q, 3, seed=1) > 0).double(), "bernoulli", binary),
    "own": (mlp, X, random(N + Q, 3, seed=1), huber, huber),
}


@pytest.mark.parametrize(
    ("case", "recipe"),
    [*((case, SGD) for case in CASES), ("mlp", ADAMW), ("mlp", WHOLE), ("tied", ADAMW), ("convolution", WHOLE)],
)
def test_retrain__is_training_one_model_at_a_time(case: str, recipe: TrainingRecipe) -> None:
    build, inputs, y, likelihood, loss = CASES[case]
    train, queries = halves(inputs, y)
    got = retrain(build, train, queries, MASKS, recipe, seeds=(3, 1), likelihood=likelihood)
    torch.testing.assert_close(got.outputs["loss"], alone(build, inputs, y, recipe, loss), rtol=1e-8, atol=1e-10)
    assert got.train_losses.shape == (5, 2)
    assert got.seeds == (3, 1)


def test_retrain__does_not_depend_on_a_subsets_place() -> None:
    first = retrain(mlp, TRAIN, QUERIES, MASKS, SGD, seeds=(0, 5)).outputs["loss"]
    order = torch.tensor([2, 0, 4, 1, 3])
    moved = retrain(mlp, TRAIN, QUERIES, MASKS[order], SGD, seeds=(5, 0)).outputs["loss"]
    assert torch.equal(moved, first[order].flip(1))


class Branching(nn.Module):
    """Control flow that depends on the data, dropout and batch norm in train mode."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.Linear(8, 3)).double()

    def forward(self, x: Tensor) -> Tensor:
        z = self.layer(x)
        return z if z.sum() > 0 else -z


def test_retrain__takes_models_of_any_kind_and_measures_them_in_eval_mode() -> None:
    runs = [retrain(lambda seed: Branching(), TRAIN, QUERIES, MASKS, WHOLE, seeds=(0, 1)) for _ in range(2)]
    assert torch.equal(runs[0].outputs["loss"], runs[1].outputs["loss"])
    (model,) = train_models(lambda seed: Branching(), TRAIN, WHOLE, seeds=(1,), mask=MASKS[3])
    assert model.training
    expected = -categorical(model.eval()(QUERIES[0]), QUERIES[1])
    torch.testing.assert_close(runs[0].outputs["loss"][3, 1], expected.detach())


@pytest.mark.smoke
def test_retrain__is_deterministic_and_leaves_data_and_generators_alone() -> None:
    torch.manual_seed(3)
    before, x, y = torch.get_rng_state(), TRAIN[0].clone(), TRAIN[1].clone()
    runs = []
    for _ in range(2):
        runs.append(retrain(mlp, TRAIN, QUERIES, MASKS, ADAMW, seeds=(0, 1), measurements=("loss", "margin")))
        torch.rand(3)  # what the caller draws in between changes nothing
    for name in ("loss", "margin"):
        assert torch.equal(runs[0].outputs[name], runs[1].outputs[name])
    torch.set_rng_state(before)
    retrain(mlp, TRAIN, QUERIES, MASKS[:1], WHOLE, seeds=(0,))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(TRAIN[0], x)
    assert torch.equal(TRAIN[1], y)


def test_retrain__measures_margins_and_functions() -> None:
    def brier(z: Tensor, y: Tensor) -> Tensor:
        return (z.softmax(1) - F.one_hot(y, 3)).square().sum(1)

    losses = retrain(mlp, TRAIN, QUERIES, MASKS, SGD, seeds=(0,), measurements=("loss", "margin")).outputs
    p = losses["loss"].exp()
    torch.testing.assert_close(losses["margin"], (p / (1 - p)).log())
    own = retrain(mlp, TRAIN, QUERIES, MASKS, SGD, seeds=(0,), measurements={"brier": brier}).outputs
    assert own["brier"].shape == (5, 1, Q)
    assert bool((own["brier"] < 0).all())  # a loss; larger = better


@pytest.mark.parametrize("outputs", [1, 3])
def test_retrain__measures_margins_of_binary_outputs(outputs: int) -> None:
    def build(seed: int) -> nn.Module:
        return nn.Linear(5, outputs).double()

    train, queries = halves(X, (random(N + Q, outputs, seed=1) > 0).double())
    got = retrain(build, train, queries, MASKS, SGD, seeds=(0,), likelihood="bernoulli", measurements="margin")
    own = retrain(
        build, train, queries, MASKS, SGD, seeds=(0,), likelihood="bernoulli",
        measurements={"odds": lambda z, y: (torch.sigmoid(z) / torch.sigmoid(-z)).log().mul(1 - 2 * y).sum(1)},
    )  # fmt: skip
    torch.testing.assert_close(got.outputs["margin"], own.outputs["odds"])


def test_retrain__sums_margins_over_positions_that_count() -> None:
    labels = torch.where(TOKENS == 2, -100, TOKENS)
    train, queries = halves(TOKENS, labels)

    def odds(z: Tensor, y: Tensor) -> Tensor:
        p = z.softmax(-1).gather(-1, y.clamp_min(0).unsqueeze(-1)).squeeze(-1)
        return -torch.where(y >= 0, (p / (1 - p)).log(), 0).sum(1)

    runs = [
        retrain(lambda seed: Tied().double(), train, queries, MASKS, SGD, seeds=(0,), measurements=measurement)
        for measurement in ("margin", {"margin": odds})
    ]
    torch.testing.assert_close(runs[0].outputs["margin"], runs[1].outputs["margin"])


def test_retrain__takes_likelihoods_as_objects(tmp_path: Path) -> None:
    likelihood = fk.likelihoods.Categorical()
    options: dict[str, Any] = {"seeds": (0,), "measurements": ("loss", "margin"), "path": tmp_path / "runs"}
    by_name = retrain(mlp, TRAIN, QUERIES, MASKS, SGD, **options)
    by_object = retrain(mlp, TRAIN, QUERIES, MASKS, SGD, likelihood=likelihood, **options)  # the same run's file
    for name in ("loss", "margin"):
        assert torch.equal(by_object.outputs[name], by_name.outputs[name])
    ignoring = fk.likelihoods.Categorical(ignore_index=2)
    runs = [
        retrain(
            lambda seed: Tied().double(), *halves(TOKENS, y), MASKS, SGD, seeds=(0,), likelihood=own,
            measurements=("loss", "margin"),
        )
        for y, own in ((TOKENS, ignoring), (torch.where(TOKENS == 2, -100, TOKENS), likelihood))
    ]  # fmt: skip
    for name in ("loss", "margin"):
        torch.testing.assert_close(runs[0].outputs[name], runs[1].outputs[name])
    with pytest.raises(fk.errors.InvalidArgumentError, match="another"):
        retrain(mlp, TRAIN, QUERIES, MASKS, SGD, likelihood=ignoring, **options)


def test_retrain__refuses_a_likelihood_that_does_not_say_its_loss() -> None:
    class Own(fk.likelihoods.Gaussian):
        name = "own"

        def gradient(self, z: Tensor, target: Tensor) -> Tensor:
            return (z - target).clamp(-1, 1)

    with pytest.raises(fk.errors.InvalidArgumentError, match="an Own as likelihood"):
        retrain(mlp, *halves(X, random(N + Q, 3)), MASKS, SGD, likelihood=Own())


@pytest.mark.smoke
def test_retrain__sees_a_subset_and_nothing_else() -> None:
    """Other values outside the subset change nothing."""
    x = torch.where(MASKS[0].unsqueeze(1), TRAIN[0], 1e3)
    same = [retrain(mlp, (inputs, TRAIN[1]), QUERIES, MASKS[:1], SGD, seeds=(0,)) for inputs in (x, TRAIN[0])]
    assert torch.equal(same[0].outputs["loss"], same[1].outputs["loss"])
    torch.testing.assert_close(same[0].train_losses, same[1].train_losses)


# -- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"masks": MASKS[:, :9]}, fk.errors.InvalidArgumentError, "[S, 13]"),
        ({"masks": MASKS.long()}, fk.errors.InvalidTypeError, "random_subsets(N, S)"),
        ({"masks": MASKS & False}, fk.errors.InvalidArgumentError, "without examples"),
        ({"recipe": {"epochs": 3}}, fk.errors.InvalidTypeError, "TrainingRecipe"),
        ({"seeds": ()}, fk.errors.InvalidArgumentError, "seeds"),
        ({"seeds": (1, 1)}, fk.errors.InvalidArgumentError, "distinct"),
        ({"train": (X[:N], None)}, fk.errors.DataError, "no targets"),
        ({"train": X}, fk.errors.InvalidTypeError, "pair"),
        ({"likelihood": "weibull"}, fk.errors.InvalidArgumentError, "weibull"),
        ({"likelihood": 3}, fk.errors.InvalidTypeError, "int as likelihood"),
        ({"likelihood": "gaussian"}, fk.errors.DataError, "targets of the outputs' shape"),
        ({"measurements": "accuracy"}, fk.errors.InvalidArgumentError, "accuracy"),
        ({"measurements": ()}, fk.errors.InvalidArgumentError, "no measurements"),
        ({"measurements": {"a": 3}}, fk.errors.InvalidTypeError, "functions"),
        ({"build": lambda seed: seed}, fk.errors.InvalidTypeError, "returns a int"),
        ({"build": lambda seed: nn.Flatten()}, fk.errors.InvalidArgumentError, "require grad"),
        ({"recipe": TrainingRecipe(epochs=40, learning_rate=1e200)}, fk.errors.NonFiniteError, "of subset 0 from"),
    ],
)
def test_retrain__refuses(change: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments: dict[str, Any] = {
        "build": mlp, "train": TRAIN, "queries": QUERIES, "masks": MASKS, "recipe": SGD, "seeds": (0, 1), **change,
    }  # fmt: skip
    with pytest.raises(error, match=re.escape(message)):
        retrain(**arguments)


@pytest.mark.parametrize("size", [3, 4], ids=["as many pixels as classes", "more pixels"])
def test_retrain__refuses_images_whose_axis_of_classes_nothing_tells(size: int) -> None:
    train, queries = halves(random(N + Q, 1, size, size), torch.zeros(N + Q, size, size, dtype=torch.long))

    def build(seed: int) -> nn.Module:
        return nn.Conv2d(1, 3, 1).double()

    with pytest.raises(fk.errors.DataError, match=rf"outputs of shape \(B, 3, {size}, {size}\).*torch's own loss"):
        retrain(build, train, queries, MASKS, SGD, seeds=(0,))
    losses = [nn.CrossEntropyLoss(), fk.likelihoods.Categorical(class_axis=1)]
    runs = [retrain(build, train, queries, MASKS[:1], SGD, seeds=(0,), likelihood=loss) for loss in losses]
    assert torch.equal(runs[0].outputs["loss"], runs[1].outputs["loss"])


def test_retrain__refuses_margins_of_values() -> None:
    train, queries = halves(X, random(N + Q, 3))
    with pytest.raises(fk.errors.InvalidArgumentError, match="for this likelihood"):
        retrain(mlp, train, queries, MASKS, SGD, likelihood="gaussian", measurements="margin")


@pytest.mark.parametrize(
    "change",
    [
        {"epochs": 0}, {"epochs": 1.5}, {"learning_rate": 0}, {"learning_rate": float("nan")}, {"optimizer": "lbfgs"},
        {"momentum": 1.0}, {"weight_decay": -1}, {"batch_size": 0}, {"schedule": "cosine"},
        {"optimizer": "adamw", "momentum": 0.9},
    ],
)  # fmt: skip
def test_training_recipe__refuses(change: dict[str, Any]) -> None:
    with pytest.raises(fk.errors.InvalidArgumentError, match=f"{next(reversed(change))}="):
        TrainingRecipe(**{"epochs": 3, "learning_rate": 0.1, **change})


# -- models to be scored -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["convolution", "tied"])
def test_train_models__are_those_that_retrain_measures(case: str) -> None:
    build, inputs, y, _, loss = CASES[case]
    train, queries = halves(inputs, y)
    runs = retrain(build, train, queries, MASKS, SGD, seeds=(3, 1))
    for s, mask in ((2, None), (0, MASKS[0])):  # subset 2 is everything
        models = train_models(build, train, SGD, seeds=(3, 1), mask=mask)
        for r, model in enumerate(models):
            z = model(**queries[0]) if isinstance(queries[0], dict) else model(queries[0])
            got = -loss(z["logits"] if isinstance(z, dict) else z, queries[1])
            torch.testing.assert_close(got.detach(), runs.outputs["loss"][s, r])


def test_retrain__leaves_the_model_that_a_function_returns_alone() -> None:
    model = mlp(0)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    trained = train_models(lambda seed: model, TRAIN, SGD, seeds=(0, 1))
    retrain(lambda seed: model, TRAIN, QUERIES, MASKS, SGD, seeds=(0, 1))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not torch.equal(trained[0][0].weight, model[0].weight)


def test_train_models__refuses_masks_that_are_no_boolean_tensors() -> None:
    for mask, got in (([True] * N, "a mask of type list"), (MASKS[0].long(), "a mask of torch.int64")):
        with pytest.raises(fk.errors.InvalidTypeError, match=got):
            train_models(mlp, TRAIN, SGD, mask=mask)  # type: ignore[arg-type]


def test_train_models__refuses() -> None:
    for options in ({"seeds": ()}, {"mask": MASKS[0, :4]}, {"mask": MASKS[0] & False}, {"likelihood": "weibull"}):
        with pytest.raises(fk.errors.InvalidArgumentError):
            train_models(mlp, TRAIN, SGD, **options)  # type: ignore[arg-type]
