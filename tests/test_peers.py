"""The same matrices from other libraries: curvlinops 3.0.1 and nngeometry 0.4, where they are right.

Their conventions are stated and asserted, not adapted to silently. Each gets its own copy of the model, because they
work with hooks on it. They are imported without a fallback: `make test` installs them; a skipped cross-check is none.
"""

import copy
from collections.abc import Iterator
from typing import Any

import curvlinops
import pytest
import torch
from nngeometry.backend import TorchHooksJacobianBackend
from nngeometry.layercollection import LayerCollection
from nngeometry.metrics import FIM
from nngeometry.object import pspace
from nngeometry.object.vector import PVector
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import fisherkit as fk
from tests.axes import pairwise
from tests.theorem_cases import build, error, problem

# More examples than any layer here has inputs, and no two inputs of a convolution that see the same pixels: no factor
# is singular, so that EKFAC's eigenbasis is not a matter of choice.
N = 20

MODELS: dict[str, tuple[Any, tuple[int, ...]]] = {
    "mlp": (lambda: nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)), (4,)),
    "cnn": (lambda: nn.Sequential(nn.Conv2d(1, 3, 2, stride=2, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(3, 4, 2, stride=2, bias=False), nn.Tanh(), nn.Flatten(), nn.Linear(4, 3)), (1, 6, 6)),
}  # fmt: skip
LIKELIHOODS = ["categorical", "gaussian", "bernoulli"]
KINDS: dict[str, type[fk.FisherApproximation]] = {"empirical": fk.EmpiricalFisher, "type-2": fk.ExactFisher}


def case(model: str, likelihood: str) -> tuple[nn.Module, Tensor, Tensor]:
    """A model, inputs and targets in float64."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        make, shape = MODELS[model]
        net, x = make().double(), torch.randn(N, *shape, dtype=torch.float64)
        y = torch.randint(3, (N,)) if likelihood == "categorical" else torch.randn(N, 3, dtype=torch.float64)
    return net, x, (y > 0).double() if likelihood == "bernoulli" else y


# -- curvlinops --------------------------------------------------------------------------------------------------------

LOSSES = {"categorical": nn.CrossEntropyLoss, "gaussian": nn.MSELoss, "bernoulli": nn.BCEWithLogitsLoss}


def curvlinops_matrix(operator: Any, model: nn.Module, loss: nn.Module, data: Any, **options: Any) -> Tensor:
    own = copy.deepcopy(model)
    params = list(own.parameters())
    built = operator(own, loss, params, data, **options)
    return built @ torch.eye(sum(p.numel() for p in params), dtype=torch.float64)


def curvlinops_scale(likelihood: str, reduction: str, kind: str) -> float:
    """How many times our matrix theirs is.

    MSELoss lacks the ½ of a log-likelihood: gradients are twice ours, the Hessian too. Reduced by "mean", all losses
    but the categorical are also divided by the number of outputs.
    """
    scale = 1.0 if likelihood != "gaussian" else {"empirical": 4.0, "type-2": 2.0}[kind]
    return scale if reduction == "sum" or likelihood == "categorical" else scale / 3


@pytest.mark.parametrize(
    ("model", "likelihood", "reduction", "kind"), pairwise(MODELS, LIKELIHOODS, ["mean", "sum"], KINDS)
)
def test_curvlinops__full_matrix_is_ours(model: str, likelihood: str, reduction: str, kind: str) -> None:
    net, x, y = case(model, likelihood)
    operator = {"empirical": curvlinops.EFLinearOperator, "type-2": curvlinops.GGNLinearOperator}[kind]
    theirs = curvlinops_matrix(operator, net, LOSSES[likelihood](reduction=reduction), [(x[:7], y[:7]), (x[7:], y[7:])])
    ours = KINDS[kind](net, (x, y), likelihood=likelihood, normalization=reduction).to_dense()
    assert error(theirs, curvlinops_scale(likelihood, reduction, kind) * ours) < 1e-13


@pytest.mark.parametrize(
    ("model", "likelihood", "kind", "positions", "structure"),
    pairwise(MODELS, LIKELIHOODS, KINDS, ["expand", "reduce"], ["kfac", "ekfac"]),
)
def test_curvlinops__kronecker_factors_are_ours(
    model: str, likelihood: str, kind: str, positions: str, structure: str
) -> None:
    net, x, y = case(model, likelihood)
    operator = {"kfac": curvlinops.KFACLinearOperator, "ekfac": curvlinops.EKFACLinearOperator}[structure]
    theirs = curvlinops_matrix(
        operator,
        net,
        LOSSES[likelihood](reduction="sum"),
        [(x[:7], y[:7]), (x[7:], y[7:])],
        fisher_type=kind,
        kfac_approx=positions,
        separate_weight_and_bias=False,
    )
    ours = KINDS[kind](
        net, (x, y), likelihood=likelihood, structure=structure, kfac_positions=positions, normalization="sum"
    )
    assert error(theirs, curvlinops_scale(likelihood, "sum", kind) * ours.to_dense()) < 1e-12


def test_curvlinops__kfac_by_default_is_ours_without_what_joins_weight_and_bias() -> None:
    net, x, y = case("mlp", "categorical")
    theirs = curvlinops_matrix(
        curvlinops.KFACLinearOperator, net, nn.CrossEntropyLoss(), [(x, y)], fisher_type="type-2"
    )
    ours = fk.ExactFisher(net, (x, y), structure="kfac")
    apart = torch.block_diag(*(torch.ones(p.numel(), p.numel(), dtype=torch.float64) for p in net.parameters()))
    assert error(theirs, apart * ours.to_dense()) < 1e-13
    assert error(theirs, ours.to_dense()) > 0.1


@pytest.mark.parametrize(
    "family", ["shared_module", "tied_linears", "layernorm", "residual", "linear_3d", "lstm", "rmsnorm"]
)
@pytest.mark.parametrize("kind", KINDS)
def test_curvlinops__full_matrix_is_ours_for_any_wiring(family: str, kind: str) -> None:
    """Theirs is by forward and reverse mode through the whole model, so that no layer rule is in common."""
    of = problem(family)
    operator = {"empirical": curvlinops.EFLinearOperator, "type-2": curvlinops.GGNLinearOperator}[kind]
    theirs = curvlinops_matrix(operator, of.model, nn.CrossEntropyLoss(), [(of.inputs, of.targets)])
    assert error(theirs, build(KINDS[kind], of).to_dense()) < 1e-12


def curvlinops_kfac(family: str) -> tuple[Tensor, Tensor, Tensor]:
    """Theirs, ours and the exact blocks over a family's first layer, a Linear from 4 to 4."""
    of = problem(family)
    options = {"fisher_type": "type-2", "separate_weight_and_bias": False}
    loss, data = nn.CrossEntropyLoss(), [(of.inputs, of.targets)]
    theirs = curvlinops_matrix(curvlinops.KFACLinearOperator, of.model, loss, data, **options)
    ours, exact = (build(fk.ExactFisher, of, structure=structure).to_dense() for structure in ("kfac", "block"))
    return theirs[:20, :20], ours[:20, :20], exact[:20, :20]


def test_curvlinops__kfac_of_a_tied_weight_is_no_symmetric_matrix_where_ours_is_exact() -> None:
    """Two modules write the one weight's product, each with its own factors, and the last one wins."""
    theirs, ours, exact = curvlinops_kfac("tied_linears")
    assert error(theirs.T, theirs) > 0.01
    assert error(ours[:16, :16], exact[:16, :16]) < 1e-12  # the weight alone: the biases are not shared


@pytest.mark.parametrize("family", ["reused_module", "shared_module"])
def test_curvlinops__kfac_of_a_module_used_twice_is_twice_ours(family: str) -> None:
    """The inputs of all calls are summed there and averaged here, as over any other shared positions."""
    theirs, ours, _ = curvlinops_kfac(family)
    assert error(theirs, 2 * ours) < 1e-12


@pytest.mark.parametrize("kind", KINDS)
def test_curvlinops__takes_every_position_for_an_example(kind: str) -> None:
    """Of outputs with positions their empirical Fisher is our ``example="token"``; exact is the same in both."""
    of = problem("token_mlp")
    targets = of.targets.clamp_min(0)  # theirs knows no ignored labels
    classes_second = nn.Sequential(of.model, _Transpose())
    operator = {"empirical": curvlinops.EFLinearOperator, "type-2": curvlinops.GGNLinearOperator}[kind]
    theirs = curvlinops_matrix(operator, classes_second, nn.CrossEntropyLoss(reduction="sum"), [(of.inputs, targets)])
    token, sequence = (
        KINDS[kind](of.model, (of.inputs, targets), example=example, normalization="sum").to_dense()
        for example in ("token", "sequence")
    )
    assert error(theirs, token) < 1e-12
    assert error(theirs, sequence) > 0.1 if kind == "empirical" else error(theirs, sequence) < 1e-12


class _Transpose(nn.Module):
    def forward(self, z: Tensor) -> Tensor:
        return z.movedim(-1, 1)


@pytest.mark.parametrize("structure", ["kfac", "ekfac"])
def test_curvlinops__damped_inverse_is_ours(structure: str) -> None:
    """Only with ``use_exact_damping``: by default they add √λ to each factor, which is no damping of the matrix."""
    net, x, y = case("cnn", "categorical")
    operator = {"kfac": curvlinops.KFACLinearOperator, "ekfac": curvlinops.EKFACLinearOperator}[structure]
    own = copy.deepcopy(net)
    options = {"fisher_type": "type-2", "separate_weight_and_bias": False}
    theirs = operator(own, nn.CrossEntropyLoss(), list(own.parameters()), [(x, y)], **options)
    inverse = curvlinops.KFACInverseLinearOperator(theirs, damping=1e-2, use_exact_damping=True)
    ours = fk.ExactFisher(net, (x, y), structure=structure)
    v = torch.randn(ours.size, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert error(inverse @ v, ours.solve(v, damping=1e-2)) < 1e-11


# -- nngeometry --------------------------------------------------------------------------------------------------------

REPRESENTATIONS = {
    "full": pspace.PMatDense,
    "block": pspace.PMatBlockDiag,
    "diagonal": pspace.PMatDiag,
    "kfac": pspace.PMatKFAC,
    "ekfac": pspace.PMatEKFAC,
}
VARIANTS = {"categorical": "classif_logits", "gaussian": "regression"}


@pytest.fixture
def float64_by_default() -> Iterator[None]:
    """Theirs makes some constants in the default dtype and mixes them with the model's."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


def nngeometry_matrix(kind: str, structure: str, likelihood: str, model: nn.Module, x: Tensor, y: Tensor) -> Any:
    own, loader = copy.deepcopy(model), DataLoader(TensorDataset(x, y), batch_size=len(x))
    if kind == "type-2":
        matrix = FIM(own, loader, REPRESENTATIONS[structure], variant=VARIANTS[likelihood])
    else:

        def losses(inputs: Tensor, targets: Tensor) -> Tensor:
            z = own(inputs)
            if likelihood == "categorical":
                return nn.functional.cross_entropy(z, targets, reduction="none")[:, None]
            return 0.5 * (z - targets).square().sum(1, keepdim=True)

        backend = TorchHooksJacobianBackend(
            layer_collection=LayerCollection.from_model(own), model=own, function=losses
        )
        matrix = REPRESENTATIONS[structure](generator=backend, examples=loader)
    if structure == "ekfac":
        matrix.update_diag(loader)  # as built it is KFAC in its eigenbasis
    return matrix


@pytest.mark.usefixtures("float64_by_default")
@pytest.mark.parametrize(
    ("model", "likelihood", "kind", "structure"), pairwise(MODELS, VARIANTS, KINDS, REPRESENTATIONS)
)
def test_nngeometry__every_representation_is_ours(model: str, likelihood: str, kind: str, structure: str) -> None:
    net, x, y = case(model, likelihood)
    theirs = nngeometry_matrix(kind, structure, likelihood, net, x, y).to_torch()
    ours = KINDS[kind](net, (x, y), likelihood=likelihood, structure=structure).to_dense()
    assert error(theirs, ours) < 1e-12


@pytest.mark.usefixtures("float64_by_default")
def test_nngeometry__kfac_solve_damps_the_factors_instead_of_the_matrix() -> None:
    """(G + √λ/π I) ⊗ (A + π√λ I) is G ⊗ A + λI and two cross terms more, so that its inverse is smaller."""
    net, x, y = case("mlp", "categorical")
    theirs = nngeometry_matrix("type-2", "kfac", "categorical", net, x, y)
    ours = fk.ExactFisher(net, (x, y), structure="kfac")
    v = torch.randn(ours.size, generator=torch.Generator().manual_seed(0))
    vector = PVector(theirs.generator.layer_collection, vector_repr=v)
    smaller, exact = theirs.solve(vector, regul=1e-2).to_torch(), ours.solve(v, damping=1e-2)
    assert error(smaller, exact) > 0.1
    assert float(v @ smaller) < float(v @ exact)
