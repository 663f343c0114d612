"""Data in every accepted form gives one and the same Fisher, in every pass."""

from __future__ import annotations

from collections import UserDict
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, Dataset, IterableDataset, RandomSampler

import fisherkit as fk
from fisherkit.kinds import KINDS
from tests.reference.zoo import Compose
from tests.small_data import DATASET, F64, N, X, Y, cut, mlp, normal, same, seeded


class ByKeyword(nn.Module):
    """Inputs by name, one of them optional."""

    def __init__(self) -> None:
        super().__init__()
        self.body = mlp()

    def forward(self, features: Tensor, shift: Tensor | None = None) -> Tensor:
        return self.body(features if shift is None else features + shift)


class Reiterable:
    """Batches again and again, without a length."""

    def __init__(self, batches: Sequence[Any]) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[Any]:
        return iter(self.batches)


class Examples(Dataset[tuple[Tensor, Tensor]]):
    """A user's data set."""

    def __len__(self) -> int:
        return N

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return X[index], Y[index]


class Stream(IterableDataset[tuple[Tensor, Tensor]]):
    """A user's data set without random access, and without a length."""

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return iter(zip(X, Y, strict=True))


class Mappings(Dataset[dict[str, Tensor]]):
    """Examples as Hugging Face's data sets give them."""

    def __len__(self) -> int:
        return N

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"features": X[index], "labels": Y[index]}


class Pair(NamedTuple):
    """A batch with names."""

    inputs: Tensor
    targets: Tensor


FORMS: dict[str, Callable[[], Any]] = {
    "list pair": lambda: [X, Y],
    "named tuple": lambda: Pair(X, Y),
    "inputs in a tuple": lambda: ((X,), Y),
    "inputs in a list": lambda: ([X], Y),
    "list of one batch": lambda: [(X, Y)],
    "list of two batches": lambda: cut(3, 4),
    "tuple of two batches": lambda: tuple(cut(3, 4)),
    "a batch of one first": lambda: cut(1, 4, 2),
    "a batch of one last": lambda: cut(4, 2, 1),
    "batches of one": lambda: cut(*[1] * N),
    "batches as lists": lambda: cut(3, 4, batch=lambda x, y: [x, y]),
    "re-iterable": lambda: Reiterable(cut(3, 3, 1)),
    "loader": lambda: DataLoader(DATASET, 3),
    "loader of a user's data set": lambda: DataLoader(Examples(), 2),
    "loader that shuffles": lambda: DataLoader(DATASET, 3, shuffle=True),
    "loader with a generator": lambda: DataLoader(DATASET, 3, shuffle=True, generator=seeded()),
    "loader with a sampler": lambda: DataLoader(DATASET, 3, sampler=RandomSampler(DATASET, generator=seeded())),
    "loader with a batch sampler": lambda: DataLoader(
        DATASET, batch_sampler=BatchSampler(RandomSampler(DATASET, generator=seeded()), 2, drop_last=False)
    ),
    "loader without automatic batching": lambda: DataLoader(cut(3, 4), batch_size=None),  # type: ignore[arg-type]
    "loader of a stream": lambda: DataLoader(Stream(), 3),
    "loader with a batch of one last": lambda: DataLoader(DATASET, 3, num_workers=0),
}

KEYWORD_FORMS: dict[str, Callable[[], Any]] = {
    "mapping": lambda: {"features": X, "labels": Y},
    "mapping class": lambda: UserDict(features=X, labels=Y),
    "list of mappings": lambda: cut(3, 4, batch=lambda x, y: {"features": x, "labels": y}),
    "loader of mappings": lambda: DataLoader(Mappings(), 3, shuffle=True),
    "mapping as inputs": lambda: ({"features": X}, Y),
    "mapping with None": lambda: {"features": X, "shift": None, "labels": Y},
    "positional": lambda: (X, Y),
    "two tensors": lambda: ((X - 1, torch.ones_like(X)), Y),
    "two tensors by name": lambda: {"shift": torch.ones_like(X), "features": X - 1, "labels": Y},
    "a number for all": lambda: {"features": X - 1, "shift": torch.tensor(1.0, dtype=F64), "labels": Y},
    "a tensor without batch axis": lambda: ((X - 1, torch.ones(4, dtype=F64)), Y),
    "a tensor without batch axis, first": lambda: {"shift": torch.ones(4, dtype=F64), "features": X - 1, "labels": Y},
    "a tensor without batch axis, in batches": lambda: cut(
        3, 4, batch=lambda x, y: {"features": x - 1, "shift": torch.ones(1, 4, dtype=F64), "labels": y}
    ),
}


def fisher(model: nn.Module, data: Any, structure: str = "full", **options: Any) -> fk.FisherApproximation:
    return fk.TruncatedFisher(model, data, structure=structure, **options)


@pytest.mark.parametrize("structure", ["full", "ekfac"])
@pytest.mark.parametrize("form", FORMS)
def test_forms__of_pairs_give_the_same_fisher(form: str, structure: str) -> None:
    expected = fisher(mlp(), (X, Y), structure)
    got = fisher(mlp(), FORMS[form](), structure)
    assert (got.examples, got.rows) == (N, expected.rows)
    same(got.to_dense(), expected.to_dense())


@pytest.mark.parametrize("form", KEYWORD_FORMS)
def test_forms__of_inputs_give_the_same_fisher(form: str) -> None:
    got = fisher(ByKeyword(), KEYWORD_FORMS[form](), "block")
    assert got.examples == N
    same(got.to_dense(), fisher(mlp(), (X, Y), "block").to_dense())


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_forms__a_loader_with_workers_gives_the_same_fisher() -> None:
    loader = DataLoader(Examples(), 3, num_workers=1)
    same(fisher(mlp(), loader).to_dense(), fisher(mlp(), (X, Y)).to_dense())


def test_forms__inputs_of_several_levels_reach_the_model() -> None:
    model = Compose(lambda m, x: m.body(x["a"] + x["more"][0]), body=mlp())
    nested = ({"a": X - 1, "more": (torch.ones_like(X), "text", 3)},)
    same(fisher(model, (nested, Y)).to_dense(), fisher(mlp(), (X, Y)).to_dense())


MASK = torch.tensor([[0, 0, 1], [1, 0, 0], [0, 1, 0]], dtype=torch.bool)


class SharedMask(nn.Module):
    """Attention with a mask over positions, [T, T], that all examples share."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.head(self.attention(x, x, x, attn_mask=mask, need_weights=False)[0].mean(1))


def shared_mask(batch: int) -> tuple[Tensor, Tensor]:
    """The Fisher with the mask as an input, and with the mask inside the model."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = SharedMask().double()
    x, y = normal(batch, 3, 4), Y[:batch]
    held = Compose(lambda m, inputs: m.body(inputs, MASK), body=model)
    return fisher(model, ((x, MASK), y)).to_dense(), fisher(held, (x, y)).to_dense()


@pytest.mark.parametrize("batch", [1, 2, 4])
def test_forms__a_mask_shared_by_all_examples_is_not_cut(batch: int) -> None:
    same(*shared_mask(batch))


@pytest.mark.parametrize("structure", ["full", "full, streamed", "block", "diagonal"])
def test_forms__batches_may_differ_in_length(structure: str) -> None:
    """As padding to the longest of a batch makes them; rows of a short batch have fewer positions."""
    model = Compose(lambda m, x: m.head(torch.tanh(m.gain * m.stem(x))), gain=nn.Parameter(torch.ones(5)),
                    stem=nn.Linear(4, 5), head=nn.Linear(5, 3)).double()  # fmt: skip
    labels = torch.tensor([[0, 2, 1, 1]] * 5)
    labels[3, 2:] = -100
    batches = [(normal(n, t, 4, seed=t), labels[:n, :t]) for n, t in ((2, 3), (5, 4), (1, 1), (3, 2))]
    structure, _, streamed = structure.partition(", ")
    options = {"memory_budget": 1} if streamed else {}
    expected = sum(len(y) * fisher(model, (x, y), structure).to_dense() for x, y in batches) / 11
    v = normal(len(expected), 2)
    same(fisher(model, batches, structure, **options) @ v, expected @ v)


@pytest.mark.parametrize("kind", ["sf", "exact"])
def test_forms__unlabelled_data_is_enough_for_kinds_without_labels(kind: str) -> None:
    for data in ((X, None), [(X[:3], None), (X[3:], None)], {"input": X, "labels": None}):
        same(KINDS[kind](mlp(), data).to_dense(), KINDS[kind](mlp(), (X, Y)).to_dense())


def test_forms__batches_are_read_once_where_once_is_enough() -> None:
    class Counting(Reiterable):
        passes = 0

        def __iter__(self) -> Iterator[Any]:
            for number, batch in enumerate(self.batches):
                # Looking at the first batch is not a pass.
                Counting.passes += number == len(self.batches) - 1
                yield batch

        def __len__(self) -> int:
            return len(self.batches)

    for structure, passes in {"diagonal": 1, "kfac": 1, "ekfac": 2}.items():
        Counting.passes = 0
        fisher(mlp(), Counting(cut(3, 3, 1)), structure)
        assert Counting.passes == passes, structure


# -- progress ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("structure", ["full", "ekfac"])
@pytest.mark.parametrize("data", [lambda: cut(3, 3, 1), lambda: Reiterable(cut(3, 3, 1))], ids=["list", "no length"])
def test_progress__is_shown_on_stderr_and_changes_nothing(
    data: Callable[[], Any], structure: str, capsys: pytest.CaptureFixture[str]
) -> None:
    quiet = fisher(mlp(), data(), structure).to_dense()
    assert capsys.readouterr() == ("", "")
    shown = fisher(mlp(), data(), structure, progress=True).to_dense()
    out, err = capsys.readouterr()
    assert out == ""
    assert structure in err
    assert "it/s" in err or "/3" in err
    assert torch.equal(shown, quiet)


# -- memory ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "data",
    [
        lambda: cut(2, 2, 2, 1),
        lambda: DataLoader(DATASET, 2),
        lambda: DataLoader(cut(2, 2, 2, 1), batch_size=None),  # type: ignore[arg-type]
        lambda: DataLoader(Stream(), 2),
    ],
    ids=["list", "loader", "loader of batches", "loader of a stream"],
)
def test_memory_budget__counts_the_examples_of_any_data(data: Callable[[], Any]) -> None:
    """Two thirds of the rows' memory are not enough, whatever the length of the data means."""
    stored = fisher(mlp(), (X, Y))
    needed = sum(entry.memory for entry in stored.coverage().entries)
    streamed = fisher(mlp(), data(), memory_budget=int(0.7 * needed))
    assert "streamed" in str(streamed.coverage())
    assert "streamed" not in str(fisher(mlp(), data(), memory_budget=2 * needed).coverage())
    v = normal(stored.size, 2, seed=5)
    same(streamed @ v, stored @ v)
