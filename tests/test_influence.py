"""Options of influence scores: measurements, breakdowns, normalisation, selection, blocks, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import fisherkit as fk
from fisherkit.influence import InfluenceScores, model_rows
from fisherkit.influence.blocks import OncePerExample, RowBlock
from tests import by_hand
from tests.conformance_cases import build, problem
from tests.influence_cases import data
from tests.small_data import F64, X, Y, cut, mlp, normal, same
from tests.snapshot import untouched

STRUCTURES = ("full", "block", "diagonal", "kfac", "ekfac")
QUERIES = (normal(3, 4, seed=5), torch.tensor([1, 0, 2]))


def influence(structure: str = "full", **options: Any) -> tuple[InfluenceScores, nn.Module]:
    model = mlp()
    return InfluenceScores(fk.TruncatedFisher(model, (X, Y), structure=structure), model, **options), model


def gradients(model: nn.Module, values: Tensor) -> Tensor:
    """Of each value, [B, D]."""
    return torch.stack([by_hand.gradient(value, model) for value in values])


def expected(scores: InfluenceScores, model: nn.Module, values: Tensor) -> Tensor:
    losses = nn.functional.cross_entropy(model(X), Y, reduction="none")
    return gradients(model, values) @ scores._inverse.matvec(gradients(model, losses).T.contiguous()) / len(X)


# -- measurements ----------------------------------------------------------------------------------------------------


def test_scores__of_margins_are_minus_the_log_odds_gradient_s() -> None:
    scores, model = influence()
    log_p = -nn.functional.cross_entropy(model(QUERIES[0]), QUERIES[1], reduction="none")
    margin = log_p - torch.log1p(-log_p.exp())
    same(scores.scores(QUERIES, (X, Y), measurement="margin"), expected(scores, model, -margin))


def test_scores__of_bernoulli_margins_are_minus_the_signed_logits() -> None:
    of = problem("bernoulli_multilabel")
    fisher = build("bernoulli_multilabel", "ef", "full")
    hard = (of.targets > 0.5).to(F64)
    scores = InfluenceScores(fisher, of.model)
    found = scores.scores((of.inputs, hard), data(of), measurement="margin")

    def signed(outputs: Tensor, targets: Tensor | None) -> Tensor:
        assert targets is not None
        return -((2 * targets - 1) * outputs).sum(1)

    same(found, scores.scores((of.inputs, hard), data(of), measurement=signed))


def test_scores__of_a_function_are_those_of_its_gradient() -> None:
    scores, model = influence()

    def brier(outputs: Tensor, targets: Tensor | None) -> Tensor:
        assert targets is not None
        assert targets.shape == outputs.shape[:1]
        return (outputs.softmax(1) - nn.functional.one_hot(targets, 3)).square().sum(1)

    same(
        scores.scores(QUERIES, (X, Y), measurement=brier), expected(scores, model, brier(model(QUERIES[0]), QUERIES[1]))
    )
    found = scores.scores((QUERIES[0], None), (X, Y), measurement=lambda z, _: z[:, 1])
    same(found, expected(scores, model, model(QUERIES[0])[:, 1]))


@pytest.mark.parametrize("family", ["gaussian_scalar", "bernoulli_scalar", "token_mlp", "gaussian_vector"])
def test_functions__get_outputs_and_targets_as_the_model_and_the_data_have_them(family: str) -> None:
    of = problem(family)
    scores = InfluenceScores(build(family, "ef", "full"), of.model)
    shapes = []

    def loss(outputs: Tensor, targets: Tensor | None) -> Tensor:
        assert targets is not None
        shapes.append((outputs.shape, targets.shape))
        if of.likelihood == "categorical":
            flat = nn.functional.cross_entropy(outputs.flatten(0, 1), targets.flatten(), reduction="none")
            return flat.reshape(targets.shape).sum(1)
        if of.likelihood == "bernoulli":
            return nn.functional.binary_cross_entropy_with_logits(outputs, targets, reduction="none")
        return (
            0.5 * (outputs - targets).square().flatten(1).sum(1) if outputs.ndim > 1 else 0.5 * (outputs - targets) ** 2
        )

    same(scores.scores(data(of), data(of), measurement=loss), scores.scores(data(of), data(of)))
    assert shapes[-1] == (of.model(of.inputs).shape, of.targets.shape)


# -- breakdowns ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("structure", STRUCTURES)
def test_scores__by_module_are_the_modules_summands(structure: str) -> None:
    scores, model = influence(structure)
    found = scores.scores(QUERIES, (X, Y), by="module")
    assert list(found) == ["0", "2"]
    losses = [nn.functional.cross_entropy(model(x), y, reduction="none") for x, y in (QUERIES, (X, Y))]
    q, g = (gradients(model, values) for values in losses)
    solved = scores._inverse.matvec(q.T.contiguous())
    for name, part in (("0", slice(0, 25)), ("2", slice(25, None))):
        same(found[name], solved[part].T @ g[:, part].T / 7)


@pytest.mark.parametrize("family", ["token_attention", "token_attention_by_token", "token_mlp"])
@pytest.mark.parametrize("structure", ["full", "ekfac"])
def test_scores__by_token_are_the_positions_losses_and_add_up(family: str, structure: str) -> None:
    of = problem(family)
    scores = InfluenceScores(build(family, "ef", structure), of.model)
    whole = scores.scores(data(of, slice(0, 2)), data(of))
    tokens = scores.scores(data(of, slice(0, 2)), data(of), by="token")
    assert tokens.shape == (*whole.shape, of.targets.shape[1])
    same(tokens.sum(2), whole)
    assert not bool(tokens[:, of.targets == -100].any())
    n, t = (of.targets != -100).nonzero()[-1].tolist()
    alone = torch.full_like(of.targets, -100)
    alone[n, t] = of.targets[n, t]
    inputs = of.inputs
    same(tokens[:, n, t], scores.scores(data(of, slice(0, 2)), (inputs, alone))[:, n])


def test_examples_without_a_label_that_counts__score_zero() -> None:
    of = problem("token_mlp")
    scores = InfluenceScores(build("token_mlp", "ef", "full"), of.model)
    labels = of.targets.clone()
    labels[1] = -100
    found = scores.scores((of.inputs, labels), [(of.inputs[:1], labels[:1]), (of.inputs[1:2], labels[1:2])])
    assert found.shape == (5, 2)
    assert not bool(found[1].any())
    assert not bool(found[:, 1].any())
    assert bool(found[0].any())
    assert float(scores.self_influence((of.inputs, labels))[1]) == 0


# -- normalisation, selection, groups --------------------------------------------------------------------------------


@pytest.mark.parametrize("structure", STRUCTURES)
def test_relatif__divides_by_the_square_root_of_an_example_s_own(structure: str) -> None:
    scores, _ = influence(structure)
    own = scores.self_influence((X, Y)) * 7
    found = scores.scores(QUERIES, (X, Y), normalize="relatif")
    same(found, scores.scores(QUERIES, (X, Y)) / own.sqrt())


@pytest.mark.parametrize("prepared", [False, True])
def test_relatif__computes_an_example_s_own_once_for_all_blocks_of_queries(
    prepared: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, _ = influence()
    expected = whole.scores((X, Y), (X, Y), normalize="relatif")
    scores, _ = influence(memory_budget=10_000)
    train = scores.prepare(cut(2, 4, 1)) if prepared else cut(2, 4, 1)
    squares, made = scores._squares, []
    monkeypatch.setattr(scores, "_squares", lambda block, of: made.append(block.size) or squares(block, of))
    blocks = list(scores._query_blocks((X, Y), scores._training("scores", train, token=False), "loss"))
    assert len(blocks) > 1
    same(scores.scores((X, Y), train, normalize="relatif"), expected)
    assert sum(made) == 7
    made.clear()
    found = scores.top((X, Y), train, 7, normalize="relatif")
    same(found.helpful, expected.sort(1, descending=True).values)
    assert sum(made) == 7


def test_once_per_example__later_passes_may_cut_the_data_otherwise() -> None:
    scores, _ = influence()
    rows = scores.prepare((X, Y))
    own, made = scores._squares(next(iter(rows)), rows), []

    def squares(block: RowBlock) -> Tensor:
        made.append(block.size)
        return scores._squares(block, rows)

    once = OncePerExample(squares)
    for sizes in ((2, 4, 1), (3, 3, 1), (7,)):
        start = 0
        for block in scores.prepare(cut(*sizes)):
            same(once.of(block, start), own[start : start + block.size])
            start += block.size
    assert made == [2, 4, 1]


@pytest.mark.parametrize("normalize", [None, "relatif"])
def test_top__is_the_sorted_score_matrix_s(normalize: str | None) -> None:
    scores, _ = influence("ekfac")
    whole = scores.scores(QUERIES, (X, Y), normalize=normalize)
    top = scores.top(QUERIES, cut(3, 2, 2), 4, normalize=normalize)
    order = whole.argsort(1)
    same(top.helpful, whole.sort(1, descending=True).values[:, :4])
    assert torch.equal(top.helpful_index, order.flip(1)[:, :4])
    same(top.harmful, whole.sort(1).values[:, :4])
    assert torch.equal(top.harmful_index, order[:, :4])


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8])
def test_groups__may_be_of_any_integers(dtype: torch.dtype) -> None:
    scores, _ = influence()
    groups = torch.tensor([2, 0, 1, 2, 2, 0, 1])
    whole = scores.scores(QUERIES, (X, Y))
    expected = torch.stack([whole[:, groups == g].sum(1) for g in range(3)], 1)
    same(scores.scores(QUERIES, (X, Y), groups=groups.to(dtype)), expected)


def test_groups__of_a_loader_that_drops_examples_are_of_those_that_are_left() -> None:
    scores, _ = influence()
    loader = DataLoader(TensorDataset(X, Y), batch_size=3, drop_last=True)
    found = scores.scores(QUERIES, loader, groups=torch.zeros(6, dtype=torch.long))
    same(found[:, 0], scores.scores(QUERIES, (X[:6], Y[:6])).sum(1))


# -- blocks ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("structure", STRUCTURES)
def test_scores__do_not_depend_on_batches_budget_or_preparation(structure: str) -> None:
    scores, model = influence(structure)
    whole, own = scores.scores((X, Y), (X, Y)), scores.self_influence((X, Y))
    fisher = fk.TruncatedFisher(model, (X, Y), structure=structure)
    small = InfluenceScores(fisher, model, memory_budget=10_000, chunk_size=2)
    for one in (scores, small):
        prepared = one.prepare(cut(2, 4, 1))
        for train in (cut(3, 3, 1), prepared):
            same(one.scores(cut(1, 6), train), whole)
            same(one.self_influence(train), own)
            same(one.top((X, Y), train, 7).helpful, whole.sort(1, descending=True).values)


def test_a_small_budget__cuts_the_queries() -> None:
    scores, _ = influence(memory_budget=10_000)
    form = scores._inverse._row_products(scores._model_rows.probe(scores._model_rows.queries((X, Y), "loss")), 7, 7)
    room = max(1, 2_500 // (8 * form.numbers_per_query))
    blocks = [block.size for block, _, _ in scores._query_blocks((X, Y), scores.prepare((X, Y)), "loss")]
    assert len(blocks) > 1
    assert sum(blocks) == 7
    assert max(blocks) <= room


def test_the_model__comes_back_untouched() -> None:
    scores, model = influence("ekfac")
    with untouched(model, (X, Y)):
        scores.scores(QUERIES, (X, Y), by="module")
        scores.top(QUERIES, (X, Y), 2, measurement="margin")
        scores.self_influence(scores.prepare((X, Y)))
        scores.leverages((X, None))
    with untouched(model, (X, Y)), pytest.raises(ZeroDivisionError):
        scores.scores(QUERIES, (X, Y), measurement=lambda z, _: z[:, 0] / (1 // 0))


# -- what F does not say ---------------------------------------------------------------------------------------------


def test_a_sum__needs_to_be_told_its_examples() -> None:
    model = mlp()
    halves = [fk.EmpiricalFisher(model, (X[s], Y[s])) for s in (slice(0, 3), slice(3, 7))]
    total = 3 / 7 * halves[0] + 4 / 7 * halves[1]
    with pytest.raises(fk.InvalidArgumentError, match="examples=N"):
        InfluenceScores(total, model)
    summed = fk.EmpiricalFisher(model, (X, Y), normalization="sum")
    mean = InfluenceScores(summed / 7, model, examples=7).scores(QUERIES, (X, Y))
    found = InfluenceScores(total, model, examples=7).scores(QUERIES, (X, Y))
    same(mean, found)
    whole = InfluenceScores(fk.EmpiricalFisher(model, (X, Y)), model).scores(QUERIES, (X, Y))
    same(found, whole)


def test_a_loaded_fisher__gives_the_same(tmp_path: Any) -> None:
    for structure in STRUCTURES:
        model = mlp()
        fisher = fk.EmpiricalFisher(model, (X, Y), structure=structure)
        fisher.save(tmp_path / "f.safetensors")
        loaded = fk.load(tmp_path / "f.safetensors")
        same(
            InfluenceScores(loaded, model).scores(QUERIES, (X, Y)),
            InfluenceScores(fisher, model).scores(QUERIES, (X, Y)),
        )


@pytest.mark.parametrize("call", ["scores", "top", "approximate_scores", "self_influence", "prepared"])
def test_each_call__plans_once_and_hashes_the_weights_once(call: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = mlp()
    fisher = fk.EmpiricalFisher(model, (X, Y))
    counts = {"plan_of": 0, "parameters_hash": 0, "measured_at": 0}

    def counted(name: str) -> Callable[..., Any]:
        original = getattr(model_rows, name)

        def function(*args: Any) -> Any:
            counts[name] += 1
            return original(*args)

        return function

    for name in counts:
        monkeypatch.setattr(model_rows, name, counted(name))
    scores = InfluenceScores(fisher, model)
    assert counts == {"plan_of": 0, "parameters_hash": 1, "measured_at": 0}
    queries, train = (X[:1] + 1, Y[:1]), [(X[:3], Y[:3]), (X[3:], Y[3:])]
    calls: dict[str, Callable[[], object]] = {
        "scores": lambda: scores.scores(queries, train),
        "top": lambda: scores.top(queries, train, 2),
        "approximate_scores": lambda: scores.approximate_scores(queries, train, fk.influence.LowRankQueries(2)),
        "self_influence": lambda: scores.self_influence(train),
        "prepared": partial(scores.scores, queries, scores.prepare(train)),
    }
    counts.update(plan_of=0, parameters_hash=0)
    calls[call]()
    assert counts == {"plan_of": 1, "parameters_hash": 1, "measured_at": 0}


def test_groups__with_huge_numbers_are_refused_before_there_is_a_column_for_each() -> None:
    model = mlp()
    scores = InfluenceScores(fk.ExactFisher(model, (X, Y)), model)
    with pytest.raises(fk.InvalidArgumentError, match="return_inverse"):
        scores.scores(QUERIES, (X, Y), groups=10**11 * torch.arange(len(X)))


def test_path__in_the_place_of_data_says_what_prepare_takes() -> None:
    model = mlp()
    scores = InfluenceScores(fk.ExactFisher(model, (X, Y)), model)
    for call in (lambda: scores.prepare("rows"), lambda: scores.scores(QUERIES, "rows")):
        with pytest.raises(fk.InvalidTypeError, match=r"prepare\(train, folder=path\)"):
            call()
