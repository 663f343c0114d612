"""An exception in the middle of the data, in anybody's code, comes out as it is and leaves everything as it was."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx
from torch.utils.data import DataLoader, Dataset

import fisherkit as fk
from fisherkit.kinds import KINDS
from tests.rich_model import batches, rich
from tests.snapshot import untouched

STRUCTURES = ["full", "block", "diagonal", "kfac", "ekfac"]
F64 = torch.float64
MARK = 1e6


class PlannedError(Exception):
    """Nobody else's."""


def marked_inputs() -> list[tuple[Tensor, Tensor]]:
    """Four batches, of which the third is recognized by its first input."""
    data = batches()
    data[2][0][0, 0, 0] = MARK
    return data


def marked_targets() -> list[tuple[Tensor, Tensor]]:
    """Four batches with real-valued targets, of which the third is recognized by its first target."""
    data = [(x, torch.zeros(len(x), 3, dtype=F64)) for x, _ in batches()]
    data[2][1][0, 0] = MARK
    return data


def is_marked(tensor: Tensor) -> bool:
    return bool((tensor == MARK).any())


class Fault:
    """Of a class that nothing takes for a model's settings."""

    present = True


class Failing(nn.Module):
    """Raises at the marked batch, after the body has run; can be repaired."""

    def __init__(self, error: type[BaseException] = PlannedError) -> None:
        super().__init__()
        self.body = rich()
        self.error = error
        self.fault = Fault()

    def forward(self, x: Tensor) -> Tensor:
        z: Tensor = self.body(x)
        if self.fault.present and is_marked(x):
            raise self.error("in the model")
        return z


@pytest.mark.parametrize("error", [PlannedError, RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("structure", STRUCTURES)
def test_forward__that_raises_in_the_third_batch(structure: str, error: type[BaseException]) -> None:
    model, data = Failing(error).eval(), marked_inputs()
    with untouched(model, data), pytest.raises(error, match="in the model"):
        fk.EmpiricalFisher(model, data, structure=structure)


@pytest.mark.parametrize("kind", KINDS)
def test_forward__that_raises_for_any_kind(kind: str) -> None:
    model, data = Failing().eval(), marked_inputs()
    with untouched(model, data), pytest.raises(PlannedError, match="in the model"):
        KINDS[kind](model, data, structure="ekfac", chunk_size=2)


@pytest.mark.parametrize("error", [PlannedError, KeyboardInterrupt])
def test_forward__that_raises_at_once(error: type[BaseException]) -> None:
    model, data = Failing(error).eval(), marked_inputs()[2:]
    with untouched(model, data), pytest.raises(error, match="in the model"):
        fk.EmpiricalFisher(model, data)


def test_hook__that_raises_in_the_middle_of_a_forward_pass() -> None:
    def stop(module: nn.Module, args: Any, output: Tensor) -> None:
        if len(output) == 2:
            raise PlannedError("in a hook")

    model, data = rich(), [batches()[0], (batches()[0][0][:1], batches()[0][1][:1]), batches()[3]]
    model.get_submodule("body").register_forward_hook(stop)
    data[0] = (data[0][0][:1], data[0][1][:1])  # the probe takes one example twice
    with untouched(model, data), pytest.raises(PlannedError, match="in a hook"):
        fk.EmpiricalFisher(model, data)


class _FailsBackward(torch.autograd.Function):
    """The identity; the gradient of the marked batch raises."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, marked: bool) -> Tensor:
        ctx.marked = marked
        return x.clone()

    @staticmethod
    def backward(ctx: FunctionCtx, *gradients: Any) -> Any:
        if getattr(ctx, "marked", False):
            raise PlannedError("in a backward pass")
        return gradients[0], None


class FailingBackward(nn.Module):
    """A model around `_FailsBackward`."""

    def __init__(self) -> None:
        super().__init__()
        self.body = rich()

    def forward(self, x: Tensor) -> Tensor:
        return _FailsBackward.apply(self.body(x), is_marked(x))  # type: ignore[no-untyped-call]


@pytest.mark.parametrize("structure", ["full", "kfac"])
def test_backward__that_raises_in_the_third_batch(structure: str) -> None:
    model, data = FailingBackward().eval(), marked_inputs()
    with untouched(model, data), pytest.raises(PlannedError, match="in a backward pass"):
        fk.EmpiricalFisher(model, data, structure=structure)


class FailingLikelihood(fk.likelihoods.Gaussian):
    """A user's likelihood that cannot take one target."""

    name = "user's"

    def gradient(self, z: Tensor, target: Tensor) -> Tensor:
        if is_marked(target):
            raise PlannedError("in a likelihood")
        return super().gradient(z, target)


class FailingKind(fk.OutputRule):
    """A user's kind that cannot take one target."""

    kind_name = "user's"

    def output_vectors(self, outputs: fk.Outputs) -> fk.OutputVectors:
        assert outputs.target is not None
        if is_marked(outputs.target):
            raise PlannedError("in a kind")
        return fk.OutputVectors(outputs.gradient().unsqueeze(1))


@pytest.mark.parametrize("structure", STRUCTURES)
def test_likelihood__that_raises_in_the_third_batch(structure: str) -> None:
    model, data = rich(), marked_targets()
    with untouched(model, data), pytest.raises(PlannedError, match="in a likelihood"):
        fk.EmpiricalFisher(model, data, likelihood=FailingLikelihood(), structure=structure)


@pytest.mark.parametrize("structure", STRUCTURES)
def test_kind__that_raises_in_the_third_batch(structure: str) -> None:
    model, data = rich(), marked_targets()
    with untouched(model, data), pytest.raises(PlannedError, match="in a kind"):
        fk.FisherApproximation(model, data, FailingKind(), likelihood="gaussian", structure=structure)
    good = fk.FisherApproximation(model, data[:2], FailingKind(), likelihood="gaussian", structure=structure)
    torch.testing.assert_close(
        good.diagonal(), fk.EmpiricalFisher(model, data[:2], likelihood="gaussian", structure=structure).diagonal()
    )


class FailingDataset(Dataset[tuple[Tensor, Tensor]]):
    """Its eighth example, in the third batch of three, cannot be read."""

    def __len__(self) -> int:
        return 11

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        torch.rand(1)  # as an augmentation would
        if index == 7:
            raise PlannedError("in the data")
        return torch.full((2, 4), index / 11, dtype=F64), torch.tensor(index % 3)


@pytest.mark.parametrize("structure", ["full", "ekfac"])
def test_data__that_raises_in_the_third_batch(structure: str) -> None:
    model, loader = rich(), DataLoader(FailingDataset(), 3, generator=torch.Generator().manual_seed(0))
    with untouched(model, loader), pytest.raises(PlannedError, match="in the data"):
        fk.EmpiricalFisher(model, loader, structure=structure)


def test_data__that_is_a_generator_function_is_closed() -> None:
    class Closing:
        closed = 0

        def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
            try:
                yield from marked_inputs()
            finally:
                Closing.closed += 1

    model = Failing().eval()
    with untouched(model, []), pytest.raises(PlannedError):
        fk.EmpiricalFisher(model, Closing(), progress=True)
    assert Closing.closed > 0


def test_predicate__that_raises() -> None:
    def choose(name: str, parameter: nn.Parameter) -> bool:
        raise PlannedError("in a predicate")

    model, data = rich(), batches()
    with untouched(model, data), pytest.raises(PlannedError, match="in a predicate"):
        fk.EmpiricalFisher(model, data, params=choose)


@pytest.mark.parametrize("error", [PlannedError, KeyboardInterrupt])
@pytest.mark.parametrize("kind", ["ef", "exact"])
def test_streamed__product_that_is_interrupted_can_be_repeated(kind: str, error: type[BaseException]) -> None:
    model, data = Failing(error).eval(), marked_inputs()
    model.fault.present = False
    fisher = KINDS[kind](model, data, memory_budget=1)
    v = torch.ones(fisher.size, dtype=F64)
    expected = fisher @ v
    model.fault.present = True
    for operation in (fisher.matvec, fisher.quadratic_form, lambda v: fisher.solve(v, 0.1)):
        with untouched(model, data), pytest.raises(error, match="in the model"):
            operation(v)
    model.fault.present = False
    assert torch.equal(fisher @ v, expected)


def test_refusal__leaves_no_trace() -> None:
    model, data = rich(), batches()
    bad = [*data[:2], (data[2][0], data[2][1] + 7)]
    with untouched(model, bad), pytest.raises(fk.DataError, match="batch 2"):
        fk.SampledFisher(model, bad, structure="kfac")
    with untouched(model, data), pytest.raises(fk.MemoryBudgetError):
        fk.EmpiricalFisher(model, data, structure="kfac", memory_budget=1)
    model.get_submodule("dropout").train()
    with untouched(model, data), pytest.raises(fk.ModelError, match="'dropout' in train mode"):
        fk.EmpiricalFisher(model, data)
