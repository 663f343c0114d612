"""Every form of data gives the same Fisher, in every pass."""

import random
from collections import UserDict
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
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


# -- every pass over the data sees the same examples in the same order -------------------------------------------------


class Augmented(Dataset[tuple[Tensor, Tensor]]):
    """Noise on every example, of a library's global generator."""

    def __init__(self, draw: Callable[[], float]) -> None:
        self.draw = draw

    def __len__(self) -> int:
        return N

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return X[index] + self.draw(), Y[index]


SHUFFLED: dict[str, Callable[[], DataLoader[Any]]] = {
    "global generator": lambda: DataLoader(DATASET, 3, shuffle=True),
    "loader's generator": lambda: DataLoader(DATASET, 3, shuffle=True, generator=seeded()),
    "sampler's generator": lambda: DataLoader(DATASET, 3, sampler=RandomSampler(DATASET, generator=seeded())),
    "batch sampler's generator": lambda: DataLoader(
        DATASET, batch_sampler=BatchSampler(RandomSampler(DATASET, generator=seeded()), 3, drop_last=False)
    ),
    "torch augmentation": lambda: DataLoader(Augmented(lambda: float(torch.rand(()))), 3, shuffle=True),
    "NumPy augmentation": lambda: DataLoader(Augmented(lambda: float(np.random.rand())), 3),  # noqa: NPY002  global
    "Python augmentation": lambda: DataLoader(Augmented(random.random), 3),
}


@pytest.mark.parametrize("name", SHUFFLED)
def test_order__of_a_shuffling_loader_is_the_same_in_every_pass(name: str) -> None:
    """SampledFisher's draws belong to places in the data: another order in the next pass would be another matrix."""
    streamed = fk.SampledFisher(mlp(), SHUFFLED[name](), draws=2, memory_budget=1)
    v = normal(streamed.size, 2, seed=5)
    first = streamed @ v
    torch.rand(3)  # the user's own draws between two products
    assert torch.equal(streamed @ v, first)
    same((v * first).sum(0), streamed.quadratic_form(v))
    same(streamed.diagonal().sum(), streamed.trace())


@pytest.mark.parametrize("kind", KINDS)
def test_order__streamed_products_equal_stored_ones(kind: str) -> None:
    state = torch.get_rng_state()
    stored = KINDS[kind](mlp(), SHUFFLED["global generator"]())
    torch.set_rng_state(state)
    streamed = KINDS[kind](mlp(), SHUFFLED["global generator"](), memory_budget=1)
    v = normal(stored.size, 3, seed=5)
    same(streamed @ v, stored @ v)
    same(streamed.diagonal(), stored.diagonal())
    same(streamed.trace(), stored.trace())
    # Streamed rows are solved by conjugate gradients, with a relative residual of 1e-6.
    torch.testing.assert_close(streamed.solve(v, 0.1, tolerance=1e-12), stored.solve(v, 0.1), rtol=1e-7, atol=1e-9)


# -- draws -------------------------------------------------------------------------------------------------------------

SPLITS = [(7,), (1, 6), (3, 4), (2, 2, 2, 1), (1,) * 7]


def sampled(data: Any = (X, Y), **options: Any) -> Tensor:
    return fk.SampledFisher(mlp(), data, **{"draws": 2, **options}).to_dense()


@pytest.mark.parametrize(
    ("likelihood", "split"),
    [*(("categorical", split) for split in SPLITS), ("gaussian", (3, 4)), ("bernoulli", (2, 2, 2, 1))], ids=str,
)  # fmt: skip
def test_draws__do_not_depend_on_how_the_data_is_cut(likelihood: str, split: tuple[int, ...]) -> None:
    whole = sampled((X, None), likelihood=likelihood, seed=4)
    parts = [(x, None) for x, _ in cut(*split)]
    same(sampled(parts, likelihood=likelihood, seed=4), whole)
    same(sampled(parts, likelihood=likelihood, seed=4, chunk_size=2), whole)


def test_draws__of_positions_do_not_depend_on_how_the_data_is_cut() -> None:
    x, y = normal(5, 3, 4), torch.tensor([[0, 1, 2]] * 5)
    y[0, 1], y[2] = -100, -100
    for example in ("sequence", "token"):
        whole = sampled((x, y), example=example)
        same(sampled([(x[:1], y[:1]), (x[1:3], y[1:3]), (x[3:], y[3:])], example=example, chunk_size=1), whole)


def test_draws__follow_the_seed_alone() -> None:
    first = sampled(seed=1)
    torch.manual_seed(99)
    assert torch.equal(sampled(seed=1), first)
    assert torch.equal(sampled(), sampled(seed=0))
    different = [sampled(seed=seed) for seed in (0, 1, 2, -1, 1 << 40, -(1 << 70) - 5)]
    for i, a in enumerate(different):
        assert all(not torch.allclose(a, b) for b in different[:i]), i


def test_draws__more_of_them_do_not_repeat_the_first() -> None:
    one, many = sampled(draws=1), sampled(draws=64)
    exact = fk.ExactFisher(mlp(), (X, Y)).to_dense()
    assert (many - exact).norm() < 0.5 * (one - exact).norm()


def test_draws__a_generator_gives_the_seed_and_moves_on_once() -> None:
    a, b = seeded(), seeded()
    first, second = sampled(generator=a), sampled(generator=a)
    assert not torch.allclose(first, second)
    assert torch.equal(sampled(generator=b), first)
    assert torch.equal(a.get_state(), b.get_state()) is False
    sampled(generator=b)
    assert torch.equal(a.get_state(), b.get_state())


def test_draws__are_the_same_in_every_pass() -> None:
    streamed = fk.SampledFisher(mlp(), cut(3, 4), draws=3, seed=2, memory_budget=1)
    stored = fk.SampledFisher(mlp(), cut(2, 5), draws=3, seed=2)
    v = normal(stored.size, seed=5)
    for _ in range(3):
        same(streamed @ v, stored @ v)
    for structure in ("block", "diagonal"):
        other = fk.SampledFisher(mlp(), cut(6, 1), draws=3, seed=2, structure=structure)
        same(other.diagonal(), stored.diagonal())


@pytest.mark.parametrize("structure", ["kfac", "ekfac"])
def test_draws__kronecker_factors_see_one_draw_in_both_passes(structure: str) -> None:
    fishers = [fk.SampledFisher(mlp(), data, draws=2, seed=6, structure=structure) for data in ((X, Y), cut(1, 6))]
    same(fishers[0].to_dense(), fishers[1].to_dense())
    full = fk.SampledFisher(mlp(), (X, Y), draws=2, seed=6)
    if structure == "ekfac":
        same(fishers[0].trace(), full.trace())


@pytest.mark.parametrize("structure", ["full", "diagonal", "kfac"])
def test_first_batch_of_one_example_counts_once_in_every_pass(structure: str) -> None:
    torch.manual_seed(0)
    model = nn.Linear(3, 2).double()
    x, y = torch.randn(6, 3).double(), torch.randint(2, (6,))
    batches = [(x[:1], y[:1]), (x[1:], y[1:])]
    whole = fk.EmpiricalFisher(model, (x, y), structure=structure)
    v = torch.randn(whole.size, dtype=torch.float64)
    for _ in range(2):  # the second build knows the model
        torch.testing.assert_close(fk.EmpiricalFisher(model, batches, structure=structure) @ v, whole @ v)
