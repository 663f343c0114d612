"""What must not change a Fisher matrix: how data is cut, ordered and streamed, how rows are chunked, what is ignored.

Where the reference is not the other side, both are the package's, in two ways that must agree.
"""

import itertools
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fisherkit import EmpiricalFisher, FisherApproximation, MemoryBudgetError, NoClosedFormError
from fisherkit.operators import unwrap
from fisherkit.operators.low_rank import UNBOUNDED, LowRankOperator
from fisherkit.rows.streamed import StreamedRows
from fisherkit.testing import check_fisher
from tests.conformance_cases import KINDS, STRUCTURES, build, problem, reference_dense, reference_rows, relative_error
from tests.reference import fisher as reference
from tests.reference.fisher import Problem
from tests.reference.models import EVERY_FORM, FAMILIES
from tests.reference.outputs import IGNORE_INDEX
from tests.reference.zoo import Compose
from tests.tolerances import CONFORMANCE

every_form = pytest.mark.parametrize("family", EVERY_FORM)
some_families = pytest.mark.parametrize("family", ["mlp", "conv2d_groups", "token_mlp", "gaussian_tokens"])
"""Of kinds and structures; how layers take batches and chunks is tested for every family."""

DOUBLE = torch.float64


def cut(of: Problem, index: Tensor | slice) -> tuple[Any, Tensor]:
    """Some of the examples as a batch."""
    inputs = of.inputs
    some = {key: value[index] for key, value in inputs.items()} if isinstance(inputs, Mapping) else inputs[index]
    return some, of.targets[index]


def batches(of: Problem, *sizes: int) -> list[tuple[Any, Tensor]]:
    """Consecutive batches, the last one with the rest."""
    bounds = [0, *torch.tensor(sizes).cumsum(0).tolist(), len(of.targets)]
    return [cut(of, slice(a, b)) for a, b in itertools.pairwise(bounds)]


def fisher_of(of: Problem, kind: str, structure: str, data: Any = None, **options: Any) -> FisherApproximation:
    """The package's Fisher of a problem that is no family's."""
    case = KINDS[kind]
    conventions = {"likelihood": of.likelihood, "example": of.example, "structure": structure}
    return case.make(
        of.model, (of.inputs, of.targets) if data is None else data, **conventions, **case.options, **options
    )


def assert_same(got: FisherApproximation, expected: Tensor, what: str) -> None:
    assert relative_error(got.to_dense(), expected) < CONFORMANCE[DOUBLE], what


# -- data --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_batches_in_chunks__of_every_layer_change_nothing(family: str) -> None:
    fisher = build(family, "exact", "block", data=batches(problem(family), 1, 2), chunk_size=2)
    assert_same(fisher, reference_dense(family, "exact", "block"), "exact-block")


@some_families
def test_batch_split__changes_nothing(family: str) -> None:
    data = batches(problem(family), 1, 2)
    for kind, structure in (
        ("ef", "full"),
        ("ief", "diagonal"),
        ("sf5", "full"),
        ("sf5", "block"),
        ("exact", "block"),
        ("truncated_tolerance", "full"),
    ):
        expected = reference_dense(family, kind, structure)
        assert_same(build(family, kind, structure, data=data), expected, f"{kind}-{structure}")
    whole = build(family, "exact", "kfac").to_dense()
    assert_same(build(family, "exact", "kfac", data=data), whole, "exact-kfac")


@some_families
def test_order_of_examples_and_batches__changes_nothing(family: str) -> None:
    of = problem(family)
    order = torch.arange(len(of.targets)).flip(0).roll(1)
    whole = build(family, "ef", "kfac").to_dense()
    for data in (batches(of, 1, 2)[::-1], cut(of, order)):
        for kind in ("ief", "exact", "truncated2"):
            assert_same(build(family, kind, "full", data=data), reference_dense(family, kind, "full"), kind)
        assert_same(build(family, "ef", "kfac", data=data), whole, "ef-kfac")


@some_families
def test_chunk_size__changes_nothing(family: str) -> None:
    of = problem(family)
    for size, kind, structure in (
        (1, "ef", "full"),
        (1, "exact", "block"),
        (2, "sf5", "full"),
        (2, "exact", "diagonal"),
        (3, "truncated_tolerance", "full"),
    ):
        fisher = build(family, kind, structure, data=batches(of, 3), chunk_size=size)
        assert_same(fisher, reference_dense(family, kind, structure), f"{kind}-{structure}-{size}")
    whole = build(family, "exact", "kfac").to_dense()
    for size in (1, 2):
        assert_same(build(family, "exact", "kfac", chunk_size=size), whole, f"exact-kfac-{size}")


def test_batches_of_different_lengths__are_padded_with_nothing() -> None:
    of = problem("token_mlp")
    long, short = cut(of, slice(0, 2)), cut(of, slice(3, 5))
    short = short[0][:, :2], short[1][:, :2]
    for kind in ("ef", "ief", "exact", "truncated2", "truncated_tolerance"):
        parts = [reference.rows(replace(of, inputs=x, targets=y), KINDS[kind].kind) for x, y in (long, short)]
        joined = replace(parts[0], matrix=torch.cat([p.matrix for p in parts]), count=sum(p.count for p in parts))
        for data in ([long, short], [short, long]):
            for structure, make in STRUCTURES.items():
                assert_same(fisher_of(of, kind, structure, data), make(joined), f"{kind}-{structure}")


# -- conventions -------------------------------------------------------------------------------------------------------


@some_families
def test_normalization__sum_is_n_times_mean(family: str) -> None:
    count = reference_rows(family, "ef").count
    for kind, structure in (("ef", "full"), ("exact", "block"), ("sf5", "diagonal"), ("truncated2", "kfac")):
        mean, total = (build(family, kind, structure, normalization=name) for name in ("mean", "sum"))
        assert mean.examples == total.examples == count
        assert_same(total, count * mean.to_dense(), f"{kind}-{structure}")
        assert mean.rows == count or kind != "ef"


class WithLoss(nn.Module):
    """A classifier that also computes its own loss, as Hugging Face's do."""

    def __init__(self, body: nn.Module, labels: Tensor, reduction: str) -> None:
        super().__init__()
        self.body, self.labels, self.reduction = body, labels, reduction

    def forward(self, x: Tensor) -> SimpleNamespace:
        logits = self.body(x)
        loss = nn.functional.cross_entropy(logits, self.labels[: len(logits)], reduction=self.reduction)
        return SimpleNamespace(loss=loss, logits=logits)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_loss_reduction__of_the_user_is_irrelevant(reduction: str) -> None:
    of = problem("mlp")
    assert isinstance(of.inputs, Tensor)
    model = WithLoss(of.model, of.targets, reduction)
    for structure in STRUCTURES:
        fisher = EmpiricalFisher(model, (of.inputs, of.targets), structure=structure)
        assert_same(fisher, reference_dense("mlp", "ef", structure), structure)


# -- what is ignored ---------------------------------------------------------------------------------------------------

ALL_STRUCTURES = (*STRUCTURES, "kfac", "ekfac")
CATEGORICAL = [name for name in EVERY_FORM if FAMILIES[name].likelihood == "categorical"]
POSITIONS = pytest.mark.parametrize("positions", ["expand", "reduce"])


@pytest.mark.parametrize("family", CATEGORICAL)
@POSITIONS
def test_ignored_example__is_as_if_it_were_not_there(family: str, positions: str) -> None:
    of = problem(family)
    targets = of.targets.clone()
    targets[-1] = IGNORE_INDEX
    with_ignored, without = replace(of, targets=targets), cut(of, slice(0, -1))
    cases = [("ef", "full"), ("sf5", "block"), ("exact", "diagonal"), ("truncated2", "full"), ("exact", "ekfac")]
    for kind, structure in [("exact", "kfac"), *(cases if positions == "expand" else [])]:
        data = (with_ignored.inputs, with_ignored.targets)
        ignored = fisher_of(of, kind, structure, data, kfac_positions=positions)
        absent = fisher_of(of, kind, structure, without, kfac_positions=positions)
        assert ignored.examples == absent.examples
        if structure == "ekfac":  # eigenvectors of a repeated eigenvalue are anyone's choice
            assert float(ignored.trace()) == pytest.approx(float(absent.trace()), rel=1e-8)
        else:
            assert_same(ignored, absent.to_dense(), f"{kind}-{structure}")


class MeanOfTokens(nn.Module):
    """Sequences classified by the mean of their unpadded tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(3, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
        weight = attention_mask.unsqueeze(-1).to(x.dtype)
        return self.head((torch.tanh(self.body(x)) * weight).sum(1) / weight.sum(1))


@POSITIONS
def test_ignored_example__of_a_padded_classifier_is_as_if_it_were_not_there(positions: str) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, x, y = MeanOfTokens().double(), torch.randn(5, 4, 3, dtype=DOUBLE), torch.tensor([0, 1, 2, 1, -100])
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 1, 0], [1, 0, 0, 0], [1, 1, 1, 1]])
    of = Problem(model, {"x": x, "attention_mask": mask}, y)
    padding = {"x": torch.where(mask[:, :, None] == 0, 7.0, x), "attention_mask": mask}
    for structure in ("full", "kfac"):
        without = fisher_of(of, "exact", structure, cut(of, slice(0, 4)), kfac_positions=positions).to_dense()
        for inputs in (of.inputs, padding):
            fisher = fisher_of(of, "exact", structure, (inputs, y), kfac_positions=positions)
            assert_same(fisher, without, structure)


@pytest.mark.parametrize("family", ["token_mlp", "token_mlp_by_token", "flattened_positions"])
@POSITIONS
def test_ignored_positions__are_never_looked_at(family: str, positions: str) -> None:
    """No position of these models sees another, so that what stands at an ignored one is padding."""
    of = problem(family)
    assert isinstance(of.inputs, Tensor)
    inputs = torch.where((of.targets == IGNORE_INDEX).unsqueeze(-1), 100.0, of.inputs)
    for kind in ("ef", "sf5", "exact", "truncated2"):
        for structure in ALL_STRUCTURES if positions == "expand" else ("kfac", "ekfac"):
            options = {"kfac_positions": positions}
            expected = fisher_of(of, kind, structure, **options).to_dense()
            assert_same(
                fisher_of(replace(of, inputs=inputs), kind, structure, **options), expected, f"{kind}-{structure}"
            )


@pytest.mark.parametrize("family", ["token_mlp_by_token", "gaussian_by_token", "bernoulli_by_token"])
@POSITIONS
def test_tokens_as_examples__are_a_batch_of_examples(family: str, positions: str) -> None:
    """No position of these models sees another, so that cutting sequences into tokens beforehand is the same data."""
    of = problem(family)
    assert isinstance(of.inputs, Tensor)
    counted = of.targets != IGNORE_INDEX if of.likelihood == "categorical" else torch.ones(of.inputs.shape[:2]).bool()
    tokens = Problem(of.model, of.inputs[counted], of.targets[counted], of.likelihood)
    for kind in ("ef", "ief", "exact", "truncated2"):
        for structure in (*STRUCTURES, "kfac"):
            expected = fisher_of(tokens, kind, structure, kfac_positions=positions).to_dense()
            assert_same(fisher_of(of, kind, structure, kfac_positions=positions), expected, f"{kind}-{structure}")


def sentence_vector() -> Compose:
    """Tokens scored against a vector of their whole sequence: a layer with one position an element, many outputs."""
    return Compose(
        lambda m, x: m.token(x) * torch.tanh(m.sentence(x.mean(1, keepdim=True))),
        sentence=nn.Linear(3, 3),
        token=nn.Linear(3, 3),
    )


def test_tokens_as_examples__weigh_a_layer_s_inputs_by_their_number() -> None:
    """A layer that sees a sequence once has that input in as many examples as the sequence has tokens."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, x = sentence_vector().double(), torch.randn(3, 4, 3, dtype=DOUBLE)
    y = torch.tensor([[0, 1, 2, 1], [2, -100, -100, -100], [1, 0, -100, -100]])
    fisher = fisher_of(Problem(model, x, y, example="token"), "ef", "kfac")
    spread = [torch.where(torch.arange(4) == t, y, -100) for t in range(4)]
    # The same examples as sequences of which one token counts, so that no element holds two of them.
    data = [(x, labels) for labels in spread if bool((labels >= 0).any())]
    names = ("sentence.weight", "sentence.bias")
    apart = fisher_of(Problem(model, x, y), "ef", "kfac", data)
    got, expected = (f.to_dense()[:12, :12] for f in (fisher, apart))
    assert fisher.space.names[:2] == names
    assert fisher.examples == apart.examples == 7
    assert relative_error(got, expected) < CONFORMANCE[DOUBLE]


# -- rows that do not fit ----------------------------------------------------------------------------------------------


@every_form
def test_streamed_rows__give_what_stored_rows_give(family: str) -> None:
    data = batches(problem(family), 2)
    for kind in ("exact",) if family in ("mlp", "token_mlp", "gaussian_tokens") else ("ef",):
        dense = reference_dense(family, kind, "full")
        fisher = build(family, kind, "full", data=data, memory_budget=1)
        columns = torch.randn(fisher.size, 2, generator=torch.Generator().manual_seed(1), dtype=DOUBLE)
        damping = float(torch.linalg.eigvalsh(dense)[-1])  # large, for few steps: each is a pass over the data
        solution, info = fisher.solve(columns, damping, return_info=True, tolerance=1e-11)
        expected = torch.linalg.solve(dense + damping * torch.eye(len(dense), dtype=DOUBLE), columns)
        for got, truth in (
            (fisher @ columns, dense @ columns),
            (fisher.diagonal(), dense.diagonal()),
            (fisher.trace(), dense.trace()),
            (solution, expected),
        ):
            assert relative_error(got, truth) < CONFORMANCE[DOUBLE], kind
        assert info.steps > 0
        assert {entry.structure for entry in fisher.coverage().entries} == {"full, streamed rows"}


def test_streamed_rows__conform() -> None:
    fisher = build(
        "token_mlp_by_token", "exact", "full", data=batches(problem("token_mlp_by_token"), 2, 1), memory_budget=1
    )
    operator = unwrap(fisher)
    assert isinstance(operator, LowRankOperator)
    assert isinstance(operator.row_source, StreamedRows)
    # With memory for square matrices but none for rows, everything but a file has a closed form.
    wide = LowRankOperator(
        operator.row_source, operator.scale, dtype=DOUBLE, device=operator.device, memory_budget=UNBOUNDED
    )
    dense = reference_dense("token_mlp_by_token", "exact", "full")
    assert check_fisher(wide, dense, tolerance=CONFORMANCE[DOUBLE]).refused == ("save",)


def test_streamed_rows__refuse_what_needs_rows_or_a_square_matrix(tmp_path: Path) -> None:
    fisher = build("mlp", "exact", "full", memory_budget=1)
    for needs_memory in (fisher.gram, fisher.to_dense):
        with pytest.raises(MemoryBudgetError, match="memory_budget"):
            needs_memory()
    for refused in (fisher.eigenvalues, lambda: fisher.logdet(0.1), lambda: fisher.save(tmp_path / "f.safetensors")):
        with pytest.raises(NoClosedFormError, match="Try: "):
            refused()
