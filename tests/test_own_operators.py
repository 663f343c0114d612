"""An operator of a user's own, with the required hooks alone, against its dense matrix in everything that takes one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

import fisherkit as fk
from fisherkit.evaluation import approximation_quality, audit, quality_floor
from fisherkit.io import State
from fisherkit.merging import MergePolicy, merge
from fisherkit.operators import (
    DenseOperator,
    DiagonalOperator,
    FisherOperator,
    normalize,
    open_file,
    split,
    usual_damping,
)
from fisherkit.operators.base import convert
from fisherkit.operators.outputs_average import average_over_outputs, mix_with_average
from fisherkit.space import ParameterSpace
from fisherkit.testing import check_fisher
from tests import by_hand
from tests import merging_cases as mc
from tests import operator_cases as oc
from tests.small_data import F64, X, Y, mlp, normal

STRUCTURES = ["full", "block", "diagonal", "kfac", "ekfac"]


class Spiked(FisherOperator):
    """level · I + w wᵀ: products, diagonal, draws, multiples and a state, and nothing else."""

    tag = "own_spiked"

    def __init__(self, space: ParameterSpace, level: float, w: Tensor) -> None:
        super().__init__(space, dtype=w.dtype, device=w.device)
        self.level, self.w = level, w

    def _matmat(self, columns: Tensor) -> Tensor:
        return self.level * columns + self.w[:, None] * (self.w @ columns)

    def _diagonal(self) -> Tensor:
        return self.level + self.w.square()

    def _draw(self, generator: torch.Generator | None, count: int) -> Tensor:
        noise = torch.randn(self.size + 1, count, dtype=self.dtype, generator=generator)
        return self.level**0.5 * noise[1:] + self.w[:, None] * noise[0]

    def _scaled(self, scale: float) -> Spiked:
        return Spiked(self.space, scale * self.level, scale**0.5 * self.w)

    def _state(self) -> State:
        return State(self.tag, self.space.names, {"w": self.w}, {"level": self.level})

    @classmethod
    def _from_state(cls, space: ParameterSpace, state: State) -> Spiked:
        return cls(space, state.options["level"], state.tensors["w"])


class Circulant(FisherOperator):
    """Every row the one above it, shifted: known by its products, never written out."""

    def __init__(self, space: ParameterSpace, first: Tensor) -> None:
        super().__init__(space, dtype=first.dtype, device=first.device)
        self.first = first

    def _matmat(self, columns: Tensor) -> Tensor:
        return torch.fft.irfft(torch.fft.rfft(self.first)[:, None] * torch.fft.rfft(columns, dim=0), self.size, dim=0)

    def _diagonal(self) -> Tensor:
        return self.first[:1].repeat(self.size)

    def _draw(self, generator: torch.Generator | None, count: int) -> Tensor:
        root = torch.fft.rfft(self.first).real.clamp_min(0).sqrt()
        noise = torch.randn(self.size, count, dtype=self.dtype, generator=generator)
        return torch.fft.irfft(root[:, None] * torch.fft.rfft(noise, dim=0), self.size, dim=0)

    def _scaled(self, scale: float) -> Circulant:
        return Circulant(self.space, scale * self.first)

    def _state(self) -> State:
        raise fk.NoClosedFormError(
            call="Circulant.save", got="no tag", expected="one", try_="another structure, which has one"
        )


def spiked(space: ParameterSpace, seed: int = 0) -> oc.Pair:
    w = normal(space.size, seed=seed)
    return Spiked(space, 0.5 + seed, w), (0.5 + seed) * torch.eye(space.size, dtype=F64) + torch.outer(w, w)


def circulant(space: ParameterSpace, seed: int = 0) -> oc.Pair:
    size = space.size
    lags = torch.arange(size, dtype=F64)
    first = (1 + seed) * 0.6 ** torch.minimum(lags, size - lags)
    shift = (torch.arange(size)[:, None] - torch.arange(size)) % size
    return Circulant(space, first), first[shift]


OWN = {"spiked": spiked, "circulant": circulant}
own = pytest.mark.parametrize("make", OWN.values(), ids=list(OWN))
SPACE = fk.ParameterSpace.of(mlp())


def close(got: Tensor, expected: Tensor, bound: float = 1e-9) -> None:
    assert float((got.double() - expected).norm()) <= bound * float(expected.norm())


# -- the contract's questions ------------------------------------------------------------------------------------------


@own
def test_check__passes_with_the_required_hooks_alone(make) -> None:
    report = check_fisher(*make(oc.LAYER))
    refused = {"effective_dimension", "eigenvalues", "eigenvectors", "gram", "logdet", "usual_damping"}
    assert refused <= set(report.refused) <= refused | {"save"}
    assert {"norm", "average", "blocks", "terms"} <= set(report.errors)


@own
def test_every_question__has_a_right_answer_or_a_clear_error(make) -> None:
    operator, matrix = make(oc.LAYER)
    assert (operator._terms(), split(operator)) == ((operator,), (operator,))
    assert (operator.is_diagonal, operator.is_dense, operator.inversion) == (False, False, "iterative")
    assert (operator.stored_rows, operator.layout, operator.factors, operator.decomposed_side) == (None, None, None, 0)
    close(operator._frobenius(), matrix.norm())
    close(normalize(operator, "norm").to_dense(), matrix * len(matrix) ** 0.5 / matrix.norm())
    assert convert(operator, F64, torch.device("cpu")) is operator
    places = torch.cat([torch.arange(12).reshape(3, 4), torch.arange(12, 15).unsqueeze(1)], 1)  # [O, I + 1]
    moment = torch.stack([matrix[row][:, row] for row in places]).mean(0)
    expected = torch.zeros_like(matrix)
    for row in places:
        expected[row.unsqueeze(1), row] = moment
    close(average_over_outputs(operator).to_dense(), expected)
    close(mix_with_average(operator, 0.5).to_dense(), (matrix + 0.5 * expected) / 1.5)
    for ask, advice in ((lambda: operator.eigenvalues(2), "lanczos_eigenvalues"),
                        (lambda: operator.logdet(damping=0.1), "lanczos_logdet")):  # fmt: skip
        with pytest.raises(fk.NoClosedFormError, match=advice):
            ask()
    with pytest.raises(fk.NoClosedFormError, match=r"usual_damping.*Try: damping=fk.RelativeDamping"):
        usual_damping(operator)
    with pytest.raises(fk.NoClosedFormError, match="usual_damping"):
        usual_damping(operator + oc.kronecker(F64)[0])


@own
def test_own_diagonal__is_taken_for_what_it_says_it_is(make) -> None:
    """A tag is enough for the closed forms of diagonals."""

    class Flat(Spiked):
        tag = "own_flat"
        is_diagonal = True

    flat = Flat(oc.LAYER, 0.5, torch.zeros(15, dtype=F64))
    assert usual_damping(flat).scale == 0.01
    diagonal, matrix = oc.diagonal(F64)
    for total in (flat + diagonal, diagonal + flat):
        assert total.is_diagonal
        close(total.to_dense(), matrix + 0.5 * torch.eye(15, dtype=F64))
    other, dense = make(oc.LAYER)
    assert not (other + flat).is_diagonal
    close((other + flat).to_dense(), dense + 0.5 * torch.eye(15, dtype=F64))


def test_class_derived_from_a_structure__with_another_product_is_asked_for_itself(tmp_path: Path) -> None:
    """What a parent class knows of its matrix is not known of a child's."""

    class Doubled(DenseOperator):
        def _matmat(self, columns: Tensor) -> Tensor:
            return 2 * super()._matmat(columns)

    matrix = oc.positive(15, 0, F64)
    operator = Doubled(oc.LAYER, matrix)
    assert not operator.is_dense
    close(operator.to_dense(), 2 * matrix)
    close(operator._frobenius(), 2 * matrix.norm())
    close((operator + operator).to_dense(), 4 * matrix)
    for refused in (usual_damping, FisherOperator.eigenvalues):
        with pytest.raises(fk.NoClosedFormError):
            refused(operator)
    v = normal(15)
    close(operator.solve(v, 0.1), torch.linalg.solve(2 * matrix + 0.1 * torch.eye(15, dtype=F64), v))
    with pytest.raises(fk.NoClosedFormError, match=r"Doubled.save.*no tag"):
        operator.save(tmp_path / "f")
    DenseOperator(oc.LAYER, matrix).save(tmp_path / "f")
    close(fk.load(tmp_path / "f").to_dense(), matrix)


# -- sums --------------------------------------------------------------------------------------------------------------


@own
@pytest.mark.parametrize("structure", STRUCTURES)
def test_sum__with_every_structure_is_solved(make, structure: str) -> None:
    operator, matrix = make(SPACE)
    fisher = fk.ExactFisher(mlp(), (X, Y), structure=structure)
    total, dense = 0.25 * fisher + 2 * operator, 0.25 * fisher.to_dense() + 2 * matrix
    close(total.to_dense(), dense)
    v = normal(SPACE.size, seed=3)
    x, info = total.solve(v, damping=1e-2, return_info=True)
    assert info.converged
    close(x, torch.linalg.solve(dense + 1e-2 * torch.eye(len(dense), dtype=F64), v), 1e-7)


def test_sum__draws_have_its_covariance() -> None:
    """For x from N(0, A⁻¹) the mean of xᵀAx is D; over 60 draws it scatters by √(2 / 60D), here 2.6 %."""
    operator, _ = spiked(SPACE)
    total = operator + fk.EmpiricalFisher(mlp(), (X, Y))
    inverse = total.factorize(damping=1.0, tolerance=1e-6)
    generator = torch.Generator().manual_seed(0)
    draws = torch.stack([inverse.sample(generator) for _ in range(60)], 1)
    forms = total.quadratic_form(draws) + draws.square().sum(0)
    assert float(forms.mean()) == pytest.approx(total.size, rel=0.1)
    # Draws without the damping's noise, or with the sum's terms drawn alike, would show along the spike.
    along = operator.w / operator.w.norm()
    assert float((draws.T @ along).square().mean()) == pytest.approx(float(along @ inverse.matvec(along)), rel=0.6)


def test_sum__may_fold_with_its_like() -> None:
    class Folding(Spiked):
        tag = "own_folding"

        def _plus(self, other: FisherOperator) -> FisherOperator | None:
            return DiagonalOperator(self.space, other._diagonal() + self.level) if not self.w.any() else None

    ridge, (diagonal, matrix) = Folding(oc.LAYER, 0.5, torch.zeros(15, dtype=F64)), oc.diagonal(F64)
    for total in (ridge + diagonal, diagonal + ridge):
        assert isinstance(total, DiagonalOperator)
        close(total.to_dense(), matrix + 0.5 * torch.eye(15, dtype=F64))


# -- files -------------------------------------------------------------------------------------------------------------


def test_files__hold_it_alone_and_in_a_sum(tmp_path: Path) -> None:
    operator, matrix = spiked(oc.LAYER)
    for total, dense in ((operator, matrix), oc.total((operator, matrix), oc.kronecker(F64))):
        total.save(tmp_path / "f")
        close(fk.load(tmp_path / "f").to_dense(), dense)
        assert open_file(tmp_path / "f").blocks == (oc.LAYER.names,)
        close(open_file(tmp_path / "f").read(oc.LAYER.names).to_dense(), dense)
    with pytest.raises(fk.NoClosedFormError, match="Circulant"):
        circulant(oc.LAYER)[0].save(tmp_path / "g")


def test_another_dtype__goes_through_the_state_or_is_refused_by_name() -> None:
    single = Spiked(oc.LAYER, 0.5, normal(15).float())
    double = convert(single, F64, torch.device("cpu"))
    assert double.dtype == F64
    w = normal(15).float().double()
    close(double.to_dense(), 0.5 * torch.eye(15, dtype=F64) + torch.outer(w, w), 1e-12)

    class Nameless(Spiked):
        tag = ""

        @classmethod
        def _from_state(cls, space: ParameterSpace, state: State) -> FisherOperator:
            return FisherOperator._from_state.__func__(cls, space, state)  # type: ignore[attr-defined,no-any-return]

    nameless = Nameless(oc.LAYER, 0.5, normal(15).float())
    with pytest.raises(fk.FisherkitError, match=r"^Nameless in torch.float64: .* does not define _from_state"):
        merge(mc.states(oc.LAYER, 2), [nameless, nameless], [1.0, 1.0], output_damping=0.0)


# -- applications ------------------------------------------------------------------------------------------------------


@own
@pytest.mark.parametrize("normalize_by", ["trace", "norm", "block", "output", None])
def test_merge__of_two_is_the_dense_systems_solution(make, normalize_by: str | None) -> None:
    pairs, models = [make(oc.LAYER), make(oc.LAYER, 1)], mc.states(oc.LAYER, 2)
    how = "trace" if normalize_by in {"block", "output"} else normalize_by
    matrices = [mc.normalized(matrix, how) for _, matrix in pairs]
    expected = mc.brute_force(models, matrices, oc.LAYER, [1.0, 1.0], 0.1)
    for method in ("auto", "direct", "cg"):
        merged = merge(
            models, [operator for operator, _ in pairs], [1.0, 1.0], damping=0.1, normalize=normalize_by,
            policy=MergePolicy(method=method), output_damping=0.0,
        )  # fmt: skip
        close(mc.flat(merged, oc.LAYER), expected, 1e-8)


@own
def test_merge__with_output_damping_and_beside_another_structure(make) -> None:
    (operator, matrix), (other, dense) = make(oc.LAYER), oc.kronecker(F64, seed=5)
    models = mc.states(oc.LAYER, 2)
    merged = merge(models, [operator, other], [1.0, 1.0], damping=0.1, normalize=None, output_damping=0.0)
    expected = mc.brute_force(models, [matrix, dense], oc.LAYER, [1.0, 1.0], 0.1)
    close(mc.flat(merged, oc.LAYER), expected, 1e-8)


@own
def test_merge__at_a_size_that_is_never_written_out(make, monkeypatch: pytest.MonkeyPatch) -> None:
    space = fk.ParameterSpace(("l.weight",), ((50, 70),))  # D = 3,500
    monkeypatch.setattr(FisherOperator, "_to_dense", lambda self: pytest.fail("written out"))
    operators = [make(space, seed)[0] for seed in (0, 1)]
    models = mc.states(space, 2)
    merged = merge(models, operators, [1.0, 1.0], damping=0.1, normalize="trace", output_damping=0.0)
    flat, a, b = (mc.flat(state, space) for state in (merged, *models))
    first, second = (float(space.size / operator.trace()) * operator for operator in operators)
    left = first @ (flat - a) + second @ (flat - b) + 0.1 * (flat - (a + b) / 2)
    assert float(left.norm()) < 1e-9 * float((first @ a).norm())


def test_ewc__penalty_is_the_quadratic_form_of_both_tasks() -> None:
    model = mlp()
    ewc = fk.continual.EWC(model, strength=2.0, normalize=None)
    matrices, anchors = [], []
    for seed in (0, 1):
        operator, matrix = spiked(SPACE, seed)
        anchors.append(SPACE.flatten({n: p.detach() for n, p in model.named_parameters()}))
        matrices.append(matrix)
        ewc.consolidate(operator)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1)
    theta = SPACE.flatten({n: p.detach() for n, p in model.named_parameters()})
    forms = [(theta - anchor) @ matrix @ (theta - anchor) for matrix, anchor in zip(matrices, anchors, strict=True)]
    close(ewc.penalty().detach(), torch.stack(forms).sum())
    state = ewc.state_dict()
    other = fk.continual.EWC(model, strength=2.0, normalize=None)
    other.load_state_dict(state)
    close(other.penalty().detach(), torch.stack(forms).sum())


@own
def test_influence__scores_are_those_of_the_dense_inverse(make) -> None:
    model = mlp()
    operator, matrix = make(SPACE)
    gradients = by_hand.rows(model, (X, Y))
    options = {"likelihood": "categorical", "examples": len(X)}
    scores = fk.influence.InfluenceScores(operator, model, damping=0.3, **options)
    inverse = torch.linalg.inv(matrix + 0.3 * torch.eye(len(matrix), dtype=F64))
    close(scores.scores((X, Y), (X, Y)), gradients @ inverse @ gradients.T / len(X), 1e-7)
    close(scores.self_influence((X, Y)), ((gradients @ inverse) * gradients).sum(1) / len(X), 1e-7)
    with pytest.raises(fk.NoClosedFormError, match="usual_damping"):
        fk.influence.InfluenceScores(operator, model, **options)


@own
def test_evaluation__measures_by_it_and_audits_it(make) -> None:
    operator, matrix = make(SPACE)
    v, g = normal(SPACE.size, seed=5), normal(SPACE.size, seed=6)
    close(approximation_quality(v, operator, g), ((v @ matrix @ v).sqrt() / (v @ g).abs()))
    damped = matrix + 1e-2 * torch.eye(len(matrix), dtype=F64)
    close(quality_floor(operator, g, damping=1e-2), 1 / (g @ torch.linalg.solve(damped, g)).sqrt(), 1e-7)
    exact = fk.ExactFisher(mlp(), (X, Y))
    dense = exact.to_dense()
    found = audit(operator, exact).total
    assert found.cosine == pytest.approx(float((matrix * dense).sum() / matrix.norm() / dense.norm()))
    assert found.scale == pytest.approx(float((matrix * dense).sum() / dense.square().sum()))
