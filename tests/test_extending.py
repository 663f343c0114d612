"""What a user adds: a likelihood, a kind, a structure, each a small class, and everything else works with it."""

import copy
import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
import torch
from scipy import stats
from torch import Tensor, nn
from typer.testing import CliRunner

import fisherkit as fk
from fisherkit.cli import app
from fisherkit.operators import DiagonalOperator
from fisherkit.rows.base import UnitRows
from fisherkit.space import ParameterSpace
from tests import by_hand
from tests.reference.fisher import Problem
from tests.theorem_cases import assert_below, build, error, metric, problem

STRUCTURES = ["full", "block", "diagonal", "kfac", "ekfac"]


# -- a likelihood ------------------------------------------------------------------------------------------------------


class Poisson(fk.likelihoods.Likelihood):
    """Counts with a log link: ℓ = exp(z) − y z."""

    name = "poisson"

    def gradient(self, z: Tensor, target: Tensor) -> Tensor:
        return z.exp() - target

    def hessian_factor(self, z: Tensor) -> Tensor:
        return torch.diag_embed((z / 2).exp())

    def sample(self, z: Tensor, uniform: Tensor) -> Tensor:
        return torch.from_numpy(stats.poisson.ppf(uniform.numpy(), z.exp().numpy())).to(z.dtype)


@pytest.fixture
def counts() -> tuple[nn.Module, Tensor, Tensor]:
    """A small network of two rates, inputs and counts."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
        x = torch.randn(8, 3, dtype=torch.float64)
        return model, x, torch.poisson(torch.full((8, 2), 1.5)).double()


def test_likelihood__empirical_kinds_are_made_of_its_gradients(counts: tuple[nn.Module, Tensor, Tensor]) -> None:
    model, x, y = counts
    j = by_hand.rows(model, (x, y), loss=nn.functional.poisson_nll_loss)
    s = (model(x).exp() - y).square().sum(1).detach()
    ef, ief = (kind(model, (x, y), likelihood=Poisson()) for kind in (fk.EmpiricalFisher, fk.ImprovedEmpiricalFisher))
    assert error(ef.to_dense(), j.T @ j / 8) < 1e-12
    assert error(ief.to_dense(), j.T @ (j / s[:, None]) / 8) < 1e-12
    assert ef.metadata["likelihood"] == "poisson"


def test_likelihood__exact_kind_is_the_hessian_of_its_loss_where_the_model_is_linear() -> None:
    generator = torch.Generator().manual_seed(0)
    model = nn.Linear(3, 2, bias=False).double()
    x = torch.randn(8, 3, dtype=torch.float64, generator=generator)
    y = torch.ones(8, 2, dtype=torch.float64)

    def loss(weight: Tensor) -> Tensor:
        return nn.functional.poisson_nll_loss(x @ weight.T, y, reduction="sum") / 8

    hessian = torch.autograd.functional.hessian(loss, model.weight.detach()).reshape(6, 6)
    assert error(fk.ExactFisher(model, (x, None), likelihood=Poisson()).to_dense(), hessian) < 1e-12


def test_likelihood__sampled_kind_is_unbiased(counts: tuple[nn.Module, Tensor, Tensor]) -> None:
    model, x, _ = counts
    exact = fk.ExactFisher(model, (x, None), likelihood=Poisson()).to_dense()
    few, many = (
        error(fk.SampledFisher(model, (x, None), likelihood=Poisson(), draws=draws).to_dense(), exact)
        for draws in (20, 4_000)
    )
    assert many < 0.06
    assert few > 3 * many


def test_likelihood__sampled_counts_that_repeat_are_one_row(counts: tuple[nn.Module, Tensor, Tensor]) -> None:
    model, x, _ = counts
    assert fk.SampledFisher(model, (x, None), likelihood=Poisson(), draws=500).rows < 8 * 150


def test_likelihood__truncated_kind_climbs_to_exact() -> None:
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(5, 2, 3, dtype=torch.float64, generator=generator)  # two positions of three rates
    y = torch.poisson(z.exp(), generator=generator)
    exact = metric(fk.ExactFisher, z, y, Poisson())
    chain = [metric(fk.TruncatedFisher, z, y, Poisson(), rank=rank) for rank in (1, 2, 4, 6)]
    for lower, upper in zip(chain, [*chain[1:], exact], strict=True):
        assert_below(lower, upper)
    assert error(chain[-1], exact) < 1e-12
    assert error(metric(fk.TruncatedFisher, z, y, Poisson(), tolerance=0.0), exact) < 1e-12


@pytest.mark.parametrize("structure", STRUCTURES)
def test_likelihood__works_in_every_structure(structure: str, counts: tuple[nn.Module, Tensor, Tensor]) -> None:
    model, x, y = counts
    fisher = fk.ExactFisher(model, (x, y), likelihood=Poisson(), structure=structure)
    v = torch.ones(fisher.size, dtype=torch.float64)
    assert error(fisher @ fisher.solve(v, damping=0.1) + 0.1 * fisher.solve(v, damping=0.1), v) < 1e-10


class Counts(Poisson):
    """The same with its support checked."""

    def check_values(self, target: Tensor, call: str) -> None:
        super().check_values(target, call)
        if bool((target < 0).any()):
            raise fk.DataError(call=call, got="negative counts", expected="0, 1, 2, ...")


def test_likelihood__may_refuse_targets(counts: tuple[nn.Module, Tensor, Tensor]) -> None:
    model, x, y = counts
    with pytest.raises(fk.DataError, match="negative counts"):
        fk.EmpiricalFisher(model, (x, -1 - y), likelihood=Counts())
    with pytest.raises(fk.DataError, match="NaN or infinite"):
        fk.EmpiricalFisher(model, (x, y / 0), likelihood=Counts())


def test_likelihood__derived_from_a_built_in_one_is_asked_for_its_own_factor() -> None:
    """The built-in's way to single columns belongs to the built-in's factor alone."""

    class Doubled(fk.likelihoods.Categorical):
        def hessian_factor(self, z: Tensor) -> Tensor:
            return 2 * super().hessian_factor(z)

    torch.manual_seed(0)
    model, x = torch.nn.Linear(3, 4).double(), torch.randn(5, 3, dtype=torch.float64)
    plain, ours = (fk.ExactFisher(model, (x, None), likelihood=own) for own in ("categorical", Doubled()))
    torch.testing.assert_close(ours.to_dense(), 4 * plain.to_dense())


# -- a kind ------------------------------------------------------------------------------------------------------------


class SelfLabelled(fk.OutputRule):
    """The empirical Fisher at the model's own most likely label."""

    kind_name = "self-labelled"

    def output_vectors(self, outputs: fk.Outputs) -> fk.OutputVectors:
        u = outputs.likelihood.gradient(outputs.z, outputs.z.argmax(-1))
        return fk.OutputVectors(outputs.masked(u).unsqueeze(1))


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("family", ["mlp", "token_mlp", "token_mlp_by_token", "conv_pooled"])
def test_kind__of_one_method_works_in_every_structure(family: str, structure: str) -> None:
    of = problem(family)
    predicted = of.model(of.inputs).argmax(-1)
    if of.targets.ndim > 1:
        predicted[of.targets == -100] = -100
    relabelled = Problem(of.model, of.inputs, predicted, of.likelihood, of.example)
    found = build(partial(fk.FisherApproximation, kind=SelfLabelled()), of, structure=structure)
    expected = build(fk.EmpiricalFisher, relabelled, structure=structure)
    assert error(found.to_dense(), expected.to_dense()) < 1e-12
    assert found.rows == expected.rows


def test_kind__needs_no_name() -> None:
    """One method is all that a kind must say; a name is for what is recorded in files."""

    class Unnamed(fk.OutputRule):
        def output_vectors(self, outputs: fk.Outputs) -> fk.OutputVectors:
            return fk.OutputVectors(outputs.gradient().unsqueeze(1))

    of = problem("mlp")
    assert (
        error(
            build(partial(fk.FisherApproximation, kind=Unnamed()), of).to_dense(),
            build(fk.EmpiricalFisher, of).to_dense(),
        )
        < 1e-14
    )


class LikelyLabels(fk.OutputRule):
    """The exact Fisher's sum over labels, Σ_k p_k u_k u_kᵀ, without the labels less likely than a threshold."""

    kind_name = "likely"
    needs_targets = False
    positionwise = True  # every position has labels of its own

    def __init__(self, threshold: float) -> None:
        self.threshold = threshold

    def output_vectors(self, outputs: fk.Outputs) -> fk.OutputVectors:
        p = outputs.z[:, 0].softmax(-1)
        u = p.unsqueeze(1) - torch.eye(p.shape[1], dtype=p.dtype)
        v = p.sqrt().unsqueeze(2) * u
        left_out = torch.where(p < self.threshold, v.square().sum(2), 0.0).sum(1)
        return fk.OutputVectors(v.unsqueeze(2), keep=p >= self.threshold, dropped=left_out)


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("family", ["mlp", "token_mlp", "token_mlp_by_token"])
def test_kind__with_options_and_a_row_a_label_is_exact_in_the_limit(family: str, structure: str) -> None:
    of = problem(family)
    found = build(partial(fk.FisherApproximation, kind=LikelyLabels(0.0)), of, structure=structure)
    assert error(found.to_dense(), build(fk.ExactFisher, of, structure=structure).to_dense()) < 1e-12
    assert found.metadata["kind"] == "likely"


def test_kind__may_leave_rows_out_and_say_so() -> None:
    of = problem("mlp_no_bias")
    p = of.model(of.inputs).softmax(-1)
    found, exact = build(partial(fk.FisherApproximation, kind=LikelyLabels(0.2)), of), build(fk.ExactFisher, of)
    assert found.rows == int((p >= 0.2).sum())
    assert found.dropped_trace is not None
    assert found.dropped_trace.shape == (6,)
    assert bool((found.dropped_trace > 0).all())
    assert_below(found.to_dense(), exact.to_dense())


# -- a structure -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Trace(fk.structures.UnitSums):
    """Σ ‖row‖² of a layer."""

    label = "scalar"

    trace: Tensor

    def operator(self, space: ParameterSpace, scale: float) -> fk.FisherOperator:
        return DiagonalOperator(space, (scale * self.trace / space.size).repeat(space.size))


class Scalar(fk.structures.LayerStructure):
    """Of each layer, the multiple of the identity that has its trace."""

    name = "scalar"
    meaning = "one number a layer"

    def record(self, rows: UnitRows) -> Trace:
        return Trace(rows.squared_sum().sum())


def levels(diagonal: Tensor, space: ParameterSpace) -> Tensor:
    """Each module's mean entry, in the place of its entries."""
    found = torch.empty_like(diagonal)
    for names in space.blocks.values():
        places = torch.cat([torch.arange(space.size)[space.slices[name]] for name in names])
        found[places] = diagonal[places].mean()
    return found


def test_structure__is_built_saved_and_listed(tmp_path: Path) -> None:
    of = problem("mlp")
    found, diagonal = (build(fk.ExactFisher, of, structure=s) for s in ("scalar", "diagonal"))
    expected = levels(diagonal.diagonal(), found.space)
    assert error(found.diagonal(), expected) < 1e-12
    assert found.metadata["structure"] == "scalar"
    assert {entry.structure for entry in found.coverage().entries} == {"scalar"}
    found.save(tmp_path / "f")
    assert error(fk.load(tmp_path / "f").diagonal(), expected) < 1e-14
    fk.testing.check_fisher(found, expected.diag())
    listed = json.loads(CliRunner().invoke(app, ["info", "--json"]).stdout)["structures"]
    assert listed["scalar"] == "one number a layer"
    with pytest.raises(fk.InvalidArgumentError, match="'scalar'"):
        build(fk.ExactFisher, of, structure="scalr")


@pytest.mark.parametrize("ema", [0.0, 0.6])
def test_structure__is_averaged_and_resumed_by_both_optimizers(ema: float) -> None:
    of = problem("mlp")
    half = [Problem(of.model, of.inputs[t], of.targets[t]) for t in (slice(3), slice(3, 6))]
    means = [build(fk.EmpiricalFisher, part, structure="scalar").diagonal() for part in half]
    average = (ema * means[0] + means[1]) / (ema + 1)
    steps = []
    for stop in (False, True):
        preconditioner = fk.optim.Preconditioner(of.model, kind="ef", structure="scalar", damping=0.1, ema=ema)
        for number, part in enumerate(half):
            if stop and number == 1:
                state = preconditioner.state_dict()
                preconditioner.close()
                preconditioner = fk.optim.Preconditioner(of.model, kind="ef", structure="scalar", damping=0.1, ema=ema)
                preconditioner.load_state_dict(state)
            of.model.zero_grad()
            nn.functional.cross_entropy(of.model(part.inputs), part.targets).backward()
            gradient = torch.cat([p.grad.flatten() for p in of.model.parameters()])
            preconditioner.step()
        steps.append(torch.cat([p.grad.flatten() for p in of.model.parameters()]))
        preconditioner.close()
        of.model.zero_grad()
    assert error(steps[0], gradient / (average + 0.1)) < 1e-12
    assert torch.equal(*steps)
    optimizer = fk.optim.NaturalGradient(of.model, 0.5, kind="ef", structure="scalar", damping=0.1)
    before = by_hand.weights(of.model)
    nn.functional.cross_entropy(of.model(half[1].inputs), half[1].targets).backward()
    optimizer.step()
    after = by_hand.weights(of.model)
    assert error(before - after, 0.5 * gradient / (means[1] + 0.1)) < 1e-12


def test_structure__is_what_applications_take() -> None:
    of = problem("mlp")
    fisher = build(fk.EmpiricalFisher, of, structure="scalar")
    d = fisher.diagonal()
    ewc = fk.continual.EWC(of.model, strength=2.0, normalize=None)
    ewc.consolidate(fisher)
    merged = copy.deepcopy(of.model)
    with torch.no_grad():
        for p in of.model.parameters():
            p.add_(0.1)
    assert float(ewc.penalty().detach()) == pytest.approx(float(d.sum()) * 0.01, rel=1e-9)
    other = build(fk.EmpiricalFisher, of, structure="scalar")
    state = fk.merging.merge([merged, of.model], [fisher, other], damping=1e-8, normalize=None)
    start, end = map(by_hand.weights, (merged, of.model))
    expected = (d * start + other.diagonal() * end) / (d + other.diagonal())
    assert error(torch.cat([state[n].flatten() for n in fisher.space.names]), expected) < 1e-5
    scores = fk.influence.InfluenceScores(other, of.model, damping=0.1)
    found = scores.scores((of.inputs[:2], of.targets[:2]), (of.inputs, of.targets))
    J = by_hand.rows(of.model, (of.inputs, of.targets))
    assert error(found, J[:2] @ (J / (other.diagonal() + 0.1)).T / other.examples) < 1e-10


# -- what is one's own does not pass for the package's -----------------------------------------------------------------


def test_structure__has_a_name_of_its_own() -> None:
    with pytest.raises(fk.InvalidArgumentError, match=r"name = 'diagonal'.*another matrix"):

        class Diagonal(Scalar):
            name = "diagonal"

    assert fk.structures.structure_named("diagonal", "test").__module__.startswith("fisherkit.")


def test_operator__has_a_tag_of_its_own(tmp_path: Path) -> None:
    build(fk.ExactFisher, problem("mlp"), structure="diagonal").save(tmp_path / "f")

    class Twice(DiagonalOperator):
        tag = "diagonal"

        def _matmat(self, v: Tensor) -> Tensor:
            return 2 * super()._matmat(v)

    class Another(fk.operators.DenseOperator):
        tag = "diagonal"

    try:
        with pytest.raises(fk.FileFormatError, match=r"class Another.*tag = 'diagonal'"):
            fk.load(tmp_path / "f")
    finally:
        Another.tag = ""
    assert type(fk.operators.unwrap(fk.load(tmp_path / "f"))) is DiagonalOperator


@dataclass(frozen=True)
class Square(fk.structures.UnitSums):
    """Σ row rowᵀ of a layer."""

    label = "square"

    matrix: Tensor

    def operator(self, space: ParameterSpace, scale: float) -> fk.FisherOperator:
        return fk.operators.DenseOperator(space, scale * self.matrix)


class Squares(fk.structures.LayerStructure):
    """A dense block a layer, whose size nobody was told of."""

    name = "squares"
    meaning = "a dense block a layer"

    def record(self, rows: UnitRows) -> Square:
        return Square(rows.dense().mT @ rows.dense())


def test_structure__that_is_larger_than_it_says_is_refused_with_a_budget() -> None:
    of = problem("mlp")
    fisher = build(fk.ExactFisher, of, structure="squares")
    assert error(fisher.to_dense(), build(fk.ExactFisher, of, structure="block").to_dense()) < 1e-12
    with pytest.raises(fk.MemoryBudgetError, match="`bytes` said"):
        build(fk.ExactFisher, of, structure="squares", memory_budget=fisher.nbytes - 1)
    with pytest.raises(fk.InvalidArgumentError, match="dtype"):
        build(fk.ExactFisher, of, structure="squares", dtype=torch.float32)


class Doubled(fk.OutputRule):
    """v = 2 ∂ℓ/∂z."""

    kind_name = "doubled"

    def output_vectors(self, outputs: fk.Outputs) -> fk.OutputVectors:
        return fk.OutputVectors(2 * outputs.gradient().unsqueeze(1))


@pytest.mark.parametrize("passes", [1, 2])
def test_kind__of_the_gradient_is_refused_where_the_scale_is_known_too_late(passes: int) -> None:
    torch.manual_seed(0)
    model, x, y = nn.Linear(4, 3).double(), torch.randn(6, 4).double(), torch.randn(6, 3).double()
    optimizer = fk.optim.NaturalGradient(model, 0.1, kind=Doubled(), likelihood="gaussian", damping=0.05)
    for part in range(passes):
        (model(x[part::passes]) - y[part::passes]).square().sum(1).mean().div(2 * passes).backward()
    if passes == 2:
        with pytest.raises(fk.ModelError, match="one forward pass a step"):
            optimizer.step()
        return
    with optimizer.paused():
        losses = (model(x) - y).square().sum(1)
    rows = [torch.autograd.grad(loss, [*model.parameters()], retain_graph=True) for loss in losses]
    j = torch.stack([torch.cat([g.flatten() for g in row]) for row in rows])  # those of twice the loss
    g = torch.cat([p.grad.flatten() for p in model.parameters()])
    before = torch.cat([p.detach().flatten() for p in model.parameters()])
    optimizer.step()
    step = torch.cat([p.detach().flatten() for p in model.parameters()]) - before
    assert error(step, -0.1 * torch.linalg.solve(j.T @ j / 6 + 0.05 * torch.eye(15).double(), g)) < 1e-12
    optimizer.close()


def test_kind__may_be_compared_as_an_object() -> None:
    of = problem("mlp")
    table = fk.evaluation.compare(of.model, (of.inputs, of.targets), kinds=("ef", Doubled()), gram_dampings=(1e-2,))
    assert {row.kind for row in table.rows} == {"ef", "doubled"}
    assert "doubled" in str(table)
