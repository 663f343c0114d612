"""What must hold for any small model, data, batch split and dtype; hypothesis chooses them."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import fisherkit as fk
from fisherkit.kinds import KINDS
from fisherkit.space import ParameterSpace
from fisherkit.testing import check_fisher
from tests.reference import fisher as reference
from tests.reference.outputs import EF, EXACT, IGNORE_INDEX, Kind, truncated_kind

STRUCTURES = ["full", "block", "diagonal", "kfac", "ekfac"]
DTYPES = [torch.float64, torch.float32]
TOLERANCE = {torch.float64: 1e-9, torch.float32: 2e-4}

few = settings(
    max_examples=15,
    deadline=None,
    derandomize=True,
    phases=[Phase.explicit, Phase.generate, Phase.shrink],  # explanations cost minutes and say little of tensors
    suppress_health_check=[HealthCheck.too_slow],
)


@dataclass(frozen=True)
class Setup:
    """A model, its data in batches, and how the Fisher is asked for."""

    model: nn.Module
    inputs: Tensor
    targets: Tensor
    sizes: tuple[int, ...]
    likelihood: str
    example: str
    chunk_size: int | None

    @property
    def dtype(self) -> torch.dtype:
        return self.inputs.dtype

    def batches(self) -> list[tuple[Tensor, Tensor]]:
        return list(zip(self.inputs.split(self.sizes), self.targets.split(self.sizes), strict=True))

    def fisher(self, kind: str, structure: str = "full", data: Any = None, **options: Any) -> fk.FisherApproximation:
        # As many positions as outputs and inputs could be read both ways.
        last = fk.likelihoods.Categorical(class_axis=-1) if self.likelihood == "categorical" else self.likelihood
        conventions = {"likelihood": last, "example": self.example, "chunk_size": self.chunk_size}
        data = self.batches() if data is None else data
        return KINDS[kind](self.model, data, structure=structure, **{**conventions, **options})

    def problem(self) -> reference.Problem:
        return reference.Problem(self.model, self.inputs, self.targets, self.likelihood, self.example)  # type: ignore[arg-type]

    def to(self, dtype: torch.dtype) -> Setup:
        targets = self.targets.to(dtype) if self.targets.is_floating_point() else self.targets
        return Setup(
            self.model.to(dtype),
            self.inputs.to(dtype),
            targets,
            self.sizes,
            self.likelihood,
            self.example,
            self.chunk_size,
        )

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64).to(self.dtype)


def _sizes(draw: st.DrawFn, total: int) -> tuple[int, ...]:
    """A way to cut the data into batches."""
    sizes: list[int] = []
    while sum(sizes) < total:
        sizes.append(draw(st.integers(1, total - sum(sizes))))
    return tuple(sizes)


def _model(draw: st.DrawFn, kind: str, outputs: int) -> tuple[nn.Module, tuple[int, ...]]:
    """A model and the shape of one input; ends with one output for each class at every position."""
    width = st.integers(1, 4)
    bias = st.booleans()
    act = draw(st.sampled_from([nn.Tanh, nn.GELU, nn.ReLU]))
    if kind == "cnn":
        channels, hidden, kernel, side = draw(width), draw(width), draw(st.integers(1, 3)), draw(st.integers(3, 4))
        stride, padding = draw(st.integers(1, 2)), draw(st.integers(0, 1))
        conv = nn.Conv2d(channels, hidden, kernel, stride=stride, padding=padding, bias=draw(bias))
        places = ((side + 2 * padding - kernel) // stride + 1) ** 2
        return nn.Sequential(conv, act(), nn.Flatten(), nn.Linear(hidden * places, outputs)), (channels, side, side)
    sizes = [draw(width) for _ in range(draw(st.integers(1, 3)))]
    layers: list[nn.Module] = []
    for inputs, hidden in pairwise(sizes):
        layers += [nn.Linear(inputs, hidden, bias=draw(bias)), act()]
        if draw(st.booleans()) and hidden > 1:
            layers.append(nn.LayerNorm(hidden))
    shape = (draw(st.integers(2, 3)), sizes[0]) if kind == "tokens" else (sizes[0],)
    return nn.Sequential(*layers, nn.Linear(sizes[-1], outputs, bias=draw(bias))), shape


@st.composite
def setups(draw: st.DrawFn, dtypes: tuple[torch.dtype, ...] = (torch.float64, torch.float32)) -> Setup:
    likelihood = draw(st.sampled_from(["categorical", "categorical", "gaussian", "bernoulli"]))
    kind = draw(st.sampled_from(["mlp", "cnn", "tokens"]))
    outputs, number = draw(st.integers(2 if likelihood == "categorical" else 1, 4)), draw(st.integers(1, 6))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(draw(st.integers(0, 1 << 16)))
        model, shape = _model(draw, kind, outputs)
        inputs = torch.randn(number, *shape)
        lead = (number, *shape[:-1]) if kind == "tokens" else (number,)
        if likelihood == "categorical":
            targets = torch.randint(outputs, lead)
            if kind == "tokens":  # never the very first, so that something counts
                targets.view(-1)[1:][torch.rand(targets.numel() - 1) < 0.3] = IGNORE_INDEX
        else:
            targets = torch.rand(*lead, outputs)
    example = draw(st.sampled_from(["sequence", "token"])) if kind == "tokens" else "sequence"
    chunk_size = draw(st.sampled_from([None, 1, 2, 5]))
    setup = Setup(model, inputs, targets, _sizes(draw, number), likelihood, example, chunk_size)
    return setup.to(draw(st.sampled_from(dtypes)))


doubles = setups((torch.float64,))
kinds = st.sampled_from(sorted(KINDS))
structures = st.sampled_from(STRUCTURES)


def close(got: Tensor, expected: Tensor, dtype: torch.dtype, factor: float = 1.0) -> None:
    """Relative in the Frobenius norm; what is zero must be as small as rounding."""
    assert got.shape == expected.shape
    scale = float(expected.double().norm()) + 1e-6
    error = float((got.double() - expected.double()).norm())
    assert error <= factor * TOLERANCE[dtype] * scale, (error, scale)


REFERENCE_KINDS: dict[str, tuple[Kind, str, dict[str, Any]]] = {
    "ef": (EF, "ef", {}),
    "ief": (Kind("ief", power=1.0), "ief", {}),
    "ief, half": (Kind("ief", power=0.5), "ief", {"power": 0.5}),
    "exact": (EXACT, "exact", {}),
    "truncated 1": (truncated_kind(1), "truncated", {"rank": 1}),
    "truncated 3": (truncated_kind(3), "truncated", {"rank": 3}),
}


@few
@given(doubles, st.sampled_from(sorted(REFERENCE_KINDS)))
def test_full__is_the_sum_over_rows(setup: Setup, name: str) -> None:
    kind, ours, options = REFERENCE_KINDS[name]
    rows = reference.rows(setup.problem(), kind)
    fisher = setup.fisher(ours, **options)
    assert fisher.examples == rows.count
    expected = reference.full(rows)
    close(fisher.to_dense(), expected, setup.dtype)
    close(fisher.diagonal(), expected.diagonal(), setup.dtype)
    close(setup.fisher(ours, "block", **options).to_dense(), reference.block(rows), setup.dtype)
    gram = torch.linalg.eigvalsh(fisher.gram()).flip(0)[: fisher.size]
    close(gram, torch.linalg.eigvalsh(expected).flip(0)[: len(gram)], setup.dtype)


@few
@given(setups(), kinds, structures)
def test_every_operation__is_that_of_its_own_matrix(setup: Setup, kind: str, structure: str) -> None:
    """Products in every form, solves, spectra, draws, sums and files, whose matrix other tests hold against others."""
    fisher = setup.fisher(kind, structure)
    check_fisher(fisher, fisher.to_dense().double())


@few
@given(setups(), kinds, st.sampled_from(["expand", "reduce"]))
def test_trace__is_the_same_for_every_exact_structure_and_for_ekfac(setup: Setup, kind: str, positions: str) -> None:
    full = setup.fisher(kind)
    expected = full.to_dense().double().trace()
    assert full.trace().dtype == torch.float64
    for structure in ("full", "block", "diagonal", "ekfac"):
        fisher = setup.fisher(kind, structure, kfac_positions=positions)
        close(fisher.trace(), expected, setup.dtype)
        close(fisher.diagonal().double().sum(), expected, setup.dtype)
        close(fisher.eigenvalues().sum(), expected, setup.dtype)
    close(setup.fisher(kind, "diagonal").diagonal(), full.diagonal(), setup.dtype)


@few
@given(setups(), kinds, structures, st.randoms(use_true_random=False))
def test_data__split_order_and_chunks_do_not_matter(setup: Setup, kind: str, structure: str, randomness: Any) -> None:
    expected = setup.fisher(kind, structure, data=(setup.inputs, setup.targets), chunk_size=None).to_dense()
    close(setup.fisher(kind, structure).to_dense(), expected, setup.dtype)
    if kind != "sf":  # its draws belong to places in the data
        order = list(range(len(setup.inputs)))
        randomness.shuffle(order)
        data = setup.inputs[order], setup.targets[order]
        close(setup.fisher(kind, structure, data=data).to_dense(), expected, setup.dtype)


@few
@given(doubles, kinds, structures)
def test_dtype__float32_is_close_to_float64(setup: Setup, kind: str, structure: str) -> None:
    if setup.likelihood == "categorical" and kind == "sf":
        return  # a draw next to the border of two classes may fall on either side
    exact = setup.fisher(kind, structure).to_dense()
    single = setup.to(torch.float32)
    got = single.fisher(kind, structure).to_dense()
    assert got.dtype == torch.float32
    close(got, exact, torch.float32, factor=5)


@few
@given(setups(), kinds, kinds, structures, structures, st.floats(0, 4), st.floats(0.125, 4))
def test_sum__is_the_matrices_sum(
    setup: Setup, kind: str, other: str, structure: str, another: str, a: float, b: float
) -> None:
    first, second = setup.fisher(kind, structure), setup.fisher(other, another)
    total = a * first + second * b
    close(total.to_dense(), a * first.to_dense() + b * second.to_dense(), setup.dtype)
    close(total.trace(), a * first.trace() + b * second.trace(), setup.dtype)


shapes = st.lists(st.lists(st.integers(0, 3), max_size=3).map(tuple), min_size=1, max_size=5)


@few
@given(shapes, st.sampled_from([None, 1, 3]), st.sampled_from(DTYPES))
def test_space__flatten_and_unflatten_are_inverse(
    shapes: list[tuple[int, ...]], columns: int | None, dtype: torch.dtype
) -> None:
    space = ParameterSpace(tuple(f"p{i}" for i in range(len(shapes))), tuple(shapes))
    flat = torch.arange(space.size * (columns or 1), dtype=dtype)
    flat = flat if columns is None else flat.reshape(space.size, columns)
    named = space.unflatten(flat)
    tail = () if columns is None else (columns,)
    assert {name: tuple(t.shape) for name, t in named.items()} == {
        name: (*shape, *tail) for name, shape in zip(space.names, shapes, strict=True)
    }
    assert torch.equal(space.flatten(named), flat)
    assert torch.equal(space.flatten(dict(reversed(named.items()))), flat)
    for name, place in space.slices.items():
        assert torch.equal(named[name].reshape(-1, *tail), flat[place])


@few
@given(doubles, structures, st.lists(st.integers(0, 6), max_size=3))
def test_vectors__of_any_other_shape_are_refused(setup: Setup, structure: str, shape: list[int]) -> None:
    fisher = setup.fisher("ef", structure)
    assume(not (len(shape) in (1, 2) and shape[0] == fisher.size))
    v = torch.zeros(shape, dtype=setup.dtype)
    for operation in (fisher.matvec, fisher.solve, fisher.quadratic_form, fisher.factorize(0.1).matvec):
        with pytest.raises(fk.InvalidArgumentError) as caught:
            operation(v)
        assert str(list(shape)) in str(caught.value)
        assert f"D = {fisher.size:,}" in str(caught.value)
