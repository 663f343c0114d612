"""storage=: rows that are kept, made anew for every product, or made when they pay; the same matrix in all three."""

from __future__ import annotations

import copy
import dataclasses
import gc
import pickle
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fisherkit as fk
from fisherkit.operators import LowRankOperator, unwrap
from fisherkit.rows import streamed as later
from fisherkit.rows.collection import Rows
from fisherkit.rows.streamed import LaterRows, products_before_rows
from fisherkit.testing import check_fisher
from tests import by_hand
from tests.axes import pairwise
from tests.snapshot import untouched

F64 = torch.float64
CLASSES = 6
KINDS: dict[str, Callable[..., fk.FisherApproximation]] = {
    "exact": fk.ExactFisher,
    "sf": lambda *args, **options: fk.SampledFisher(*args, draws=4, **options),
    "truncated": lambda *args, **options: fk.TruncatedFisher(*args, rank=4, **options),
}


@pytest.fixture(autouse=True)
def later_from_the_first_product(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests' models are so small that their rows would be kept at once: here a pass costs its arithmetic alone."""
    monkeypatch.setattr(later, "PASS", 0)
    monkeypatch.setattr(later, "MOVED", 1)


def perceptron() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(5, 12), nn.Tanh(), nn.Linear(12, 12), nn.Tanh(), nn.Linear(12, CLASSES)).double()


class Tokens(nn.Module):
    """Labels at every position, an embedding, attention, and a layer norm."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.embed = nn.Embedding(11, 8)
            self.layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
            self.head = nn.Linear(8, CLASSES)
        self.double().eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(self.embed(x)))


def batches(sizes: tuple[int, ...] = (7, 9, 8)) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(n, 5, generator=generator, dtype=F64), torch.randint(CLASSES, (n,), generator=generator))
        for n in sizes
    ]


def tokens() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    found = []
    for n in (3, 4):
        x, y = (torch.randint(k, (n, 5), generator=generator) for k in (11, CLASSES))
        y[0, 2:] = -100
        found.append((x, y))
    return found


def vectors(fisher: fk.FisherApproximation, columns: int = 3) -> Tensor:
    return torch.randn(fisher.size, columns, generator=torch.Generator().manual_seed(2), dtype=F64)


def state(fisher: fk.FisherApproximation) -> Any:
    """Where the rows are, without asking for them."""
    operator = unwrap(fisher)
    assert isinstance(operator, LowRankOperator)
    return operator._rows


def close(got: Tensor, expected: Tensor, tolerance: float = 1e-10) -> None:
    assert float((got - expected).norm()) <= tolerance * float(expected.norm())


# -- the same matrix ---------------------------------------------------------------------------------------------------

OPERATIONS: dict[str, Callable[[fk.FisherApproximation], Tensor]] = {
    "one column": lambda f: f @ vectors(f, 1)[:, 0],
    "columns": lambda f: f @ vectors(f),
    "quadratic form": lambda f: f.quadratic_form(vectors(f)[:, 0]),
    "diagonal": lambda f: f.diagonal(),
    "trace": lambda f: f.trace(),
    "gram": lambda f: f.gram(),
    "dense": lambda f: f.to_dense(),
    "solve": lambda f: f.solve(vectors(f), 1e-2),
    "logdet": lambda f: f.logdet(1e-2),
    "effective dimension": lambda f: f.effective_dimension(1e-2),
    "eigenvalues": lambda f: f.eigenvalues(5),
    "inverse's draw": lambda f: f.factorize(1e-2).sample(torch.Generator().manual_seed(0)),
    "multiple": lambda f: (0.5 * f) @ vectors(f),
    "sum": lambda f: (f + f) @ vectors(f),
    "examples": lambda f: torch.tensor([f.examples, f.rows], dtype=F64),
    "hutchinson": lambda f: torch.as_tensor(fk.estimators.hutchinson_trace(f, samples=20).value),
}


@pytest.mark.parametrize(
    ("operation", "kind"),
    [*((name, "exact") for name in OPERATIONS), *((n, k) for n in ("one column", "gram") for k in ("sf", "truncated"))],
)
def test_later__every_operation_is_that_of_kept_rows(operation: str, kind: str) -> None:
    model, data = perceptron(), batches()
    kept = KINDS[kind](model, data, storage="rows")
    expected = OPERATIONS[operation](kept)
    for before in (0, 1):
        fisher = KINDS[kind](model, data)
        assert isinstance(state(fisher), LaterRows)
        for _ in range(before):
            close(fisher @ vectors(fisher, 1), kept @ vectors(kept, 1))
        close(OPERATIONS[operation](fisher), expected)
        dropped, own = kept.dropped_trace, fisher.dropped_trace
        assert (dropped is None) == (own is None)
        if dropped is not None and own is not None:
            close(own, dropped)


@pytest.mark.parametrize("storage", ["auto", "rows", "stream"])
def test_storage__is_the_matrix_by_hand(storage: str) -> None:
    model, data = perceptron(), batches()
    dense = by_hand.fisher(model, data, "exact")
    fisher = fk.ExactFisher(model, data, storage=storage)
    close(fisher @ vectors(fisher, 1), dense @ vectors(fisher, 1))
    if storage != "stream":  # `test_invariances` has streamed rows
        assert check_fisher(fisher, dense, tolerance=1e-9).refused == ()


@pytest.mark.parametrize("example", ["sequence", "token"])
@pytest.mark.parametrize("normalization", ["mean", "sum"])
def test_later__masked_positions_are_counted_by_the_product(example: str, normalization: str) -> None:
    model, data, options = Tokens(), tokens(), {"example": example, "normalization": normalization}
    kept = fk.ExactFisher(model, data, storage="rows", **options)  # type: ignore[arg-type]
    fisher = fk.ExactFisher(model, data, **options)  # type: ignore[arg-type]
    assert isinstance(state(fisher), LaterRows)
    close(fisher @ vectors(kept, 1), kept @ vectors(kept, 1))
    assert (fisher.examples, fisher.rows) == (kept.examples, kept.rows)
    assert isinstance(state(fisher), LaterRows)


# -- when rows are made ------------------------------------------------------------------------------------------------


class Counter:
    """Of a class that nothing takes for a model's settings."""

    examples = 0


class Counted(nn.Module):
    """Counts the examples that pass through a model."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.counter = model, Counter()

    def forward(self, x: Tensor) -> Tensor:
        self.counter.examples += len(x)
        return self.model(x)


def test_later__a_build_reads_no_batch_through_the_model_and_a_product_each_once() -> None:
    model, data = Counted(perceptron()), batches((30, 30))
    _ = fk.ExactFisher(model, data)
    model.counter.examples = 0
    fisher = fk.ExactFisher(model, data)
    assert model.counter.examples == 2  # what is known of the model is confirmed
    model.counter.examples = 0
    for _ in range(2):
        _ = fisher @ vectors(fisher, 1)
        assert (fisher.examples, len(fisher.metadata["rows"])) == (60, 3)
    assert 120 <= model.counter.examples <= 122  # two examples by themselves, to be compared
    assert isinstance(state(fisher), LaterRows)


def test_later__rows_are_made_when_they_pay() -> None:
    model, data = perceptron(), batches()
    fisher = fk.ExactFisher(model, data)
    problem = state(fisher).problem
    most = products_before_rows(problem.plan, problem.vectors_per_example, problem.examples)
    assert later.FEWEST <= most < 20
    for _ in range(int(most)):
        _ = fisher @ vectors(fisher, 1)
        assert isinstance(state(fisher), LaterRows)
    _ = fisher @ vectors(fisher, 1)
    assert isinstance(state(fisher), Rows)
    many = fk.ExactFisher(model, data)
    _ = many @ vectors(many, int(most) + 1)
    assert isinstance(state(many), Rows)


def test_later__a_failed_product_counts_for_nothing() -> None:
    fisher = fk.ExactFisher(perceptron(), data := batches())
    before = state(fisher).left
    x = data[1][0].clone()
    data[1][0].fill_(0)
    with pytest.raises(fk.DataError):
        _ = fisher @ vectors(fisher, 1)
    assert (state(fisher).left, state(fisher).counted) == (before, None)
    data[1][0].copy_(x)
    close(fisher @ vectors(fisher, 1), fk.ExactFisher(perceptron(), data, storage="rows") @ vectors(fisher, 1))


@pytest.mark.parametrize(
    "at_once",
    [
        lambda m, d: fk.EmpiricalFisher(m, d),
        lambda m, d: fk.ImprovedEmpiricalFisher(m, d),
        lambda m, d: fk.TruncatedFisher(m, d, rank=2),
        lambda m, d: fk.ExactFisher(m, d, storage="rows"),
        lambda m, d: fk.ExactFisher(m, d, max_rows=20),
    ],
    ids=["ef", "ief", "truncated:2", "rows", "max_rows"],
)
def test_storage__rows_are_kept_at_once(at_once: Callable[..., fk.FisherApproximation]) -> None:
    assert isinstance(state(at_once(perceptron(), batches())), Rows)


def test_storage__small_problems_keep_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    assert isinstance(state(fk.ExactFisher(perceptron(), batches())), Rows)


def test_stream__keeps_nothing_and_multiplies_as_streamed_rows_did() -> None:
    model, data = perceptron(), batches()
    stream, small = fk.ExactFisher(model, data, storage="stream"), fk.ExactFisher(model, data, memory_budget=1)
    assert torch.equal(stream @ vectors(stream), small @ vectors(small))
    assert stream.nbytes == 0
    assert {e.structure for e in stream.coverage().entries} == {"full, streamed rows"}
    assert 'storage="stream"' in str(stream.coverage())


# -- refusals ----------------------------------------------------------------------------------------------------------


def in_place(model: nn.Module) -> None:
    with torch.no_grad():
        model[0].weight.mul_(1.1)  # type: ignore[index, operator, union-attr]


def unseen(model: nn.Module) -> None:
    model[0].weight.data.mul_(1.1)  # type: ignore[index, operator, union-attr]


def replaced(model: nn.Module) -> None:
    """By the same numbers in another tensor, which nothing that was kept knows."""
    model.load_state_dict({name: w.clone() for name, w in model.state_dict().items()}, assign=True)


def hooked(model: nn.Module) -> None:
    model.register_forward_hook(lambda module, inputs, z: z * 2)


USES: dict[str, Callable[[fk.FisherApproximation], object]] = {
    "product": lambda f: f @ vectors(f, 1),
    "columns": lambda f: f @ vectors(f),
    "solve": lambda f: f.solve(vectors(f), 1e-2),
    "rows": lambda f: f.stored_rows,
    "examples": lambda f: f.examples,
    "copy": copy.deepcopy,
}


@pytest.mark.parametrize(
    ("before", "change", "use"), pairwise([False, True], [in_place, unseen, replaced, hooked], USES)
)
def test_later__a_changed_model_is_refused(use: str, change: Callable[[nn.Module], None], before: bool) -> None:
    model = perceptron()
    fisher = fk.ExactFisher(model, batches())
    if before:
        _ = fisher @ vectors(fisher, 1)
    change(model)
    if use == "examples" and before:
        assert fisher.examples == 24
        return
    with pytest.raises(fk.ModelError, match=r'changed since the Fisher was built.*storage="rows"'):
        USES[use](fisher)


@dataclasses.dataclass
class Settings:
    """Of a model, as people keep them."""

    scale: float = 1.0
    limits: list[float] = dataclasses.field(default_factory=lambda: [0.0, 100.0])


class Adjustable(nn.Module):
    """Attributes decide what its larger outputs are, which the first two examples do not have."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.head = nn.Linear(6, 5), nn.Linear(5, 4)
        self.scale, self.clip, self.settings = 1.0, False, Settings()
        self.table: dict[str, Any] = {"scale": 1.0, "deep": [{"scale": (1.0, 2.0)}]}
        self.calls, self.sizes, self.last = 0, {"seen": 0}, torch.zeros(1)

    def forward(self, x: Tensor) -> Tensor:
        self.calls, self.last = self.calls + 1, x.detach()
        self.sizes["seen"] += len(x)
        large = x.abs().amax(1, keepdim=True) > 2
        scale = self.scale * self.settings.scale * self.table["scale"] * self.table["deep"][0]["scale"][0]
        scale = scale * (0.5 if self.clip else 1.0) * self.settings.limits[1] / 100
        z: Tensor = self.head(torch.where(large, scale * self.body(x).tanh(), self.body(x).tanh()))
        return z


CHANGES: dict[str, Callable[[Any], None]] = {
    "number": lambda m: setattr(m, "scale", 2.0),
    "switch": lambda m: setattr(m, "clip", True),
    "dictionary": lambda m: m.table.update(scale=2.0),
    "nested": lambda m: m.table["deep"][0].update(scale=(2.0, 2.0)),
    "dataclass": lambda m: setattr(m.settings, "scale", 2.0),
    "list in it": lambda m: m.settings.limits.__setitem__(1, 7.0),
}


@pytest.mark.parametrize("storage", ["stream", "auto"])
@pytest.mark.parametrize("change", CHANGES)
def test_later__a_changed_attribute_is_refused_whose_effect_two_examples_do_not_show(change: str, storage: str) -> None:
    model, generator = Adjustable().double(), torch.Generator().manual_seed(0)
    x = torch.cat([torch.zeros(2, 6), 3 * torch.randn(22, 6, generator=generator)]).double()
    fisher = fk.ExactFisher(model, (x, None), storage=storage)
    before = fisher @ vectors(fisher, 1)
    model(x[:3])  # what it counts itself, and keeps of its last call, is no change
    torch.testing.assert_close(fisher @ vectors(fisher, 1), before)
    CHANGES[change](model)
    with pytest.raises(fk.ModelError, match=r"attributes that have changed.*(scale|clip|table|settings)"):
        _ = fisher @ vectors(fisher, 1)


def test_later__hooks_and_attributes_that_change_nothing_are_none() -> None:
    model = perceptron()
    fisher = fk.ExactFisher(model, batches())
    expected = fisher @ vectors(fisher)
    model.register_forward_hook(lambda module, inputs, z: None)
    model.name = "other"  # type: ignore[assignment]
    torch.testing.assert_close(fisher @ vectors(fisher), expected)


def test_later__a_model_that_draws_numbers_is_refused() -> None:
    model = nn.Sequential(perceptron(), nn.Dropout(0.5)).eval()
    fisher = fk.ExactFisher(model, batches())
    _ = fisher @ vectors(fisher, 1)
    model.train()
    with pytest.raises(fk.ModelError, match="train mode"):
        _ = fisher @ vectors(fisher, 1)


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("before", [False, True], ids=["at once", "after a product"])
def test_later__changed_data_are_refused(use: str, before: bool) -> None:
    data = batches()
    fisher = fk.ExactFisher(perceptron(), data)
    if before:
        _ = fisher @ vectors(fisher, 1)
    data[1][0].mul_(2)
    if use == "examples" and before:
        assert fisher.examples == 24
        return
    with pytest.raises(fk.DataError, match=r'change between passes.*storage="rows"'):
        USES[use](fisher)


def test_later__a_change_after_rows_were_made_is_none() -> None:
    model, data = perceptron(), batches()
    fisher = fk.ExactFisher(model, data)
    expected = fisher.solve(vectors(fisher), 1e-2)
    in_place(model)
    data[0][0].fill_(0)
    close(fisher.solve(vectors(fisher), 1e-2), expected, 0.0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"storage": "disk"}, "one of"),
        ({"storage": "rows", "structure": "kfac"}, 'structure="full"'),
        ({"storage": "stream", "structure": "block"}, 'structure="full"'),
        ({"storage": "stream", "max_rows": 5}, "max_rows=None"),
    ],
    ids=str,
)
def test_storage__refuses_what_it_has_no_meaning_for(options: dict[str, Any], message: str) -> None:
    with pytest.raises(fk.InvalidArgumentError, match=message):
        fk.ExactFisher(perceptron(), batches(), **options)


def test_rows__that_do_not_fit_are_refused() -> None:
    with pytest.raises(fk.MemoryBudgetError, match='storage="stream"'):
        fk.ExactFisher(perceptron(), batches(), storage="rows", memory_budget=1_000)


def test_later__without_an_example_that_counts_is_refused() -> None:
    x, y = batches()[0]
    fisher = fk.ExactFisher(perceptron(), (x, torch.full_like(y, -100)))
    for use in USES.values():
        with pytest.raises(fk.DataError, match="no example with a label that counts"):
            use(fisher)


# -- a better plan -----------------------------------------------------------------------------------------------------


class Rare(nn.Module):
    """A second head that only examples with a large number use."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = perceptron(), nn.Linear(5, CLASSES).double()

    def forward(self, x: Tensor) -> Tensor:
        z: Tensor = self.body(x)
        parts = [a + self.head(b) if float(b[0, 2]) > 100 else a for a, b in zip(z.split(1), x.split(1), strict=True)]
        return torch.cat(parts)


@pytest.mark.parametrize("before", [False, True], ids=["at once", "after a product"])
def test_later__a_batch_may_show_a_better_plan(before: bool) -> None:
    data = batches()
    data[1][0][3, 2] = 200.0
    model = Rare()
    kept = fk.ExactFisher(model, data, storage="rows")
    fisher = fk.ExactFisher(model, data)
    assert isinstance(state(fisher), LaterRows)
    if before:
        close(fisher @ vectors(fisher, 1), kept @ vectors(fisher, 1))
    close(fisher.solve(vectors(fisher), 1e-2), kept.solve(vectors(fisher), 1e-2))
    assert isinstance(state(fisher), Rows)
    assert {e.rule for e in fisher.coverage().entries} == {"linear"}


# -- what is recorded, copied and left alone ---------------------------------------------------------------------------


def test_repr_and_coverage__compute_nothing() -> None:
    model = Counted(perceptron())
    fisher = fk.ExactFisher(model, batches())
    model.counter.examples = 0
    assert "exact full, D = " in repr(fisher)
    assert "R = " not in repr(fisher)
    assert "rows later" in str(fisher.coverage())
    assert model.counter.examples == 0
    _ = fisher @ vectors(fisher, 1)
    assert (fisher.metadata["examples"], fisher.metadata["rows"]) == ("24", "120")
    assert "N = 24, R = 120, mean" in repr(fisher)


def test_coverage__says_what_and_why_before_and_after() -> None:
    model, data = perceptron(), batches()
    fisher, kept = fk.ExactFisher(model, data), fk.ExactFisher(model, data, storage="rows")
    before = fisher.coverage()
    assert {(e.structure, e.memory) for e in before.entries} == {("full, rows later", 0)}
    assert "are not made yet: they pay from" in str(before)
    _ = fisher.diagonal()
    assert fisher.coverage() == kept.coverage()
    assert fisher.metadata == kept.metadata
    assert fisher.nbytes == kept.nbytes > 0


@pytest.mark.parametrize("before", [0, 1])
def test_save__makes_the_rows_first(before: int, tmp_path: Path) -> None:
    model, data = perceptron(), batches()
    fisher, kept = fk.ExactFisher(model, data), fk.ExactFisher(model, data, storage="rows")
    for _ in range(before):
        _ = fisher @ vectors(fisher, 1)
    fisher.save(tmp_path / "later")
    kept.save(tmp_path / "kept")
    loaded = fk.load(tmp_path / "later")
    assert loaded.metadata == fk.load(tmp_path / "kept").metadata
    close(loaded.to_dense(), kept.to_dense())


COPIES: dict[str, Callable[[Any], Any]] = {
    "copy": copy.copy, "deepcopy": copy.deepcopy, "pickle": lambda f: pickle.loads(pickle.dumps(f)),
    "the operator": lambda f: copy.deepcopy(unwrap(f)),
}  # fmt: skip


@pytest.mark.parametrize("way", COPIES)
def test_copies__hold_rows_and_no_model(way: str) -> None:
    model, data = perceptron(), batches()
    expected = fk.ExactFisher(model, data, storage="rows").to_dense()
    made = COPIES[way](fk.ExactFisher(model, data))
    in_place(model)
    close(made.to_dense(), expected)
    if way != "the operator":
        assert (made.examples, made.rows) == (24, 24 * (CLASSES - 1))
        assert "rows later" not in str(made.coverage())


def test_later__lets_the_model_and_the_data_go() -> None:
    fisher = fk.ExactFisher(model := perceptron(), batches())
    _ = fisher.diagonal(), fisher.examples
    watch = weakref.ref(model)
    del model
    gc.collect()
    assert watch() is None


@pytest.mark.parametrize("failing", [False, True])
def test_later__leaves_no_trace(failing: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model, data = Tokens(), tokens()
    fisher = fk.ExactFisher(model, data)
    with untouched(model, data):
        _ = fisher @ vectors(fisher, 1)
        _ = fisher.examples, fisher.coverage()
        if failing:
            with monkeypatch.context() as patch:
                patch.setattr(Tokens, "forward", lambda self, x: self.head(self.layer(self.embed(x))) / (1 // 0))
                with pytest.raises(ZeroDivisionError):
                    _ = fisher @ vectors(fisher, 1)
        _ = fisher.diagonal()
