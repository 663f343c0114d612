"""EWC: values and gradients against sums written out, in any loop, for every kind and structure."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fisherkit as fk
from fisherkit.continual import EWC
from fisherkit.errors import NoClosedFormError
from fisherkit.operators import SumOperator
from tests.axes import paired
from tests.by_hand import weights as flat
from tests.operator_cases import DTYPES, TOLERANCE, normal
from tests.small_data import mlp
from tests.snapshot import untouched

F64 = torch.float64
KINDS: dict[str, tuple[Any, dict[str, Any]]] = {
    "ef": (fk.EmpiricalFisher, {}),
    "ief": (fk.ImprovedEmpiricalFisher, {}),
    "sf": (fk.SampledFisher, {"draws": 2}),
    "exact": (fk.ExactFisher, {}),
    "truncated": (fk.TruncatedFisher, {"rank": 1}),
}
STRUCTURES = ["full", "block", "diagonal", "kfac", "ekfac"]


def task(seed: int, dtype: torch.dtype = F64, number: int = 12, features: slice = slice(None)) -> tuple[Tensor, Tensor]:
    x = torch.zeros(number, 4, dtype=dtype)
    x[:, features] = normal(number, 4, seed=seed, dtype=dtype)[:, features]
    return x, (x.double() @ normal(4, 3, seed=seed + 100)).argmax(1)


def gradient(model: nn.Module) -> Tensor:
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]
    return torch.cat([grad.reshape(-1) for grad in grads])


def move(model: nn.Module, seed: int, size: float = 0.3) -> None:
    with torch.no_grad():
        for i, p in enumerate(model.parameters()):
            p += size * normal(*p.shape, seed=1000 * seed + i, dtype=p.dtype)


Reference = list[tuple[Tensor, Tensor]]


def learned(
    build: Callable[[nn.Module, int], Any],
    tasks: int = 4,
    dtype: torch.dtype = F64,
    strength: float = 0.3,
    **options: Any,
) -> tuple[nn.Module, EWC, Reference]:
    """A model moved and consolidated several times, and the matrices and centres of each."""
    model = mlp().to(dtype)
    ewc, reference = EWC(model, strength, **{"normalize": "trace", **options}), []
    for t in range(tasks):
        fisher = build(model, t)
        ewc.consolidate(fisher)
        reference.append((fisher.to_dense().double(), flat(model).double()))
        move(model, t + 1)
    return model, ewc, reference


def written_out(
    reference: Reference, theta: Tensor, strength: float = 0.3, decay: float = 1.0, normalized: bool = True
) -> tuple[Tensor, Tensor]:
    """½ · strength · Σ decay^age dᵀFd and its gradient, from dense matrices."""
    value, total = torch.zeros((), dtype=F64), torch.zeros_like(theta, dtype=F64)
    for age, (matrix, centre) in enumerate(reversed(reference)):
        factor = len(matrix) / matrix.trace() if normalized else 1.0
        d = theta.double() - centre
        product = strength * decay**age * factor * (matrix @ d)
        value, total = value + 0.5 * (d @ product), total + product
    return value, total


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("kind", "structure"), paired(KINDS, STRUCTURES))
def test_penalty__is_the_sum_over_tasks_for_every_kind_and_structure(
    kind: str, structure: str, dtype: torch.dtype
) -> None:
    cls, options = KINDS[kind]
    model, ewc, reference = learned(
        lambda model, t: cls(model, task(t, dtype), structure=structure, **options), dtype=dtype, decay=0.7
    )
    penalty = ewc.penalty()
    penalty.backward()
    value, expected = written_out(reference, flat(model), decay=0.7)
    assert penalty.dtype == dtype
    assert float(abs(penalty.detach().double() - value) / value) < TOLERANCE[dtype]
    assert float((gradient(model).double() - expected).norm() / expected.norm()) < TOLERANCE[dtype]


@pytest.mark.parametrize("how", [None, "norm"])
def test_penalty__takes_other_normalizations(how: str | None) -> None:
    model, ewc, reference = learned(
        lambda model, t: fk.EmpiricalFisher(model, task(t), structure="kfac"), normalize=how, strength=2.0
    )
    if how == "norm":
        reference = [(matrix * len(matrix) ** 0.5 / matrix.norm(), centre) for matrix, centre in reference]
    value, _ = written_out(reference, flat(model), 2.0, normalized=False)
    torch.testing.assert_close(ewc.penalty().detach(), value, rtol=1e-10, atol=0.0)


def test_penalty__takes_sums_loaded_files_and_operators_of_ones_own(tmp_path: Any) -> None:
    def build(model: nn.Module, t: int) -> Any:
        kfac = fk.EmpiricalFisher(model, task(t), structure="kfac")
        if t == 0:
            return 0.5 * kfac + fk.ExactFisher(model, task(t), structure="diagonal")
        if t == 1:
            kfac.save(tmp_path / "f.safetensors")
            return fk.load(tmp_path / "f.safetensors")
        return SumOperator([kfac, fk.ExactFisher(model, task(t), structure="full")])

    model, ewc, reference = learned(build, tasks=3)
    torch.testing.assert_close(ewc.penalty().detach(), written_out(reference, flat(model))[0], rtol=1e-10, atol=0.0)


def test_penalty__is_zero_and_harmless_before_the_first_task() -> None:
    model = mlp()
    ewc = EWC(model)
    penalty = ewc.penalty()
    assert penalty.item() == 0
    assert penalty.dtype == F64
    penalty.backward()
    assert all(p.grad is None for p in model.parameters())
    (F.cross_entropy(model(task(0)[0]), task(0)[1]) + ewc.penalty()).backward()
    for p in model.parameters():
        p.requires_grad_(False)
    assert float(ewc.penalty()) == 0


def test_penalty__is_zero_with_no_gradient_right_after_the_first_task() -> None:
    model, ewc, _ = learned(lambda model, t: fk.EmpiricalFisher(model, task(t)), tasks=0)
    ewc.consolidate(fk.EmpiricalFisher(model, task(0)))
    ewc.penalty().backward()
    assert ewc.penalty().item() == 0
    assert not bool(gradient(model).any())


@pytest.fixture
def two_tasks() -> tuple[nn.Module, EWC, Reference]:
    return learned(lambda model, t: fk.ImprovedEmpiricalFisher(model, task(t), structure="kfac"), tasks=2)


def test_penalty__gradients_accumulate_and_scale(two_tasks: tuple[nn.Module, EWC, Reference]) -> None:
    model, ewc, reference = two_tasks
    (3.0 * ewc.penalty() + ewc.penalty()).backward()
    torch.testing.assert_close(gradient(model), 4 * written_out(reference, flat(model))[1])


def test_penalty__frozen_parameters_add_to_the_value_and_get_no_gradient(
    two_tasks: tuple[nn.Module, EWC, Reference],
) -> None:
    model, ewc, reference = two_tasks
    frozen = model[0].weight  # type: ignore[index]
    frozen.requires_grad_(False)
    value, expected = written_out(reference, flat(model))
    penalty = ewc.penalty()
    torch.testing.assert_close(penalty.detach(), value)
    penalty.backward()
    assert frozen.grad is None
    torch.testing.assert_close(gradient(model)[frozen.numel() :], expected[frozen.numel() :])
    model.requires_grad_(False)
    assert not ewc.penalty().requires_grad


def test_penalty__follows_load_state_dict_and_works_without_gradients(
    two_tasks: tuple[nn.Module, EWC, Reference],
) -> None:
    model, ewc, reference = two_tasks
    other = copy.deepcopy(model)
    move(other, 77)
    with torch.no_grad():
        before = ewc.penalty()
        model.load_state_dict(other.state_dict())
        after = ewc.penalty()
    assert not after.requires_grad
    assert not torch.equal(before, after)
    torch.testing.assert_close(after, written_out(reference, flat(other))[0])


def test_penalty__refuses_a_second_derivative(two_tasks: tuple[nn.Module, EWC, Reference]) -> None:
    model, ewc, reference = two_tasks
    grads = torch.autograd.grad(ewc.penalty(), list(model.parameters()), create_graph=True)
    torch.testing.assert_close(torch.cat([g.reshape(-1) for g in grads]), written_out(reference, flat(model))[1])
    with pytest.raises(NoClosedFormError, match=r"EWC.penalty: got a second derivative.*matvec"):
        torch.autograd.grad(grads[0].sum(), list(model.parameters()))


def test_penalty__is_in_the_fishers_dtype_under_autocast() -> None:
    model, ewc, reference = learned(
        lambda model, t: fk.EmpiricalFisher(model, task(t, torch.float32), structure="kfac"), dtype=torch.float32
    )
    with torch.autocast("cpu", dtype=torch.bfloat16):
        penalty = ewc.penalty()
    penalty.backward()
    value, expected = written_out(reference, flat(model))
    assert float(abs(penalty.detach().double() - value) / value) < 1e-5
    assert float((gradient(model).double() - expected).norm() / expected.norm()) < 1e-5


def test_penalty__of_a_half_precision_model_takes_a_float32_fisher() -> None:
    model = mlp().to(torch.bfloat16)
    fisher = fk.EmpiricalFisher(mlp().float(), task(0, torch.float32), structure="kfac")
    ewc = EWC(model)
    ewc.consolidate(fisher)
    move(model, 1)
    penalty = ewc.penalty()
    assert penalty.dtype == torch.bfloat16
    penalty.backward()
    assert all(p.grad is not None and p.grad.dtype == torch.bfloat16 for p in model.parameters())


def test_penalty__gradcheck(two_tasks: tuple[nn.Module, EWC, Reference]) -> None:
    model, ewc, _ = two_tasks
    direction = [normal(*p.shape, seed=i) for i, p in enumerate(model.parameters())]
    ewc.penalty().backward()
    slope = sum(float((p.grad * d).sum()) for p, d in zip(model.parameters(), direction, strict=True))
    values = []
    for step in (1e-4, -1e-4):
        with torch.no_grad():
            for p, d in zip(model.parameters(), direction, strict=True):
                p += step * d
            values.append(float(ewc.penalty()))
            for p, d in zip(model.parameters(), direction, strict=True):
                p -= step * d
    assert abs((values[0] - values[1]) / 2e-4 - slope) < 1e-7 * abs(slope)


@pytest.mark.parametrize("structure", STRUCTURES)
def test_consolidate__touches_neither_model_nor_generators(structure: str) -> None:
    model = mlp()
    fisher = fk.EmpiricalFisher(model, task(0), structure=structure)
    ewc = EWC(model)
    with untouched(model, []):
        ewc.consolidate(fisher)
        ewc.penalty()


def test_consolidate__memory_grows_only_where_terms_do_not_fold() -> None:
    sizes: dict[str, list[int]] = {}
    for structure in ("diagonal", "block", "kfac"):
        model = mlp()
        ewc = EWC(model, decay=0.5)
        sizes[structure] = []
        for t in range(6):
            ewc.consolidate(fk.EmpiricalFisher(model, task(t, number=40), structure=structure))
            sizes[structure].append(ewc.nbytes)
            move(model, t)
    assert len(set(sizes["diagonal"])) == 1
    assert len(set(sizes["block"][1:])) == 1
    assert sizes["kfac"] == [sizes["kfac"][0] * t for t in range(1, 7)]


def test_consolidate__drops_decayed_terms_only_if_asked_for() -> None:
    for decay, drop, kept in ((0.5, 0.0, 5), (0.5, 0.2, 3), (0.0, 0.0, 1)):
        _, ewc, _ = learned(
            lambda model, t: fk.EmpiricalFisher(model, task(t), structure="kfac"), 5, decay=decay, drop_below=drop
        )
        assert f"terms={2 * kept}" in repr(ewc)
        assert ewc.consolidations == 5


def test_ewc__forgets_less_while_the_next_task_is_learned() -> None:
    """Two tasks that use different inputs: how much the first one's loss rises while the second is learned."""
    rise = {}
    for strength in (0.0, 1.0):
        model = mlp()
        ewc = EWC(model, strength, normalize="trace")
        first, second = (task(t, number=40, features=slice(2 * t, 2 * t + 2)) for t in range(2))
        for data in (first, second):
            optimizer = torch.optim.Adam(model.parameters(), 0.02)
            for _ in range(150):
                optimizer.zero_grad()
                (F.cross_entropy(model(data[0]), data[1]) + ewc.penalty()).backward()
                optimizer.step()
            if data is first:
                before = F.cross_entropy(model(first[0]), first[1]).item()
                ewc.consolidate(fk.ImprovedEmpiricalFisher(model, data, structure="kfac"))
        rise[strength] = F.cross_entropy(model(first[0]), first[1]).item() - before
        assert F.cross_entropy(model(second[0]), second[1]).item() < 0.4
    assert rise[1.0] < 0.5 * rise[0.0]


def test_ewc__takes_fishers_as_they_are_at_a_strength_of_3_unless_told_otherwise() -> None:
    model = mlp()
    ewc, fisher = EWC(model), fk.ImprovedEmpiricalFisher(model, task(0), structure="kfac", power=0.75)
    ewc.consolidate(fisher)
    before = flat(model)
    move(model, 1)
    d = flat(model) - before
    torch.testing.assert_close(ewc.penalty().detach(), 1.5 * d @ fisher.to_dense() @ d)
