"""Data whose order or content changes between passes is refused; what cannot change is not."""

import itertools
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    Sampler,
    SequentialSampler,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
    default_collate,
)

import fisherkit as fk
from examples.influence.evaluation import plain_rankings
from fisherkit.data import Batch, Source

N = 24
X = torch.randn(N, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
Y = torch.arange(N) % 3
DATASET = TensorDataset(X, Y)


def model() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()


class Permuted(Sampler[int]):
    """A sampler of the user's own that shuffles in a way that nothing tells."""

    def __iter__(self) -> Iterator[int]:
        return iter(np.random.default_rng(0).permutation(N).tolist())

    def __len__(self) -> int:
        return N


class BySize(BatchSampler):
    """A batch sampler of the user's own."""

    def __iter__(self) -> Iterator[list[int]]:
        return iter([list(range(12, N)), list(range(12))])


class Shuffled(IterableDataset[tuple[Tensor, Tensor]]):
    """A stream in another order each time."""

    def __init__(self, draw: Callable[[], list[int]]) -> None:
        self.draw = draw

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return iter([(X[i], Y[i]) for i in self.draw()])


class Iterated:
    """Batches of an object of the user's own."""

    def __init__(self, draw: Callable[[], list[int]]) -> None:
        self.draw = draw

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return iter([(X[part], Y[part]) for part in torch.tensor(self.draw()).split(8)])


def permuting(examples: list[tuple[Tensor, Tensor]]) -> Any:
    return default_collate([examples[i] for i in torch.randperm(len(examples))])


def by_generator() -> Callable[[], list[int]]:
    rng = np.random.default_rng(0)
    return lambda: rng.permutation(N).tolist()


def by_epoch() -> Callable[[], list[int]]:
    epochs = itertools.count()
    return lambda: torch.randperm(N, generator=torch.Generator().manual_seed(next(epochs))).tolist()


def globally() -> list[int]:
    return random.sample(range(N), N)


DISORDERED: dict[str, Callable[[], Any]] = {
    "shuffle": lambda: DataLoader(DATASET, 8, shuffle=True),
    "RandomSampler": lambda: DataLoader(DATASET, 8, sampler=RandomSampler(DATASET)),
    "SubsetRandomSampler": lambda: DataLoader(DATASET, 8, sampler=SubsetRandomSampler(range(N))),
    "WeightedRandomSampler": lambda: DataLoader(DATASET, 8, sampler=WeightedRandomSampler([1.0] * N, N)),
    "DistributedSampler": lambda: DataLoader(DATASET, 8, sampler=DistributedSampler(DATASET, 1, 0)),
    "a shard": lambda: DataLoader(DATASET, 8, sampler=DistributedSampler(DATASET, 2, 0, shuffle=False)),
    "BatchSampler of RandomSampler": lambda: DataLoader(
        DATASET, batch_sampler=BatchSampler(RandomSampler(DATASET), 8, False)
    ),
    "BatchSampler of a sampler of one's own": lambda: DataLoader(
        DATASET, batch_sampler=BatchSampler(Permuted(), 8, False)
    ),
    "a sampler of one's own": lambda: DataLoader(DATASET, 8, sampler=Permuted()),
    "a batch sampler of one's own": lambda: DataLoader(
        DATASET, batch_sampler=BySize(SequentialSampler(DATASET), 12, False)
    ),
    "batches that are shuffled": lambda: DataLoader(
        [(X[:8], Y[:8]), (X[8:], Y[8:])],  # type: ignore[arg-type]
        batch_size=None,
        shuffle=True,
    ),
    "a stream by its own generator": lambda: DataLoader(Shuffled(by_generator()), 8),
    "a stream by the global generator": lambda: DataLoader(Shuffled(globally), 8),
    "an iterable by its own generator": lambda: Iterated(by_generator()),
    "an iterable by epoch": lambda: Iterated(by_epoch()),
    "an iterable by torch's generator": lambda: Iterated(lambda: torch.randperm(N).tolist()),
    "an iterable by Python's generator": lambda: Iterated(globally),
    "an iterable by NumPy's generator": lambda: Iterated(lambda: np.random.permutation(N).tolist()),  # noqa: NPY002
    "a collator that permutes": lambda: DataLoader(DATASET, 8, collate_fn=permuting),
    "a wrapped loader": lambda: Iterated(lambda: list(RandomSampler(range(N)))),
}

ORDERED: dict[str, Callable[[], Any]] = {
    "pair": lambda: (X, Y),
    "list": lambda: [(X[:8], Y[:8]), (X[8:], Y[8:])],
    "loader": lambda: DataLoader(DATASET, 8),
    "SequentialSampler": lambda: DataLoader(DATASET, 8, sampler=SequentialSampler(DATASET)),
    "BatchSampler": lambda: DataLoader(
        DATASET, batch_sampler=BatchSampler(SequentialSampler(DATASET), 8, drop_last=False)
    ),
    "a list of places": lambda: DataLoader(DATASET, 8, sampler=list(range(N))),
    "lists of places": lambda: DataLoader(DATASET, batch_sampler=[list(range(10)), list(range(10, N))]),
    "one process": lambda: DataLoader(DATASET, 8, sampler=DistributedSampler(DATASET, 1, 0, shuffle=False)),
    "stream": lambda: DataLoader(Shuffled(lambda: list(range(N))), 8),
    "iterable": lambda: Iterated(lambda: list(range(N))),
    "a collator": lambda: DataLoader(DATASET, 8, collate_fn=lambda examples: default_collate(examples)),
    "batches in a loader": lambda: DataLoader([(X[:8], Y[:8]), (X[8:], Y[8:])], batch_size=None),  # type: ignore[arg-type]
}

QUERY = (X[:2], Y[:2])


def influence(**options: Any) -> tuple[fk.influence.InfluenceScores, nn.Module]:
    net = model()
    return fk.influence.InfluenceScores(fk.EmpiricalFisher(net, (X, Y)), net, **options), net


OPERATIONS: dict[str, Callable[[fk.influence.InfluenceScores, Any, Path], Any]] = {
    "scores": lambda s, data, _: s.scores(QUERY, data),
    "scores of groups": lambda s, data, _: s.scores(QUERY, data, groups=torch.arange(N) // 4),
    "scores by module": lambda s, data, _: torch.stack(list(s.scores(QUERY, data, by="module").values())),
    "scores of queries": lambda s, data, _: s.scores(data, QUERY),
    "top": lambda s, data, _: s.top(QUERY, data, k=3).helpful_index,
    "self-influence": lambda s, data, _: s.self_influence(data),
    "leverages": lambda s, data, _: s.leverages(data),
    "prepare": lambda s, data, _: s.scores(QUERY, s.prepare(data)),
    "prepare to disk": lambda s, data, folder: s.scores(QUERY, s.prepare(data, folder=folder / "rows")),
    "approximate scores": lambda s, data, _: s.approximate_scores(QUERY, data, fk.influence.LowRankQueries(2)).scores,
}


@pytest.mark.parametrize("name", DISORDERED)
def test_influence__refuses_data_in_an_order_that_is_not_fixed(name: str, tmp_path: Path) -> None:
    scores, net = influence()
    every = name in ("shuffle", "an iterable by epoch")
    for number, operation in enumerate(OPERATIONS.values() if every else [OPERATIONS["scores"]]):
        (tmp_path / str(number)).mkdir()
        with pytest.raises(fk.DataError, match=r"order|shuffles"):
            operation(scores, DISORDERED[name](), tmp_path / str(number))
    with pytest.raises(fk.DataError, match=r"order|shuffles"):
        plain_rankings(net, DISORDERED[name]())


@pytest.mark.parametrize("operation", OPERATIONS)
def test_influence__takes_data_in_a_fixed_order(operation: str, tmp_path: Path) -> None:
    scores, _ = influence()
    expected = OPERATIONS[operation](scores, (X, Y), tmp_path)
    forms = ORDERED if operation in ("scores", "prepare to disk") else {n: ORDERED[n] for n in ("loader", "iterable")}
    for number, form in enumerate(forms.values()):
        (tmp_path / str(number)).mkdir()
        torch.testing.assert_close(OPERATIONS[operation](scores, form(), tmp_path / str(number)), expected)


def test_influence__places_are_those_of_a_written_order() -> None:
    scores, _ = influence()
    order = list(reversed(range(N)))
    found = scores.scores(QUERY, DataLoader(DATASET, 8, sampler=order))
    torch.testing.assert_close(found, scores.scores(QUERY, (X, Y)).flip(1))


def test_influence__reading_the_order_leaves_no_trace() -> None:
    def state() -> tuple[Any, ...]:
        # Python's own generator is drawn from by the checks of annotations in tests.
        return torch.get_rng_state().tolist(), np.random.get_state()[1].tolist()  # type: ignore[index] # noqa: NPY002

    before = state()
    Source(Iterated(lambda: torch.randperm(N).tolist())).keep_order("call")
    Source(Iterated(lambda: np.random.permutation(N).tolist())).keep_order("call")  # noqa: NPY002
    assert state() == before


# -- content -----------------------------------------------------------------------------------------------------------


class Drawn(Dataset[tuple[Tensor, Tensor]]):
    """Random augmentation by a generator of the data set's own, as of Albumentations."""

    def __init__(self, change: Callable[[Tensor, np.random.Generator], Tensor]) -> None:
        self.rng, self.change = np.random.default_rng(0), change

    def __len__(self) -> int:
        return N

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        return self.change(X[i], self.rng), Y[i]


def flip(x: Tensor, rng: np.random.Generator) -> Tensor:
    return x.flip(0) if rng.random() < 0.5 else x


CHANGING: dict[str, Callable[[], Any]] = {
    "noise": lambda: DataLoader(Drawn(lambda x, rng: x + rng.normal()), 8),
    "flips": lambda: DataLoader(Drawn(flip), 8),
    "shuffled": lambda: Iterated(by_generator()),
    "shuffled by epoch": lambda: Iterated(by_epoch()),
    "batches in another order": lambda: Parts(itertools.cycle([(0, 1), (1, 0), (0, 1), (1, 0)])),
    "fewer batches": lambda: Parts(itertools.chain([(0, 1)] * 3, itertools.repeat((0,)))),
    "more batches": lambda: Parts(itertools.chain([(0,)] * 3, itertools.repeat((0, 1)))),
    "other labels": lambda: Relabelled(),
}


class Parts:
    """Halves of the data."""

    def __init__(self, orders: Iterator[tuple[int, ...]]) -> None:
        self.orders = orders

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return iter([(X[12 * i : 12 * i + 12], Y[12 * i : 12 * i + 12]) for i in next(self.orders)])


class Relabelled:
    """Labels that change, beside inputs that do not."""

    def __init__(self) -> None:
        self.passes = itertools.count()

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return iter([(X, (Y + next(self.passes)) % 3)])


@pytest.mark.parametrize("name", CHANGING)
def test_streamed__refuses_data_that_change_between_passes(name: str) -> None:
    with pytest.raises(fk.DataError, match=r"data, batch \d+: got data that change between passes.*in every pass"):
        _ = fk.EmpiricalFisher(model(), CHANGING[name](), memory_budget=1) @ torch.ones(43, dtype=torch.float64)


@pytest.mark.parametrize("name", ["noise", "flips", "shuffled", "other labels"])
def test_ekfac__of_two_passes_refuses_data_that_change(name: str) -> None:
    # The factors, 95 numbers, fit beside what is made of them; the rows do not.
    with pytest.raises(fk.DataError, match=r"data, batch \d+: got data that change between passes"):
        fk.EmpiricalFisher(model(), CHANGING[name](), structure="ekfac", memory_budget=2000)


@pytest.mark.parametrize(
    ("name", "structure"),
    [*((name, "full") for name in CHANGING), *(("noise", s) for s in ("block", "diagonal", "kfac", "ekfac"))],
)
def test_one_pass__takes_what_was_drawn(name: str, structure: str) -> None:
    """Where the data are read once, nothing can disagree."""
    fisher = fk.EmpiricalFisher(model(), CHANGING[name](), structure=structure)
    assert fisher.examples in (N, N // 2)


def test_streamed__refuses_a_batch_that_was_written_to() -> None:
    x = X.clone()
    fisher = fk.EmpiricalFisher(model(), [(x, Y)], memory_budget=1)
    v = torch.ones(43, dtype=torch.float64)
    first = fisher @ v
    assert torch.equal(fisher @ v, first)
    x[3, 2] += 1
    with pytest.raises(fk.DataError, match="data, batch 0: got data that change between passes"):
        _ = fisher @ v


def test_loss_gradient__reads_once() -> None:
    for make in CHANGING.values():
        assert bool(fk.evaluation.loss_gradient(model(), make()).isfinite().all())


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("two examples swapped", lambda x, y: (x[[1, 0, *range(2, N)]], y[[1, 0, *range(2, N)]])),
        ("inputs reversed within an example", lambda x, y: (x.flip(1), y)),
        ("one number in its last bit", lambda x, y: (torch.nextafter(x, x + 1), y)),
        ("labels alone swapped", lambda x, y: (x, y[[1, 0, *range(2, N)]])),
        ("another dtype", lambda x, y: (x.float().double() * 0 + x, y.int())),
        ("another shape", lambda x, y: (x.reshape(N, 2, 2), y)),
    ],
)
@pytest.mark.parametrize("width", [4, 3000])
def test_digest__tells(name: str, change: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]], width: int) -> None:
    x = torch.randn(N, width, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    changed = change(x, Y) if width == 4 or name != "another shape" else (x.reshape(N, 2, -1), Y)
    assert Batch.of((x, Y), "data").digest() == Batch.of((x.clone(), Y.clone()), "data").digest()
    assert Batch.of((x, Y), "data").digest() != Batch.of(changed, "data").digest()


# -- how many ----------------------------------------------------------------------------------------------------------

COUNTED: dict[str, Callable[[], Any]] = {
    "drop_last": lambda: DataLoader(DATASET, 7, drop_last=True),
    "drop_last by its sampler": lambda: DataLoader(
        DATASET, batch_sampler=BatchSampler(SequentialSampler(DATASET), 7, drop_last=True)
    ),
    "a part": lambda: DataLoader(DATASET, 7, sampler=SubsetRandomSampler(range(10))),
    "repeated": lambda: DataLoader(DATASET, 7, sampler=RandomSampler(DATASET, replacement=True, num_samples=50)),
    "lists of places": lambda: DataLoader(DATASET, batch_sampler=[[1, 2], [3, 4, 5]]),
    "a batch sampler of one's own": lambda: DataLoader(DATASET, batch_sampler=BySize(range(N), 12, False)),
    "a stream": lambda: DataLoader(Shuffled(globally), 7, drop_last=True),
    "batches": lambda: [(X, Y), (X[:3], Y[:3])],
    **ORDERED,
}


@pytest.mark.parametrize("name", COUNTED)
def test_count__is_what_is_loaded(name: str) -> None:
    data = COUNTED[name]()
    source = Source(data)
    assert source.count() == sum(batch.size for batch in source)
    assert fk.EmpiricalFisher(model(), data).examples == source.count()
