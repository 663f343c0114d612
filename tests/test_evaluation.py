"""Measures of updates, the loss gradient, and the audit of other libraries' Fishers."""

import re
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import fisherkit as fk
from fisherkit.evaluation import approximation_quality, audit, loss_gradient, quality_floor
from fisherkit.operators import DenseOperator, DiagonalOperator, FisherOperator
from fisherkit.space import ParameterSpace
from tests import by_hand
from tests.reference import fisher as reference
from tests.reference.models import EVERY_FORM, FAMILIES
from tests.reference.outputs import EF
from tests.small_data import normal as random
from tests.snapshot import untouched
from tests.tolerances import CONFORMANCE

F64 = torch.float64
SPACE = ParameterSpace(("a", "b"), ((2, 3), (2,)))


def dense(seed: int = 0, rank: int = 8) -> tuple[FisherOperator, Tensor]:
    rows = random(rank, 8, seed=seed)
    return DenseOperator(SPACE, rows.T @ rows), rows.T @ rows


# -- γ -------------------------------------------------------------------------------------------------------


def test_approximation_quality__is_equation_15() -> None:
    operator, matrix = dense()
    update, gradient = random(8, seed=1), random(8, seed=2)
    expected = (update @ matrix @ update).sqrt() / abs(update @ gradient)
    got = approximation_quality(update, operator, gradient)
    assert got.shape == ()
    assert got.dtype == F64
    torch.testing.assert_close(got, expected)


def test_approximation_quality__takes_dicts_and_columns() -> None:
    operator, _ = dense()
    updates, gradient = random(8, 3, seed=1), random(8, seed=2)
    singly = torch.stack([approximation_quality(update, operator, gradient) for update in updates.T])
    named = SPACE.unflatten(gradient)
    torch.testing.assert_close(approximation_quality(updates, operator, gradient), singly)
    torch.testing.assert_close(approximation_quality(SPACE.unflatten(updates), operator, named), singly)
    torch.testing.assert_close(approximation_quality(SPACE.unflatten(updates[:, 0]), operator, gradient), singly[0])


@given(scale=st.floats(1e-6, 1e6), sign=st.sampled_from([-1, 1]), seed=st.integers(0, 1000))
def test_approximation_quality__ignores_length_and_sign_of_the_update(scale: float, sign: int, seed: int) -> None:
    operator, _ = dense()
    update, gradient = random(8, seed=seed), random(8, seed=seed + 1)
    both = approximation_quality(torch.stack([update, sign * scale * update], 1), operator, gradient)
    torch.testing.assert_close(both[0], both[1])


@given(seed=st.integers(0, 1000))
def test_approximation_quality__is_least_for_the_natural_gradient(seed: int) -> None:
    operator, matrix = dense(seed)
    gradient = random(8, seed=seed + 1)
    natural = torch.linalg.solve(matrix, gradient)
    best = approximation_quality(natural, operator, gradient)
    others = approximation_quality(random(8, 20, seed=seed + 2), operator, gradient)
    assert bool((others >= best * (1 - 1e-9)).all())
    torch.testing.assert_close(best, (gradient @ natural).rsqrt())


def line(slope: float, intercept: float) -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    """Figure 1 of the paper: f = θ₀ + θ₁x on (0, 0) and (1, 0)."""
    model = nn.Linear(1, 1).to(F64)
    with torch.no_grad():
        model.weight.fill_(slope)
        model.bias.fill_(intercept)
    return model, (torch.tensor([[0.0], [1.0]], dtype=F64), torch.zeros(2, 1, dtype=F64))


def test_approximation_quality__of_a_mean_is_root_n_times_that_of_a_sum() -> None:
    model, data = line(slope=-0.9, intercept=1.0)
    mean, total = (
        approximation_quality(
            torch.ones(2, dtype=F64),
            fk.ExactFisher(model, data, likelihood="gaussian", normalization=normalization),
            loss_gradient(model, data, likelihood="gaussian", normalization=normalization),
        )
        for normalization in ("mean", "sum")
    )
    torch.testing.assert_close(mean, 2**0.5 * total)


# -- its floor -----------------------------------------------------------------------------------------------


def test_quality_floor__is_its_formula() -> None:
    operator, matrix = dense()
    gradient = random(8, seed=2)
    expected = (gradient @ torch.linalg.solve(matrix + 0.3 * torch.eye(8, dtype=F64), gradient)).rsqrt()
    torch.testing.assert_close(quality_floor(operator, gradient, damping=0.3), expected)
    torch.testing.assert_close(quality_floor(operator, SPACE.unflatten(gradient), damping=0.3), expected)


def test_quality_floor__falls_with_the_damping() -> None:
    operator, _ = dense(rank=4)
    gradient = operator @ random(8, seed=2)
    floors = [quality_floor(operator, gradient, damping) for damping in (1.0, 1e-2, fk.RelativeDamping(1e-8))]
    assert floors == sorted(floors, reverse=True)


# -- what is refused -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("update", "gradient", "error", "message"),
    [
        (torch.zeros(8, dtype=F64), random(8), fk.InvalidArgumentError, "got a zero update"),
        (random(8, 2) * torch.tensor([1.0, 0.0]), random(8), fk.InvalidArgumentError, "got a zero update"),
        (random(8), torch.zeros(8, dtype=F64), fk.InvalidArgumentError, "got a zero gradient"),
        (torch.eye(8, dtype=F64)[0], torch.eye(8, dtype=F64)[1], fk.InvalidArgumentError, "orthogonal to the gradient"),
        (random(7), random(8), fk.InvalidArgumentError, "D = 8"),
        (random(8), random(8, 2), fk.InvalidArgumentError, "2 gradients; expected one"),
        (random(8).float(), random(8), fk.InvalidTypeError, "torch.float32"),
        (random(8), random(8).float(), fk.InvalidTypeError, "approximation_quality, gradient"),
        (random(8).numpy(), random(8), fk.InvalidTypeError, "ndarray"),
        (random(8) / 0, random(8), fk.NonFiniteError, "NaN or infinite"),
        ({"a": random(2, 3)}, random(8), fk.UnknownParameterError, "'b'"),
    ],
)
def test_approximation_quality__refuses(update: Any, gradient: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        approximation_quality(update, dense()[0], gradient)


def test_quality__refuses_what_is_no_operator() -> None:
    matrix: Any = torch.eye(8, dtype=F64)
    for call in (lambda: approximation_quality(random(8), matrix, random(8)), lambda: quality_floor(matrix, random(8))):
        with pytest.raises(fk.InvalidTypeError, match="a Tensor as exact_fisher; expected a FisherOperator"):
            call()


def test_quality_floor__refuses_a_zero_gradient_and_a_singular_matrix() -> None:
    operator, _ = dense(rank=4)
    with pytest.raises(fk.InvalidArgumentError, match="quality_floor: got a zero gradient"):
        quality_floor(operator, torch.zeros(8, dtype=F64))
    with pytest.raises(fk.SingularMatrixError):
        quality_floor(operator, random(8), damping=0.0)


# -- ∇L ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", [*EVERY_FORM, "mapping_batch", "mapping_batch_logits", "frozen_bias"])
def test_loss_gradient__is_the_mean_of_the_references_rows(family: str) -> None:
    problem = FAMILIES[family].problem()
    rows = reference.rows(problem, EF)
    options = {"likelihood": problem.likelihood, "example": problem.example}
    data = (problem.inputs, problem.targets)
    if not isinstance(problem.inputs, Tensor):
        data = {**problem.inputs, "labels": problem.targets}  # type: ignore[assignment]
    with untouched(problem.model, data):
        mean = loss_gradient(problem.model, data, **options)
    torch.testing.assert_close(mean, rows.matrix.sum(0) / rows.count, rtol=1e-8, atol=1e-12)


class Tokens(nn.Module):
    """(B, T) token ids to (B, T, C) logits that depend on all earlier tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 4)
        self.head = nn.Linear(4, 7)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(torch.tanh(self.embedding(ids).cumsum(1)))


def tokens() -> tuple[nn.Module, Tensor, Tensor]:
    """Labels with ignored ones: some in the first example, all in the second."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model, ids, labels = Tokens().to(F64), torch.randint(7, (4, 5)), torch.randint(7, (4, 5))
    labels[0, :2] = labels[1] = -100
    return model, ids, labels


@pytest.mark.parametrize(("example", "count"), [("sequence", 3), ("token", 13)])
@pytest.mark.parametrize("normalization", ["mean", "sum"])
def test_loss_gradient__skips_ignored_labels_and_counts_as_the_fisher(
    example: str, count: int, normalization: str
) -> None:
    model, ids, labels = tokens()
    loss = F.cross_entropy(model(ids).flatten(0, 1), labels.flatten(), reduction="sum")
    got = loss_gradient(model, (ids, labels), example=example, normalization=normalization)
    fisher = fk.ExactFisher(model, (ids, labels), example=example, normalization=normalization)
    assert fisher.examples == count
    torch.testing.assert_close(got, by_hand.gradient(loss, model) / (count if normalization == "mean" else 1))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_loss_gradient__does_not_depend_on_batches(dtype: torch.dtype) -> None:
    model, ids, labels = tokens()
    model = model.to(dtype)
    whole = loss_gradient(model, (ids, labels))
    assert whole.dtype == dtype
    pieces = loss_gradient(model, [(ids[:3], labels[:3]), (ids[3:], labels[3:])])
    assert (whole - pieces).norm() <= CONFORMANCE[dtype] * whole.norm()


def test_loss_gradient__is_over_the_chosen_parameters() -> None:
    model, ids, labels = tokens()
    whole = loss_gradient(model, (ids, labels))
    model.requires_grad_(False)
    torch.testing.assert_close(loss_gradient(model, (ids, labels), params=["head.weight", "head.bias"]), whole[28:])


def test_loss_gradient__shifts_labels_for_causal_models() -> None:
    model, ids, _ = tokens()
    causal = type("TinyForCausalLM", (Tokens,), {})()
    causal.load_state_dict(model.state_dict())
    loss = F.cross_entropy(model(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="sum") / 4
    expected = by_hand.gradient(loss, model)
    for found in (
        loss_gradient(causal.to(F64), {"ids": ids, "labels": ids}),
        loss_gradient(model, {"ids": ids, "labels": ids}, shift_labels=True),
    ):
        torch.testing.assert_close(found, expected)


def test_loss_gradient__is_that_of_bfloat16_models() -> None:
    model = nn.Linear(3, 2).to(torch.bfloat16)
    data = torch.ones(4, 3, dtype=torch.bfloat16), torch.tensor([0, 1, 1, 1])
    got = loss_gradient(model, data)
    assert got.dtype == torch.bfloat16
    loss = F.cross_entropy(model(data[0]).float(), data[1])
    torch.testing.assert_close(got, by_hand.gradient(loss, model), rtol=2e-2, atol=2e-2)


class NoGraph(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).detach()


X, Y = torch.ones(2, 3), torch.tensor([0, 1])


@pytest.mark.parametrize(
    ("model", "data", "options", "error", "message"),
    [
        (nn.Linear(3, 2), (X, Y), {"example": "word"}, fk.InvalidArgumentError, "example='word'"),
        (nn.Linear(3, 2), (X, Y), {"normalization": "max"}, fk.InvalidArgumentError, "normalization='max'"),
        (nn.Linear(3, 2), (X, Y), {"likelihood": "weibull"}, fk.InvalidArgumentError, "'weibull'"),
        (nn.Linear(3, 2), (X, Y), {"params": ["w"]}, fk.UnknownParameterError, "'w'"),
        (torch.relu, (X, Y), {}, fk.InvalidTypeError, "expected a torch.nn.Module"),
        (nn.Linear(3, 2), (X, None), {}, fk.DataError, "got no targets"),
        (nn.Linear(3, 2), [], {}, fk.DataError, "no example with a label that counts"),
        (nn.Linear(3, 2), (X, Y * 0 - 100), {}, fk.DataError, "no example with a label that counts"),
        (nn.Linear(3, 2), (X, Y + 5), {}, fk.DataError, "got labels 5, 6; expected 0 to 1"),
        (nn.Linear(3, 2), (X / 0, Y), {}, fk.NonFiniteError, "NaN or infinite"),
        (nn.Sequential(nn.Linear(3, 2), nn.Dropout()), (X, Y), {}, fk.ModelError, "Dropout '1' in train mode"),
        (NoGraph(3, 2), (X, Y), {}, fk.ModelError, "outputs that do not depend on the parameters"),
    ],
)
def test_loss_gradient__refuses(model: Any, data: Any, options: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        loss_gradient(model, data, **options)


# -- other people's Fishers beside the exact one -----------------------------------------------------------------------


N, BATCH = 480, 12


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()


@pytest.fixture(scope="module")
def data(model: nn.Module) -> tuple[Tensor, Tensor]:
    """Labels drawn from the model, so that the mean gradient vanishes."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(N, 4, generator=generator).double()
    return x, torch.multinomial(model(x).softmax(1), 1, generator=generator).squeeze(1).detach()


def gradients(model: nn.Module, x: Tensor, y: Tensor, batch: int) -> list[dict[str, Tensor]]:
    """Of the mean loss of each batch."""
    found = []
    for start in range(0, len(x), batch):
        loss = F.cross_entropy(model(x[start : start + batch]), y[start : start + batch])
        values = torch.autograd.grad(loss, list(model.parameters()))
        found.append(dict(zip(dict(model.named_parameters()), values, strict=True)))
    return found


def squared(gradients: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.stack([g[name].square() for g in gradients]).mean(0) for name in gradients[0]}


def test_audit__squared_batch_gradients_are_too_small_by_about_the_batch(
    model: nn.Module, data: tuple[Tensor, Tensor]
) -> None:
    exact = fk.EmpiricalFisher(model, data, structure="diagonal")
    found = audit(squared(gradients(model, *data, BATCH)), exact, batch_size=BATCH)
    assert found.compared == "diagonal"
    assert 0.7 < found.strength_ratio / BATCH < 1.4
    assert found.total.cosine > 0.9
    assert any("squared gradients of batches" in text for text in found.explanations)
    assert "squared gradients of batches" in str(found)


def test_audit__squared_gradients_of_examples_are_the_empirical_fisher(
    model: nn.Module, data: tuple[Tensor, Tensor]
) -> None:
    found = audit(squared(gradients(model, *data, 1)), fk.EmpiricalFisher(model, data, structure="full"))
    assert found.total.cosine == pytest.approx(1, abs=1e-12)
    assert found.total.scale == pytest.approx(1, abs=1e-12)
    assert found.strength_ratio == pytest.approx(1, abs=1e-12)
    assert [part.name for part in found.parts] == list(dict(model.named_parameters()))
    assert found.explanations == ("1: the same normalization",)


def test_audit__matrices_by_blocks_are_numpys(model: nn.Module, data: tuple[Tensor, Tensor]) -> None:
    other, exact = (cls(model, data, structure="kfac") for cls in (fk.EmpiricalFisher, fk.ExactFisher))
    found = audit(other, exact)
    a, f = other.to_dense().numpy(), exact.to_dense().numpy()
    assert found.compared == "matrix"
    assert found.total.cosine == pytest.approx(np.vdot(a, f) / np.linalg.norm(a) / np.linalg.norm(f))
    assert found.total.scale == pytest.approx(np.vdot(a, f) / np.vdot(f, f))
    assert found.total.trace_ratio == pytest.approx(np.trace(a) / np.trace(f))
    block = slice(0, 25)
    cosine = np.vdot(a[block, block], f[block, block]) / np.linalg.norm(a[block, block])
    assert found.parts[0].cosine == pytest.approx(cosine / np.linalg.norm(f[block, block]))


def test_audit__a_blockwise_fisher_beside_a_full_one_counts_what_it_leaves_out(
    model: nn.Module, data: tuple[Tensor, Tensor]
) -> None:
    other, exact = fk.EmpiricalFisher(model, data, structure="block"), fk.EmpiricalFisher(model, data)
    found = audit(other, exact)
    a, f = other.to_dense().numpy(), exact.to_dense().numpy()
    assert len(found.parts) == 1
    assert found.total.cosine == pytest.approx(np.vdot(a, f) / np.linalg.norm(a) / np.linalg.norm(f))
    assert found.total.trace_ratio == pytest.approx(1)


def test_audit__a_multiple_is_a_cosine_of_one_and_its_factor(model: nn.Module, data: tuple[Tensor, Tensor]) -> None:
    exact = fk.ExactFisher(model, data)
    for factor, text in ((0.5, "½"), (float(N), "N = 480"), (1 / N, "1/N = 1/480")):
        found = audit(factor * exact, exact)
        assert found.total.cosine == pytest.approx(1)
        assert found.total.scale == pytest.approx(factor)
        assert found.strength_ratio == pytest.approx(1 / factor)
        assert found.explanations[0].startswith(text)


@pytest.mark.parametrize(
    ("reduction", "averaged", "text"),
    [
        ("mean", "batches", "1/B = 1/12: squared gradients of batches (of mean losses), averaged"),
        ("mean", "examples", "1/B² = 1/12²"),
        ("mean", "nothing", "N/B² = 480/12²"),
        ("sum", "batches", "B = 12: squared gradients of batches (of summed losses), averaged"),
        ("sum", "examples", "1: squared gradients of batches (of summed losses), summed and divided"),
        ("sum", "nothing", "N = 480: squared gradients of batches (of summed losses), summed"),
    ],
)
def test_audit__explains_every_common_loop_over_batches(
    model: nn.Module, data: tuple[Tensor, Tensor], reduction: str, averaged: str, text: str
) -> None:
    exact = fk.EmpiricalFisher(model, data, structure="diagonal")
    size = BATCH if reduction == "sum" else 1
    divisor = {"batches": N // BATCH, "examples": N, "nothing": 1}[averaged]
    factor = size**2 * (N // BATCH) / divisor
    found = audit({n: factor * t for n, t in squared(gradients(model, *data, BATCH)).items()}, exact, batch_size=BATCH)
    assert any(explanation.startswith(text) for explanation in found.explanations)


def test_audit__coincidences_are_all_named_as_candidates(model: nn.Module, data: tuple[Tensor, Tensor]) -> None:
    exact = fk.EmpiricalFisher(model, (data[0][:256], data[1][:256]), structure="diagonal")
    found = audit(16 * exact, exact, batch_size=16)
    assert [text.partition(":")[0] for text in found.explanations] == ["B = 16", "N/B = 256/16"]
    assert str(found).endswith("several candidates: the scale alone does not tell which")


def test_audit__another_direction_is_not_explained_by_a_scale(model: nn.Module, data: tuple[Tensor, Tensor]) -> None:
    exact = fk.EmpiricalFisher(model, data, structure="diagonal")
    diagonal = exact.diagonal()
    other = diagonal.flip(0)
    found = audit(other * (diagonal.square().sum() / (other * diagonal).sum()), exact)
    assert found.total.cosine < 0.9
    assert found.total.scale == pytest.approx(1)
    assert found.explanations == ()
    assert "the direction differs" in str(found)


def test_audit__leaves_what_it_reads_as_it_was(model: nn.Module, data: tuple[Tensor, Tensor]) -> None:
    exact, diagonal = fk.ExactFisher(model, data), torch.rand(exact_size(model)).double()
    before, state = diagonal.clone(), torch.get_rng_state()
    audit(diagonal, exact)
    assert torch.equal(diagonal, before)
    assert torch.equal(torch.get_rng_state(), state)


def exact_size(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def test_audit__bad_input_is_an_error_that_says_so(model: nn.Module, data: tuple[Tensor, Tensor]) -> None:
    exact = fk.ExactFisher(model, data)
    size = exact.size
    with pytest.raises(fk.InvalidTypeError, match="expected a FisherOperator"):
        audit([1.0], exact)  # type: ignore[arg-type]
    with pytest.raises(fk.InvalidTypeError, match="as exact"):
        audit(exact, torch.ones(size))  # type: ignore[arg-type]
    with pytest.raises(fk.InvalidArgumentError, match="shape"):
        audit(torch.ones(size + 1).double(), exact)
    with pytest.raises(fk.InvalidArgumentError, match="negative"):
        audit(-torch.ones(size).double(), exact)
    with pytest.raises(fk.InvalidArgumentError, match="the same names"):
        audit(fk.ExactFisher(model, data, params=["0.weight"]), exact)
    with pytest.raises(fk.InvalidArgumentError, match="compare='rows'"):
        audit(exact, exact, compare="rows")
    with pytest.raises(fk.InvalidArgumentError, match="batch_size=0"):
        audit(exact, exact, batch_size=0)
    zero = DiagonalOperator(exact.space, torch.zeros(size).double())
    with pytest.raises(fk.InvalidArgumentError, match="an exact Fisher that is zero"):
        audit(exact, zero)
    with pytest.raises(fk.InvalidArgumentError, match=r"^audit: got a Fisher that is zero"):
        audit(zero, exact)


def test_audit__a_dict_that_does_not_fit_is_named_with_what_to_do(
    model: nn.Module, data: tuple[Tensor, Tensor]
) -> None:
    exact = fk.EmpiricalFisher(model, data, structure="diagonal")
    own = exact.space.unflatten(exact.diagonal())
    for other, words in (
        ({"0.weight": own["0.weight"]}, r"^audit: got a dict with missing names \['0.bias', .*"),
        (own | {"more": torch.ones(1)}, r"^audit: got a dict .* unknown names \['more'\]"),
    ):
        with pytest.raises(fk.UnknownParameterError, match=words):
            audit(other, exact)
    for prefix in ("module.", "_orig_mod.", "_orig_mod.module."):
        assert audit({prefix + name: t for name, t in own.items()}, exact) == audit(own, exact)
    with pytest.raises(fk.InvalidArgumentError, match=r"^audit: got shape \[4, 5\] for '0.weight'; expected \[5, 4\]"):
        audit(own | {"0.weight": own["0.weight"].T}, exact)
    with pytest.raises(fk.InvalidTypeError, match=r"^audit: got a float for '0.bias'"):
        audit(own | {"0.bias": 1.0}, exact)  # type: ignore[dict-item]


def test_audit__a_block_too_large_to_write_out_is_refused_with_advice() -> None:
    space = fk.ParameterSpace(("w",), ((5000,),))
    big = DiagonalOperator(space, torch.ones(5000))
    assert audit(big, big).total.scale == 1
    with pytest.raises(fk.MemoryBudgetError, match='compare="diagonal"'):
        audit(big, big, compare="matrix")
