"""Other people's Fishers beside the exact one: what `audit` says, against loops and NumPy in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fisherkit as fk
from fisherkit.evaluation import audit
from fisherkit.operators import DiagonalOperator

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
