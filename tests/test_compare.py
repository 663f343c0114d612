"""Tables of updates against the formulas, what is refused of them, and their pictures."""

import json
import math
import re
import statistics
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fisherkit as fk
from fisherkit import build
from fisherkit.evaluation import QualityRow, QualityTable, average, compare, plot_damping
from fisherkit.structures import Block, Full, base
from tests import snapshot
from tests.reference import updates as reference
from tests.test_evaluation import line

F64 = torch.float64
DAMPINGS = (1e-6, 1e-3, 1e-1)
Batch = tuple[Tensor, Tensor]


def network(classes: int = 3) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, classes)).to(F64)


def data(n: int = 12, classes: int = 3, seed: int = 1) -> Batch:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, 5, generator=g, dtype=F64), torch.randint(classes, (n,), generator=g)


def rows_of(table: QualityTable, kind: str, structure: str | None = None) -> list[QualityRow]:
    return [r for r in table.rows if r.kind == kind and structure in {None, r.structure}]


# -- values --------------------------------------------------------------------------------------------------


def expected_updates(model: nn.Module, batch: Batch, kind: str, damping: float) -> Tensor:
    losses, outputs, p = reference.per_example(model, *batch)
    gradient = losses.sum(0)
    squared = (p - torch.nn.functional.one_hot(batch[1], p.shape[1])).square().sum(1)
    name, _, setting = kind.partition(":")
    if name in {"ef", "ief"}:
        power = 0.0 if name == "ef" else float(setting or 1)
        return reference.empirical_update(losses, squared**power, damping)
    if name == "truncated":
        fisher = reference.truncated_fisher(outputs, p, batch[1], int(setting or 2))
    elif name == "exact":
        fisher = reference.exact_fisher(outputs, p)
    else:
        # Which labels are drawn is the seed's business; that the matrix is theirs is tested with the kind.
        draws = int(setting or 1)
        fisher = fk.SampledFisher(model, batch, draws=draws, seed=3, normalization="sum").to_dense()
    return reference.damped_solve(fisher, gradient, damping)


@pytest.mark.parametrize("kind", ["ef", "ief", "ief:0.5", "sf", "sf:2", "truncated", "truncated:1", "exact"])
def test_compare__is_the_formulas(kind: str) -> None:
    model, batch = network(), data()
    losses, outputs, p = reference.per_example(model, *batch)
    fisher, gradient = reference.exact_fisher(outputs, p), losses.sum(0)
    table = compare(model, batch, kinds=(kind,), gram_dampings=DAMPINGS, seed=3)
    assert [row.damping for row in table.rows] == list(DAMPINGS)
    for row, damping in zip(table.rows, DAMPINGS, strict=True):
        update = expected_updates(model, batch, kind, damping)
        gamma = reference.quality(update, fisher, gradient)
        assert row.gamma == pytest.approx(gamma, rel=1e-6)
        assert row.relative_gamma == pytest.approx(gamma / reference.quality(gradient, fisher, gradient), rel=1e-6)
        assert row.update_norm == pytest.approx(float(update.norm()), rel=1e-5)
        norms = losses.norm(dim=1)
        assert row.imbalance == pytest.approx(float(norms.std(correction=0) / norms.mean()))


@pytest.mark.parametrize("kind", ["ef", "ief", "sf", "truncated:1", "exact"])
def test_compare__in_blocks_is_the_formulas_module_by_module(kind: str) -> None:
    model, batch = network(), data()
    losses, outputs, p = reference.per_example(model, *batch)
    parts = [slice(0, 24), slice(24, 39)]
    pieces = []
    for part in parts:
        if kind in {"ef", "ief"}:
            squared = (p - torch.nn.functional.one_hot(batch[1], 3)).square().sum(1)
            right = squared if kind == "ief" else torch.ones_like(squared)
            pieces.append(reference.empirical_update(losses[:, part], right, 1e-3))
            continue
        whole = (
            fk.SampledFisher(model, batch, normalization="sum").to_dense()
            if kind == "sf"
            else reference.truncated_fisher(outputs, p, batch[1], 1 if kind == "truncated:1" else 2)
        )
        pieces.append(reference.damped_solve(whole[part, part], losses.sum(0)[part], 1e-3))
    row = compare(model, batch, kinds=(kind,), structures=("block",), gram_dampings=(1e-3,)).rows[0]
    gamma = reference.quality(torch.cat(pieces), reference.exact_fisher(outputs, p), losses.sum(0))
    assert row.gamma == pytest.approx(gamma, rel=1e-7)


def test_compare__asks_what_a_structure_is_and_not_for_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base, "_BY_NAME", dict(base._BY_NAME))
    for parent in (Full, Block):
        type(f"Own{parent.__name__}", (parent,), {"name": f"own {parent.name}", "__module__": __name__})
    structures = ("full", "own full", "block", "own block")
    rows = compare(network(), data(), kinds=("ief", "exact"), structures=structures, gram_dampings=(1e-3,)).rows
    gammas = [row.gamma for row in rows]
    assert gammas[:2] + gammas[4:6] == gammas[2:4] + gammas[6:8]


@pytest.mark.parametrize("structure", ["diagonal", "kfac", "ekfac"])
def test_compare__solves_other_structures_by_their_own_fisher(structure: str) -> None:
    model, batch = network(), data()
    losses, outputs, p = reference.per_example(model, *batch)
    fisher, gradient = reference.exact_fisher(outputs, p), losses.sum(0)
    table = compare(model, batch, kinds=("sgd", "ief", "exact"), structures=(structure,), gram_dampings=(1e-2,))
    for row, kind in zip(table.rows[1:], (fk.ImprovedEmpiricalFisher, fk.ExactFisher), strict=True):
        own = kind(model, batch, structure=structure, normalization="sum")
        gamma = reference.quality(own.solve(gradient, 1e-2), fisher, gradient)
        assert row.gamma == pytest.approx(gamma, rel=1e-9)
        assert row.structure == structure


def test_compare__has_one_row_for_the_gradient_and_one_for_each_combination() -> None:
    table = compare(network(), data(), structures=("full", "diagonal"), gram_dampings=(1e-3, 1e-1))
    sgd, *others = table.rows
    assert (sgd.kind, sgd.structure, sgd.damping, sgd.relative_gamma, sgd.rows) == ("sgd", "none", None, 1.0, 0)
    assert [(r.kind, r.structure, r.damping) for r in others] == [
        (kind, structure, damping)
        for structure in ("full", "diagonal")
        for kind in ("ef", "ief", "sf", "exact")
        for damping in (1e-3, 1e-1)
    ]
    assert [r.rows for r in others[:8:2]] == [12, 12, 12, 24]
    assert (table.examples, table.dropped) == (12, 0)


@pytest.mark.parametrize(
    ("theta", "natural", "empirical"), [((1.0, -0.9), 0.746, 3.77), ((0.5, 1.0), 0.981, 1.63)], ids=str
)
def test_compare__is_the_papers_on_its_toy_example(
    theta: tuple[float, float], natural: float, empirical: float
) -> None:
    model, batch = line(slope=theta[1], intercept=theta[0])
    table = compare(
        model, batch, kinds=("ef", "ief", "truncated:1", "exact"), gram_dampings=(1e-9,), likelihood="gaussian"
    )
    ef, *others = [row.relative_gamma for row in table.rows]
    assert ef == pytest.approx(empirical, abs=5e-3)
    assert others == pytest.approx([natural] * 3, abs=5e-4)


# -- theorems ------------------------------------------------------------------------------------------------


def test_compare__exact_is_best_and_truncated_at_full_rank_is_exact() -> None:
    table = compare(network(), data(), kinds=("ef", "ief", "sf", "truncated:2", "truncated:0.0", "exact"))
    best = {row.damping: row for row in rows_of(table, "exact")}
    assert all(row.gamma >= best[1e-7].gamma * (1 - 1e-9) for row in table.rows)
    for kind in ("truncated:2", "truncated:0.0"):
        for row in rows_of(table, kind):
            assert row.gamma == pytest.approx(best[row.damping].gamma, rel=1e-9)


class Scaled(fk.likelihoods.Gaussian):
    """½ scale ‖z − y‖²: the same model and data with a loss of another unit."""

    def __init__(self, scale: float) -> None:
        self.scale = scale

    def gradient(self, z: Tensor, target: Tensor) -> Tensor:
        return self.scale * (z - target)

    def hessian_factor(self, z: Tensor) -> Tensor:
        return self.scale**0.5 * super().hessian_factor(z)

    def hessian_columns(self, z: Tensor, index: Tensor) -> Tensor:
        return self.scale**0.5 * super().hessian_columns(z, index)

    def hessian_matmul(self, z: Tensor, w: Tensor) -> Tensor:
        return self.scale * w

    def hessian_diagonal(self, z: Tensor) -> Tensor:
        return self.scale * torch.ones_like(z)

    def hessian_inverse_form(self, z: Tensor, target: Tensor) -> Tensor:
        return self.scale * (z - target).square().sum(-1)


def test_compare__relative_gamma_does_not_depend_on_the_scale_of_the_loss() -> None:
    model, (x, y) = network(), data()
    batch = x, torch.nn.functional.one_hot(y, 3).double()
    one, ten = (
        compare(model, batch, kinds=("ef", "ief", "truncated:1", "exact"), gram_dampings=(1e-10,), likelihood=loss)
        for loss in (Scaled(1.0), Scaled(10.0))
    )
    for a, b in zip(one.rows, ten.rows, strict=True):
        assert a.relative_gamma == pytest.approx(b.relative_gamma, rel=1e-5)
        assert a.gamma == pytest.approx(b.gamma * 10**0.5, rel=1e-5)


def test_compare__small_damping_does_not_cancel_in_float32() -> None:
    model, (x, y) = network(), data(40)
    wide = compare(model, (x, y), kinds=("ief", "truncated:1", "exact"), gram_dampings=(1e-7, 1e-3))
    narrow = compare(model.float(), (x.float(), y), kinds=("ief", "truncated:1", "exact"), gram_dampings=(1e-7, 1e-3))
    for a, b in zip(wide.rows, narrow.rows, strict=True):
        assert a.gamma == pytest.approx(b.gamma, rel=1e-3)


@pytest.mark.parametrize("structure", ["full", "block", "kfac"])
def test_compare__judges_alike_with_the_exact_fishers_rows_and_without(structure: str) -> None:
    model, batch = network(classes=6), data(classes=6)
    options: dict[str, Any] = {"structures": (structure,), "gram_dampings": (1e-2,)}
    by_rows = compare(model, batch, kinds=("ef", "truncated:1", "exact"), **options)
    by_passes = compare(model, batch, kinds=("ef", "truncated:1"), **options)
    for a, b in zip(by_rows.rows, by_passes.rows, strict=False):
        assert a.gamma == pytest.approx(b.gamma, rel=1e-7)


def test_compare__does_without_the_exact_fishers_rows_where_they_do_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = network(classes=6), data(n=40, classes=6)
    options: dict[str, Any] = {"kinds": ("ef", "truncated:1", "exact"), "gram_dampings": (1e-2,)}
    expected = compare(model, batch, **options)
    # Half of it is the budget: enough for a few rows an example, not for seven.
    monkeypatch.setattr(build, "available_memory", lambda _: 20_000)
    found = compare(model, batch, **options)
    for a, b in zip(expected.rows, found.rows, strict=True):
        assert a.gamma == pytest.approx(b.gamma, rel=1e-6)
    monkeypatch.setattr(build, "available_memory", lambda _: 100)
    with pytest.raises(fk.MemoryBudgetError, match="rows that do not fit in memory"):
        compare(model, batch, **options)


def test_compare__sampled_rows_that_span_the_gradient_do_not_cancel_in_float32() -> None:
    # Of two classes the gradient at either label is a multiple of the same vector.
    model, (x, y) = network(classes=2), data(classes=2)
    wide = compare(model, (x, y), kinds=("sf",), gram_dampings=(1e-7, 1e-3))
    narrow = compare(model.float(), (x.float(), y), kinds=("sf",), gram_dampings=(1e-7, 1e-3))
    for a, b in zip(wide.rows, narrow.rows, strict=True):
        assert a.update_norm < 1e5
        assert a.gamma == pytest.approx(b.gamma, rel=1e-2)


@pytest.mark.parametrize("kind", ["truncated:1", "exact"])
def test_compare__of_an_example_that_is_certain_and_wrong(kind: str) -> None:
    # Its probability underflows and with it the example's Fisher: its gradient is in no row's span.
    model, (x, y) = nn.Linear(5, 3).to(F64), data()
    with torch.no_grad():
        x[0] = model.weight[(int(y[0]) + 1) % 3] * 2e4
    losses, outputs, p = reference.per_example(model, x, y)
    assert float(p[0, y[0]]) == 0
    fisher, gradient = reference.exact_fisher(outputs, p), losses.sum(0)
    row = compare(model, (x, y), kinds=(kind,), gram_dampings=(1e-3,)).rows[0]
    assert math.isfinite(row.gamma)
    if kind == "exact":
        update = reference.damped_solve(fisher, gradient, 1e-3)
        assert row.gamma == pytest.approx(reference.quality(update, fisher, gradient), rel=1e-6)


# -- data ----------------------------------------------------------------------------------------------------


def test_compare__near_duplicates_change_gamma_and_are_dropped_only_when_asked() -> None:
    # Nearly the same inputs with the other label: no step along them can lower both losses.
    model, (x, y) = network(classes=2), data(classes=2)
    generator = torch.Generator().manual_seed(2)
    close = x[:4] + 1e-3 * torch.randn(4, 5, generator=generator, dtype=F64)
    batch = torch.cat([x, close]), torch.cat([y, 1 - y[:4]])
    options: dict[str, Any] = {"kinds": ("sgd", "ef", "ief", "exact"), "gram_dampings": (1e-7,)}
    kept, dropped = compare(model, batch, **options), compare(model, batch, **options, drop_duplicates=0.9999)
    assert (kept.dropped, dropped.dropped) == (0, 4)
    assert kept.examples == dropped.examples == 16
    a, b = rows_of(kept, "ef")[0], rows_of(dropped, "ef")[0]
    assert abs(math.log2(a.relative_gamma / b.relative_gamma)) > 1
    assert (a.rows, b.rows) == (16, 12)
    assert rows_of(kept, "ief")[0].gamma != pytest.approx(rows_of(dropped, "ief")[0].gamma, rel=0.1)
    for kind in ("sgd", "exact"):
        assert rows_of(kept, kind)[0].gamma == rows_of(dropped, kind)[0].gamma
    assert "4 of them left out" in str(dropped)


@pytest.mark.parametrize("structure", ["full", "block", "kfac"])
def test_compare__dropped_examples_are_as_if_the_updates_had_not_seen_them(structure: str) -> None:
    model, (x, y) = network(), data()
    batch = torch.cat([x, x[:3]]), torch.cat([y, y[:3]])
    table = compare(model, batch, kinds=("ef", "ief", "truncated:1"), structures=(structure,), drop_duplicates=0.99999)
    without = compare(model, (x, y), kinds=("ef", "ief", "truncated:1"), structures=(structure,))
    assert table.dropped == 3
    for a, b in zip(table.rows, without.rows, strict=True):
        assert a.update_norm == pytest.approx(b.update_norm, rel=1e-6)


def test_compare__ignored_labels_do_not_count() -> None:
    model, (x, y) = network(), data()
    masked = torch.cat([x, x[:2] * 3]), torch.cat([y, torch.full((2,), -100)])
    kinds = ("ef", "ief", "sf", "truncated:1", "truncated:0.3", "exact")
    a, b = compare(model, masked, kinds=kinds), compare(model, (x, y), kinds=kinds)
    assert a.examples == b.examples == 12
    assert [row.gamma for row in a.rows] == pytest.approx([row.gamma for row in b.rows])


def test_compare__tokens_are_examples_of_their_own() -> None:
    x, y = data(12)
    model = network()
    kinds = ("ef", "ief", "truncated:1", "exact")
    flat = compare(model, (x, y), kinds=kinds)
    token = compare(model, (x.reshape(4, 3, 5), y.reshape(4, 3)), kinds=kinds, example="token")
    sequence = compare(model, (x.reshape(4, 3, 5), y.reshape(4, 3)), kinds=kinds)
    assert (token.examples, sequence.examples) == (12, 4)
    assert [row.gamma for row in token.rows] == pytest.approx([row.gamma for row in flat.rows])
    # Rows are sums over positions for EF and iEF; the exact Fisher is the same.
    assert rows_of(sequence, "exact")[0].gamma == pytest.approx(rows_of(flat, "exact")[0].gamma)
    assert rows_of(sequence, "ef")[0].rows == 4


def test_compare__leaves_the_model_as_it_was() -> None:
    model, batch = network(), data()
    with snapshot.untouched(model, batch):
        compare(model, batch, structures=("full", "block", "kfac"), drop_duplicates=0.99)


def test_compare__of_some_parameters() -> None:
    model, batch = network(), data()
    table = compare(model, batch, params=["2.weight", "2.bias"], kinds=("exact",), gram_dampings=(1e-8,))
    exact = fk.ExactFisher(model, batch, params=["2.weight", "2.bias"], normalization="sum")
    gradient = fk.evaluation.loss_gradient(model, batch, params=["2.weight", "2.bias"], normalization="sum")
    floor = fk.evaluation.quality_floor(exact, gradient, 1e-8)
    assert table.rows[0].gamma == pytest.approx(float(floor), rel=1e-6)


# -- the table -----------------------------------------------------------------------------------------------


def test_table__as_text_and_dict() -> None:
    table = compare(network(), data(), kinds=("sgd", "truncated:1"), gram_dampings=(1e-3,))
    text = str(table)
    assert text.splitlines()[0].startswith("N = 12 examples; gradient-norm imbalance ")
    assert "γ/γ_SGD" in text
    assert re.search(r"truncated:1 +full +0\.001 ", text)
    assert QualityTable.from_dict(json.loads(json.dumps(table.to_dict()))) == table


DAMAGES: dict[str, Callable[[Any], object]] = {
    "nothing": lambda _: None,
    "a list": lambda found: [found],
    "no rows": lambda found: {name: value for name, value in found.items() if name != "rows"},
    "rows of a number": lambda found: {**found, "rows": 3},
    "a row of a number": lambda found: {**found, "rows": [3]},
    "a row without γ": lambda found: {**found, "rows": [{k: v for k, v in found["rows"][0].items() if k != "gamma"}]},
    "a row with more": lambda found: {**found, "rows": [{**found["rows"][0], "more": 1}]},
    "γ of text": lambda found: {**found, "rows": [{**found["rows"][0], "gamma": "0.5"}]},
    "a kind that is none": lambda found: {**found, "rows": [{**found["rows"][0], "kind": None}]},
    "examples of text": lambda found: {**found, "examples": "12"},
    "half an example": lambda found: {**found, "dropped": 0.5},
}


@pytest.mark.parametrize("name", DAMAGES)
def test_table__of_a_damaged_dict_is_refused(name: str) -> None:
    found = compare(network(), data(), kinds=("sgd",)).to_dict()
    with pytest.raises(
        fk.InvalidArgumentError, match=r"QualityTable.from_dict: got .*; expected what to_dict\(\) gave"
    ):
        QualityTable.from_dict(DAMAGES[name](found))  # type: ignore[arg-type]


def test_table__takes_whole_numbers_where_others_write_them() -> None:
    found = compare(network(), data(), kinds=("sgd",)).to_dict()
    assert QualityTable.from_dict({**found, "seconds": 1, "more": 2}).seconds == 1


# -- what `compare` refuses --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"kinds": ("newton",)}, fk.InvalidArgumentError, "expected one of ['sgd', 'ef'"),
        ({"kinds": ("ef:2",)}, fk.InvalidArgumentError, "'ef' has no setting"),
        ({"kinds": ("sf:0",)}, fk.InvalidArgumentError, "draws must be an integer, 1 or more"),
        ({"kinds": ("truncated:0",)}, fk.InvalidArgumentError, "rank must be an integer, 1 or more"),
        ({"kinds": ("truncated:1.5",)}, fk.InvalidArgumentError, "tolerance must be a number from 0 to below 1"),
        ({"kinds": ("truncated:",)}, fk.InvalidArgumentError, "got kind='truncated:'"),
        ({"kinds": ("ief:2",)}, fk.InvalidArgumentError, "power must be a number from 0 to 1"),
        ({"kinds": "ef"}, fk.InvalidTypeError, 'kinds=("...",)'),
        ({"kinds": ("ef", "ief", "ef")}, fk.InvalidArgumentError, "kinds with 'ef' twice"),
        ({"gram_dampings": (1e-3, 1e-3)}, fk.InvalidArgumentError, "gram_dampings with 0.001 twice"),
        ({"kinds": ()}, fk.InvalidArgumentError, "got no kinds"),
        ({"kinds": (1,)}, fk.InvalidTypeError, "a kind of type int"),
        ({"structures": ("dense",)}, fk.InvalidArgumentError, "structure='dense'"),
        ({"gram_dampings": (0.0,)}, fk.InvalidArgumentError, "gram damping=0.0"),
        ({"gram_dampings": (math.inf,)}, fk.InvalidArgumentError, "gram damping=inf"),
        ({"gram_dampings": ("1",)}, fk.InvalidTypeError, "gram damping of type str"),
        ({"gram_dampings": 1e-3}, fk.InvalidTypeError, "gram_dampings of type float"),
        ({"gram_dampings": ()}, fk.InvalidArgumentError, "no gram_dampings"),
        ({"drop_duplicates": 1.0}, fk.InvalidArgumentError, "a number above 0 and below 1"),
        ({"drop_duplicates": "yes"}, fk.InvalidTypeError, "drop_duplicates of type str"),
        ({"seed": 0.5}, fk.InvalidTypeError, "seed of type float"),
        ({"likelihood": "weibull"}, fk.InvalidArgumentError, "weibull"),
        ({"example": "word"}, fk.InvalidArgumentError, "example='word'"),
    ],
    ids=str,
)
def test_compare__refuses(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        compare(network(), data(), **options)


def test_compare__refuses_other_models_and_batches() -> None:
    model, (x, y) = network(), data()
    stranger: Any = model.forward
    with pytest.raises(fk.InvalidTypeError, match="as model"):
        compare(stranger, (x, y))
    with pytest.raises(fk.InvalidTypeError, match="a batch of type"):
        compare(model, x)
    with pytest.raises(fk.DataError, match="no targets"):
        compare(model, (x, None))
    with pytest.raises(fk.ModelError):
        compare(nn.Sequential(model, nn.Dropout(0.5)), (x, y))
    with pytest.raises(fk.DataError, match="no example with a label"):
        compare(model, (x, torch.full_like(y, -100)))


def test_compare__refuses_duplicate_tokens_in_structures_built_from_data() -> None:
    x, y = data(12)
    batch = x.reshape(4, 3, 5), y.reshape(4, 3)
    with pytest.raises(fk.InvalidArgumentError, match="tokens cannot be taken out"):
        compare(network(), batch, structures=("kfac",), example="token", drop_duplicates=0.9)


def test_compare__takes_one_batch_and_says_so() -> None:
    x, y = data(12)
    for batches in ([(x, y)], [(x, y), (x, y)]):
        with pytest.raises(fk.InvalidTypeError, match=r"a list of \d batches; expected one batch"):
            compare(network(), batches)


def test_compare__says_which_kind_a_loss_does_not_have() -> None:
    """SF is among the default kinds, and a weighted loss has no labels to draw."""
    x, y = data()
    weighted = nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 3.0], dtype=x.dtype))
    with pytest.raises(
        fk.InvalidArgumentError, match=r"^compare, kind 'sf', structure 'full': .*kinds= or structures="
    ):
        compare(network(), (x, y), likelihood=weighted)
    assert len(compare(network(), (x, y), likelihood=weighted, kinds=("sgd", "ef"), gram_dampings=(0.1,)).rows) == 2


# -- pictures and averages of `compare`'s tables -----------------------------------------------------------------------


def tables() -> list[QualityTable]:
    kinds, structures = ("sgd", "ef", "ief"), ("full", "diagonal")
    return [
        compare(network(), data(seed=s), kinds=kinds, structures=structures, gram_dampings=(1e-3, 1e-1)) for s in (1, 2)
    ]


def test_average__is_mean_and_deviation_over_batches() -> None:
    both = tables()
    found = average(both)
    values = [table.rows[1].relative_gamma for table in both]
    assert found["ef", "full", 1e-3] == pytest.approx((statistics.fmean(values), statistics.stdev(values)))
    assert found["sgd", "none", None] == (1.0, 0.0)
    assert average(both[:1])["ef", "full", 1e-3] == (values[0], 0.0)


def test_average__refuses_tables_of_different_updates() -> None:
    one, two = tables()
    with pytest.raises(fk.InvalidArgumentError, match="different kinds"):
        average([one, replace(two, rows=two.rows[1:])])
    with pytest.raises(fk.InvalidArgumentError, match="no table"):
        average([])


def test_plots__are_files(tmp_path: Path) -> None:
    both = tables()
    plot_damping(both[0], tmp_path / "one.png")
    plot_damping(both, tmp_path / "two.svg")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one.png", "two.svg"]
    assert (tmp_path / "one.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in (tmp_path / "two.svg").read_text(encoding="utf-8")


def test_plots__say_what_they_cannot_draw(tmp_path: Path) -> None:
    table = tables()[0]
    alone = replace(table, rows=table.rows[:1])
    with pytest.raises(fk.InvalidArgumentError, match="alone"):
        plot_damping(alone, tmp_path / "run.png")
    with pytest.raises(fk.InvalidArgumentError, match="a folder that does not exist"):
        plot_damping(table, tmp_path / "none" / "run.png")
    assert list(tmp_path.iterdir()) == []
