"""Batches in the forms that people have: right, or told how; shared inputs, ragged batches, one example at a time."""

import warnings
from collections import OrderedDict, namedtuple
from collections.abc import Callable, Iterator
from dataclasses import InitVar, dataclass, field
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from transformers import BatchEncoding
from transformers.utils import ModelOutput

import fisherkit as fk
from examples.influence.evaluation import plain_rankings
from tests import by_hand
from tests.by_hand import weights
from tests.small_data import normal, same

N = 12
F64 = torch.float64


X, Y = normal(N, 4), torch.arange(N) % 3
MASK = (normal(N, 4, seed=1) > 0).double()


class Masked(nn.Module):
    """Two inputs, both needed."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            self.body = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()

    def forward(self, features: Tensor, mask: Tensor) -> Tensor:
        return self.body(features * mask)


class Optional(Masked):
    """The second input may be missing."""

    def forward(self, features: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.body(features if mask is None else features * mask)


def brute(
    model: nn.Module, call: Callable[[int], Tensor], targets: Tensor = Y, loss: Any = nn.functional.cross_entropy
) -> Tensor:
    """The empirical Fisher by one gradient an example; ``call(n)`` gives the outputs of example n alone, [1, C]."""
    one = [by_hand.gradient(loss(call(n), y[None], reduction="sum"), model) for n, y in enumerate(targets)]
    return torch.stack(one).T @ torch.stack(one) / len(one)


class Triple(NamedTuple):
    features: Tensor
    mask: Tensor
    labels: Tensor


class Places(NamedTuple):
    """Names that are no parameters of the model."""

    first: Tensor
    second: Tensor
    third: Tensor


class LabelsFirst(NamedTuple):
    labels: Tensor
    inputs: tuple[Tensor, Tensor]


@dataclass
class Stored:
    """No batch, but batches, in a dataclass."""

    batches: list[Any]

    def __iter__(self) -> Iterator[Any]:
        return iter(self.batches)


@dataclass
class Record:
    mask: Tensor
    labels: Tensor
    features: Tensor


def parts(make: Callable[..., Any]) -> list[Any]:
    return [make(x, m, y) for x, m, y in zip(X.split(5), MASK.split(5), Y.split(5), strict=True)]


FORMS: dict[str, Callable[[], Any]] = {
    "triple": lambda: (X, MASK, Y),
    "list of three": lambda: [X, MASK, Y],
    "triples": lambda: parts(lambda *all_: all_),
    "lists of three": lambda: parts(lambda *all_: list(all_)),
    "loader of triples": lambda: DataLoader(TensorDataset(X, MASK, Y), 5),
    "named tuple by name": lambda: Triple(X, MASK, Y),
    "named tuples by name": lambda: parts(Triple),
    "named tuples by place": lambda: parts(Places),
    "named tuples, labels first": lambda: parts(lambda x, m, y: LabelsFirst(y, (x, m))),
    "dataclass": lambda: Record(MASK, Y, X),
    "dataclasses": lambda: parts(lambda x, m, y: Record(m, y, x)),
    "batches in a dataclass": lambda: Stored(parts(lambda x, m, y: Record(m, y, x))),
    "label": lambda: {"features": X, "mask": MASK, "label": Y},
    "label_ids": lambda: parts(lambda x, m, y: {"features": x, "mask": m, "label_ids": y}),
    "labels as an array": lambda: {"features": X, "mask": MASK, "labels": Y.numpy()},
    "labels as a list": lambda: parts(lambda x, m, y: ((x, m), y.tolist())),
    "one batch, labels as a list": lambda: ((X, MASK), Y.tolist()),
    "arrays": lambda: (X.numpy(), MASK.numpy(), Y.numpy()),
    "batches of arrays": lambda: parts(lambda x, m, y: {"features": x.numpy(), "mask": m.numpy(), "labels": y.numpy()}),
    "inputs as a named tuple": lambda: parts(lambda x, m, y: (Places(x, m, y)[:2], y)),
    "one example a batch": lambda: [((X[n : n + 1], MASK[n : n + 1]), Y[n : n + 1]) for n in range(N)],
    "one example first": lambda: [((X[:1], MASK[:1]), Y[:1]), ((X[1:], MASK[1:]), Y[1:])],
}


@pytest.mark.parametrize("name", FORMS)
def test_forms__of_two_inputs_give_the_same_fisher(name: str) -> None:
    model = Masked()
    expected = brute(model, lambda n: model(X[n : n + 1], MASK[n : n + 1]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fisher = fk.EmpiricalFisher(model, FORMS[name]())
        assert fisher.examples == N
        same(fisher.to_dense(), expected)
        same(fk.EmpiricalFisher(model, FORMS[name](), memory_budget=1) @ torch.eye(len(expected), dtype=F64), expected)
        same(fk.evaluation.loss_gradient(model, FORMS[name]()), fk.evaluation.loss_gradient(model, ((X, MASK), Y)))


def test_forms__a_pair_of_arrays() -> None:
    model = nn.Linear(4, 3).double()
    for data in ((X.numpy(), Y.numpy()), (X.numpy(), Y.tolist()), (X, Y.numpy()), [(X.numpy(), Y.numpy())]):
        same(fk.EmpiricalFisher(model, data).to_dense(), fk.EmpiricalFisher(model, (X, Y)).to_dense())


def test_forms__lists_and_records_inside_inputs_reach_the_model_as_they_are() -> None:
    @dataclass(frozen=True)
    class Points:
        at: Tensor
        unit: str = "m"

    pair = namedtuple("pair", "x points parts")

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Linear(4, 3).double()

        def forward(self, given: Any) -> Tensor:
            assert (type(given), type(given.points), type(given.parts)) == (pair, Points, list)
            return self.body(given.x * given.points.at * given.parts[0])

    net, ones = Net(), torch.ones_like(X)
    got = fk.EmpiricalFisher(net, [((pair(X, Points(MASK), [ones]),), Y)], chunk_size=1)
    same(got.to_dense(), brute(net, lambda n: net.body(X[n : n + 1] * MASK[n : n + 1])))


@dataclass
class Made:
    """Makes more of its fields than they say."""

    at: Tensor
    scale: InitVar[float]
    doubled: Tensor = field(init=False)

    def __post_init__(self, scale: float) -> None:
        self.at = self.at * scale
        self.doubled = 2 * self.at
        self.mean: Any = self.at.mean(1, keepdim=True)


@dataclass(frozen=True)
class Halved:
    at: Tensor
    times: InitVar[int] = 1

    def __post_init__(self, times: int) -> None:
        object.__setattr__(self, "at", self.at / 2**times)


@dataclass(slots=True)
class Slotted:
    at: Tensor
    more: InitVar[Tensor]

    def __post_init__(self, more: Tensor) -> None:
        self.at = self.at + more


class Named(namedtuple("Named", "at twice")):
    def __new__(cls, at: Tensor) -> "Named":
        return super().__new__(cls, at, 2 * at)


@dataclass
class Output(ModelOutput):
    at: Tensor | None = None
    unused: Tensor | None = None
    states: tuple[Tensor, ...] | None = None


KEPT: dict[str, tuple[Callable[[Tensor], Any], Callable[[Any], Tensor]]] = {
    "more than its fields": (lambda x: Made(x, 1.1), lambda given: given.at + given.doubled * given.mean),
    "frozen": (lambda x: Halved(x), lambda given: given.at),
    "frozen, of another number": (lambda x: Halved(x, 3), lambda given: given.at),
    "with slots": (lambda x: Slotted(x, x.roll(1, 1)), lambda given: given.at),
    "named tuple": (Named, lambda given: given.at * given.twice),
    "model output by name": (lambda x: Output(at=x, states=(x, 2 * x)), lambda given: given.at + given.states[1]),
    "model output by place": (lambda x: Output(at=x, states=(x, 2 * x)), lambda given: given[0] + given[1][1]),
    "model output by key": (lambda x: Output(at=x), lambda given: given["at"] + given.to_tuple()[0]),
    "encoding": (lambda x: BatchEncoding({"at": x}), lambda given: given.at),
    "ordered": (lambda x: OrderedDict(at=x), lambda given: next(iter(given.values()))),
    "in each other": (lambda x: [Made(Output(at=x)["at"], 1.1), {"out": Output(at=x)}],
        lambda given: given[0].doubled + given[1]["out"].at),
}  # fmt: skip


@pytest.mark.parametrize("name", KEPT)
def test_forms__records_that_make_something_of_their_fields_stay_what_they_are(name: str) -> None:
    make, read = KEPT[name]

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Linear(4, 3).double()

        def forward(self, given: Any) -> Tensor:
            return self.body(read(given))  # type: ignore[no-any-return]

    net, given = Net(), make(X)
    expected = brute(net, lambda n: net(make(X[n : n + 1])))
    data = [((make(x),), y) for x, y in zip(X.split(5), Y.split(5), strict=True)]
    for options in ({}, {"chunk_size": 1}, {"memory_budget": 1}):
        fisher = fk.EmpiricalFisher(net, data, **options)
        same(fisher @ torch.eye(fisher.size, dtype=F64), expected)
    same(read(given), read(make(X)))
    optimizer, before = fk.optim.NaturalGradient(net, lr=1.0, kind="ef", damping=0.1), weights(net)
    F.cross_entropy(net(given), Y).backward()
    gradient = torch.cat([p.grad.flatten() for p in net.parameters() if p.grad is not None])
    optimizer.step()
    same(before - weights(net), torch.linalg.solve(expected + 0.1 * torch.eye(len(expected), dtype=F64), gradient))


REFUSED: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "a triple for one input": (lambda: fk.EmpiricalFisher(nn.Linear(4, 3).double(), [(X, Y, torch.arange(N))]),
        fk.InvalidTypeError, r"batch of type tuple with 3 parts.*needs 1 input.*\(\(a, b\), y\)"),
    "a triple for one or two inputs": (lambda: fk.EmpiricalFisher(Optional(), (X, MASK, Y)), fk.InvalidTypeError,
        r"with 3 parts.*Nothing tells which of them are inputs and targets"),
    "a triple for any inputs": (lambda: fk.EmpiricalFisher(Anything(), (X, MASK, Y)), fk.InvalidTypeError,
        r"with 3 parts.*Nothing tells"),
    "labels of several lengths": (lambda: fk.EmpiricalFisher(nn.Linear(4, 3).double(), [(X, [[0], [1, 2]])]),
        fk.InvalidTypeError, r"targets of type list.*torch\.as_tensor"),
    "labels as texts": (lambda: fk.EmpiricalFisher(nn.Linear(4, 3).double(), [(X, ["a"] * N)]), fk.InvalidTypeError,
        r"targets of type list"),
    "another name": (lambda: fk.EmpiricalFisher(Masked(), {"feature": X, "mask": MASK, "labels": Y}), fk.DataError,
        r"inputs named feature, which.*does not take; expected names of its parameters: features.*Try: rename"),
    "no name": (lambda: fk.EmpiricalFisher(nn.Linear(4, 3).double(), {"x": X, "labels": Y}), fk.DataError,
        r"inputs named x, which.*names of its parameters: input"),
    "a mapping for a model that takes it": (lambda: fk.EmpiricalFisher(OfMapping(), {"x": X, "labels": Y}),
        fk.DataError, r"inputs named x.*\(\(mapping,\), labels\)"),
    "packed": (lambda: fk.EmpiricalFisher(nn.LSTM(4, 3).double(),
            (nn.utils.rnn.pack_padded_sequence(X.reshape(4, 3, 4), [4, 4, 4]), Y)), fk.InvalidTypeError,
        r"a PackedSequence.*pack_padded_sequence in the model"),
}  # fmt: skip


class Anything(Masked):
    def forward(self, *inputs: Tensor) -> Tensor:
        return super().forward(*inputs)


class OfMapping(Masked):
    def forward(self, batch: dict[str, Tensor]) -> Tensor:  # type: ignore[override]
        return super().forward(batch["x"], torch.ones_like(batch["x"]))


@pytest.mark.parametrize("name", REFUSED)
def test_forms__that_nothing_tells_are_refused_with_advice(name: str) -> None:
    call, error, says = REFUSED[name]
    with pytest.raises(error, match=says):
        call()


def test_forms__the_advice_for_a_mapping_works() -> None:
    model = OfMapping()
    same(fk.EmpiricalFisher(model, (({"x": X},), Y)).to_dense(), brute(model, lambda n: model({"x": X[n : n + 1]})))


def test_fields__that_the_model_does_not_take_are_left_out_with_one_warning() -> None:
    model = Optional()
    batches = [
        {"features": x, "index": torch.arange(len(x)), "text": ["a"] * len(x), "labels": y}
        for x, y in zip(X.split(5), Y.split(5), strict=True)
    ]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fisher = fk.EmpiricalFisher(model, batches, memory_budget=1)
        found = fisher @ torch.eye(fisher.size, dtype=F64)
    messages = [str(w.message) for w in caught if "left out" in str(w.message)]
    assert messages == [
        "data, batch 0: index, text left out, which the model's forward pass does not take; it takes features, mask."
    ]
    same(found, brute(model, lambda n: model(X[n : n + 1])))


def test_fields__a_wrapper_takes_what_it_wraps_takes() -> None:
    model = Optional()
    wrapped = nn.DataParallel(model)
    with pytest.warns(UserWarning, match="index left out"):
        got = fk.EmpiricalFisher(wrapped, {"features": X, "index": torch.arange(N), "labels": Y})
    same(got.to_dense(), fk.EmpiricalFisher(model, (X, Y)).to_dense())


def test_fields__a_label_that_the_model_takes_is_an_input() -> None:
    class Conditional(Masked):
        def forward(self, features: Tensor, label: Tensor) -> Tensor:
            return super().forward(features, 1.0 + label.unsqueeze(1))

    model, label = Conditional(), torch.arange(N) % 2
    got = fk.EmpiricalFisher(model, {"features": X, "label": label, "labels": Y})
    same(got.to_dense(), brute(model, lambda n: model(X[n : n + 1], label[n : n + 1])))
    with pytest.raises(fk.DataError, match='one with "labels"'):
        fk.EmpiricalFisher(model, {"features": X, "label": label})


# -- inputs that all examples share ------------------------------------------------------------------------------------


class Scaled(nn.Module):
    """A scale of the outputs, [3]."""

    def __init__(self, width: int = 3) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            self.out = nn.Linear(4, width).double()

    def forward(self, x: Tensor, scale: Tensor) -> Tensor:
        return self.out(x) * scale


class Edges(nn.Module):
    """A graph's adjacency, [T, T], and positions' codes, [T, D], that all examples share."""

    def __init__(self, count: int) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            self.a, self.b = nn.Linear(4, 5).double(), nn.Linear(5, 3).double()
        self.count = count

    def forward(self, x: Tensor, codes: Tensor, adjacency: Tensor) -> Tensor:
        return self.b(torch.tanh(adjacency @ self.a(x + codes)).mean(1))


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 12])
@pytest.mark.parametrize("options", [{}, {"chunk_size": 1}, {"memory_budget": 1}, {"structure": "ekfac"}], ids=str)
def test_shared__an_input_as_long_as_the_batch_is_recognised(size: int, options: dict[str, Any]) -> None:
    model, scale = Scaled(), torch.tensor([1.0, 2.0, 3.0], dtype=F64)
    data = [((x, scale), y) for x, y in zip(X.split(size), Y.split(size), strict=True)]
    expected = brute(model, lambda n: model(X[n : n + 1], scale))
    fisher = fk.EmpiricalFisher(model, data, **options)
    if options == {"structure": "ekfac"}:
        same(fisher.trace(), expected.trace())
    else:
        same(fisher @ torch.eye(len(expected), dtype=F64), expected)


@pytest.mark.parametrize("size", [2, 3, 4])
def test_shared__several_inputs_as_long_as_the_batch_are_recognised(size: int) -> None:
    positions = 3
    x, codes, adjacency = normal(N, positions, 4), normal(positions, 4, seed=2), normal(positions, positions, seed=3)
    model = Edges(positions)
    data = [
        {"x": part, "codes": codes.clone(), "adjacency": adjacency.clone(), "labels": y}
        for part, y in zip(x.split(size), Y.split(size), strict=True)
    ]
    expected = brute(model, lambda n: model(x[n : n + 1], codes, adjacency))
    same(fk.EmpiricalFisher(model, data).to_dense(), expected)
    scores = fk.influence.InfluenceScores(fk.EmpiricalFisher(model, data), model, damping=0.1)
    whole = [{"x": x, "codes": codes, "adjacency": adjacency, "labels": Y}]
    torch.testing.assert_close(scores.scores(data, data), scores.scores(whole, whole), rtol=1e-8, atol=1e-12)


def test_shared__a_single_batch_is_told_what_to_do() -> None:
    scale = torch.tensor([1.0, 2.0, 3.0], dtype=F64)
    with pytest.raises(fk.DataError, match=r"input 'inputs\[1\]' with 3 rows in a batch of 3.*a buffer of the"):
        fk.EmpiricalFisher(Scaled(), [((X[:3], scale), Y[:3])])
    with pytest.raises(fk.DataError, match=r"input 'scale' with 3 rows in a batch of 3 examples"):
        fk.EmpiricalFisher(Scaled(), {"x": X[:3], "scale": scale, "labels": Y[:3]})


def test_shared__an_optimizer_says_what_to_do() -> None:
    model, scale = Scaled(), torch.tensor([1.0, 2.0, 3.0], dtype=F64)
    optimizer = fk.optim.NaturalGradient(model, lr=1.0, kind="ef", damping=0.5)
    with pytest.raises(fk.DataError, match=r"input 'inputs\[1\]' with 3 rows in a batch of 3.*a buffer of the"):
        model(X[:3], scale)
    optimizer.close()


@pytest.mark.parametrize("sizes", [(3, 2, 7), (3, 3, 3, 3), (1, 3, 2, 6), (2, 3, 7)])
def test_shared__batches_of_several_lengths_tell(sizes: tuple[int, ...]) -> None:
    model, scale = Scaled(), torch.tensor([1.0, 2.0, 3.0], dtype=F64)
    data = [((x, scale), y) for x, y in zip(X.split(sizes), Y.split(sizes), strict=True)]
    expected = brute(model, lambda n: model(X[n : n + 1], scale))
    same(fk.EmpiricalFisher(model, data).to_dense(), expected)
    whole = fk.evaluation.loss_gradient(model, data)
    rows = [fk.evaluation.loss_gradient(model, ((X[n : n + 1], scale), Y[n : n + 1])) for n in range(N)]
    same(whole, torch.stack(rows).mean(0))
    norms = plain_rankings(model, data)["gradient norm"]
    same(norms, torch.stack(rows).norm(dim=1))


def test_shared__two_outputs_for_two_examples() -> None:
    """Whole and cut are one; only the order tells."""
    model, scale, y = Scaled(2), torch.tensor([1.0, 3.0], dtype=F64), torch.arange(N) % 2
    data = [((x, scale), part) for x, part in zip(X.split(2), y.split(2), strict=True)]
    same(fk.EmpiricalFisher(model, data).to_dense(), brute(model, lambda n: model(X[n : n + 1], scale), y))


def test_shared__an_input_that_changes_its_length_is_named() -> None:
    class PerExample(Scaled):
        def forward(self, x: Tensor, scale: Tensor) -> Tensor:
            return super().forward(x, scale[: len(x)].unsqueeze(1))

    scale = torch.tensor([1.0, 2.0, 3.0], dtype=F64)
    data = [((X[:3], scale), Y[:3]), ((X[3:5], scale), Y[3:5])]
    with pytest.raises(fk.DataError, match=r"data, batch 1: got input 'inputs\[1\]' of shape \[3\] in a batch of 2"):
        fk.EmpiricalFisher(PerExample(), data)


def test_shared__examples_that_meet_in_the_model_stay_refused() -> None:
    """Other inputs in every batch are no shared ones, whatever the model makes of them."""

    class Contrast(Scaled):
        def forward(self, x: Tensor, other: Tensor) -> Tensor:
            return self.out(x) @ self.out(other).T

    data = [((x, x + 1), torch.arange(4)) for x in X.split(4)]
    with pytest.raises(fk.ModelError, match=r"changes with the rest of its batch|for 2 examples"):
        fk.EmpiricalFisher(Contrast(), data)


# -- one example at a time ---------------------------------------------------------------------------------------------


class Alone(nn.Module):
    """One picture of any size at a time."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            self.conv, self.out = nn.Conv2d(1, 2, 3, padding=1).double(), nn.Linear(2, 3).double()
            self.gain = nn.Parameter(torch.tensor([1.0, 2.0], dtype=F64))  # no layer rule

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.gain * self.conv(x).squeeze(0).mean((1, 2)))[None]


class Checked(Alone):
    """Says so itself."""

    def forward(self, x: Tensor) -> Tensor:
        if len(x) != 1:
            raise ValueError("one picture at a time")
        return super().forward(x)


PICTURES = [(normal(1, 1, 4 + n, 5, seed=n), Y[n : n + 1]) for n in range(5)]


@pytest.mark.parametrize(
    ("net", "kind"),
    [(Checked, fk.EmpiricalFisher), (Alone, fk.EmpiricalFisher), (Alone, fk.ExactFisher), (Alone, fk.TruncatedFisher),
     (Alone, fk.SampledFisher)],
)  # fmt: skip
def test_alone__a_model_of_one_example_at_a_time_is_right(net: type[Alone], kind: Any) -> None:
    model = net()
    expected = brute(model, lambda n: model(PICTURES[n][0]), Y[:5])
    if kind is not fk.EmpiricalFisher:
        whole = [kind(model, [one]).to_dense() for one in PICTURES]
        expected = torch.stack(whole).mean(0) if kind is not fk.SampledFisher else kind(model, PICTURES).to_dense()
    eye = torch.eye(len(expected), dtype=F64)
    for _ in range(2):  # what was verified is used again
        same(kind(model, PICTURES).to_dense(), expected)
    same(kind(model, PICTURES, memory_budget=1) @ eye, expected)
    same(kind(model, PICTURES, structure="diagonal").diagonal(), expected.diagonal())
    same(kind(model, PICTURES, structure="ekfac").trace(), expected.trace())


def test_alone__influence_and_gradients() -> None:
    model = Alone()
    fisher = fk.EmpiricalFisher(model, PICTURES)
    dense = fisher.to_dense()
    found = fk.influence.InfluenceScores(fisher, model, damping=0.1).scores(PICTURES[:2], PICTURES)
    rows = [fk.evaluation.loss_gradient(model, [one]) for one in PICTURES]
    own = torch.stack(rows)
    right = own[:2] @ torch.linalg.solve(dense + 0.1 * torch.eye(len(dense), dtype=F64), own.T) / 5
    torch.testing.assert_close(found, right, rtol=1e-8, atol=1e-12)


def test_alone__an_optimizer_steps_on_one_example() -> None:
    model = Alone()
    x, y = PICTURES[0]
    gradient = fk.evaluation.loss_gradient(model, [(x, y)])
    optimizer = fk.optim.NaturalGradient(model, lr=1.0, kind="ef", damping=0.5)
    before = by_hand.weights(model)
    nn.functional.cross_entropy(model(x), y).backward()
    optimizer.step()
    moved = before - by_hand.weights(model)
    torch.testing.assert_close(moved, gradient / (0.5 + gradient @ gradient), rtol=1e-7, atol=1e-10)


def test_alone__nothing_learnt_from_one_example_is_used_for_two() -> None:
    class Centred(nn.Module):
        """Examples meet in the mean."""

        def __init__(self) -> None:
            super().__init__()
            self.out = nn.Linear(4, 3).double()

        def forward(self, x: Tensor) -> Tensor:
            if len(x) == 2 and bool((x[0] == x[1]).all()):
                raise ValueError("twice the same")
            return self.out(x - 0.5 * x.mean(0))

    model = Centred()
    fk.EmpiricalFisher(model, [(X[:1], Y[:1])])
    with pytest.raises((fk.ModelError, ValueError)):
        fk.EmpiricalFisher(model, (X, Y))


def test_alone__chance_is_still_refused() -> None:
    class Noisy(Checked):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x + torch.randn_like(x))

    with pytest.raises((fk.ModelError, ValueError)):
        fk.EmpiricalFisher(Noisy(), PICTURES)


def test_alone__a_batch_of_several_is_told() -> None:
    for net in (Alone, Checked):
        with pytest.raises(
            fk.DataError, match=r"a batch of 3 examples.*works with the first alone.*Try: batches of one"
        ):
            fk.EmpiricalFisher(net(), (normal(3, 1, 4, 5), Y[:3]))
