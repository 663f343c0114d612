"""A model, its data and the process come back untouched, also by exceptions."""

import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx
from torch.utils.data import DataLoader, Dataset, RandomSampler, TensorDataset

import fisherkit as fk
from fisherkit.kinds import KINDS
from tests import by_hand
from tests.axes import paired
from tests.reference.models import EVERY_FORM, FAMILIES
from tests.rich_model import Calls, batches, rich
from tests.snapshot import of_model, untouched

STRUCTURES = ["full", "block", "diagonal", "kfac", "ekfac"]
F64 = torch.float64


def use(fisher: fk.FisherApproximation, *, square: bool = True) -> None:
    """Every operation that the Fisher has."""
    v = torch.ones(fisher.size, 2, dtype=F64)
    fisher.matvec(v)
    fisher.matvec(fisher.space.unflatten(v[:, 0]))
    fisher.quadratic_form(v)
    fisher.diagonal()
    fisher.trace()
    fisher.solve(v, damping=10.0)  # few steps where they are iterations
    fisher.factorize(10.0).sample(torch.Generator().manual_seed(0))
    fisher.coverage()
    (2.0 * fisher) @ v
    (fisher + fisher) @ v
    if square:
        fisher.to_dense()
        fisher.eigenvalues(2)
        fisher.logdet(0.1)


@pytest.mark.parametrize(("kind", "structure"), paired(KINDS, STRUCTURES))
def test_construction__touches_nothing(kind: str, structure: str) -> None:
    model, data = rich(), batches()
    with untouched(model, data):
        use(KINDS[kind](model, data, structure=structure))


@pytest.mark.parametrize("kind", KINDS)
def test_streamed__products_touch_nothing(kind: str) -> None:
    model, data = rich(), batches()[2:]  # of three examples and of two
    with untouched(model, data):
        fisher = KINDS[kind](model, data, memory_budget=1)
        assert "streamed" in str(fisher.coverage())
        if kind == "ef":
            use(fisher, square=False)
        else:  # what follows the vectors knows no kind
            fisher @ torch.ones(fisher.size, 2, dtype=F64)
            fisher.diagonal()


@pytest.mark.parametrize(
    "family",
    [*EVERY_FORM, "attention_cross", "batchnorm2d", "conv_transpose1d", "gru_sequence_first", "inplace_relu_conv",
     "mapping_batch", "residual", "shared_module", "tied_linears", "transformer_layer", "weight_norm"],
)  # fmt: skip
def test_construction__touches_no_family(family: str) -> None:
    problem = FAMILIES[family].problem()
    data = problem.inputs, problem.targets
    with untouched(problem.model, data):
        options = {"likelihood": problem.likelihood, "example": problem.example}
        fk.ImprovedEmpiricalFisher(problem.model, data, structure="ekfac", **options)
        fisher = fk.EmpiricalFisher(problem.model, data, **options)
        product = fisher @ torch.ones(fisher.size, dtype=F64)
    # A result that remembers how it was computed would keep every batch's graph alive.
    assert not product.requires_grad
    assert not fisher.gram().requires_grad


def test_hooks__of_the_user_are_called_and_stay() -> None:
    model, data, calls = rich(), batches(), Calls()
    handle = model.register_forward_hook(calls)
    fk.EmpiricalFisher(model, data)
    assert calls.count >= len(data)
    seen = calls.count
    handle.remove()
    fk.EmpiricalFisher(model, data)
    assert calls.count == seen


def test_hooks__that_change_outputs_are_part_of_the_model() -> None:
    model, data = rich(), [(x, None) for x, _ in batches()]
    before = fk.ExactFisher(model, data, likelihood="gaussian").trace()
    model.register_forward_hook(lambda module, args, output: 2 * output)
    after = fk.ExactFisher(model, data, likelihood="gaussian").trace()
    torch.testing.assert_close(after, 4 * before)


# -- data --------------------------------------------------------------------------------------------------------------

DATASET = TensorDataset(torch.cat([x for x, _ in batches()]), torch.cat([y for _, y in batches()]))


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(5)


LOADERS: dict[str, Callable[[], DataLoader[Any]]] = {
    "in order": lambda: DataLoader(DATASET, 3),
    "shuffled": lambda: DataLoader(DATASET, 3, shuffle=True),
    "shuffled by its own generator": lambda: DataLoader(DATASET, 3, shuffle=True, generator=seeded()),
    "shuffled by its sampler's generator": lambda: DataLoader(
        DATASET, 3, sampler=RandomSampler(DATASET, generator=seeded())
    ),
}


@pytest.mark.parametrize("budget", [None, 1], ids=["stored", "streamed"])
@pytest.mark.parametrize("name", LOADERS)
def test_loader__keeps_its_generator_and_the_global_one(name: str, budget: int | None) -> None:
    model, loader = rich(), LOADERS[name]()
    with untouched(model, loader):
        fisher = fk.EmpiricalFisher(model, loader, memory_budget=budget)
        fisher @ torch.ones(fisher.size, dtype=F64)


def test_loader__gives_the_user_the_order_that_it_would_have_given() -> None:
    expected = [x for x, _ in LOADERS["shuffled by its own generator"]()]
    loader = LOADERS["shuffled by its own generator"]()
    fk.SampledFisher(rich(), loader, structure="ekfac")
    assert all(torch.equal(a, b) for a, (b, _) in zip(expected, loader, strict=True))


def test_inputs__that_want_gradients_get_none() -> None:
    model, data = rich(), batches()
    for x, _ in data:
        x.requires_grad_(True)
    with untouched(model, data):
        use(fk.ExactFisher(model, data, structure="block"))
    assert all(x.grad is None for x, _ in data)


def test_inputs__are_not_written_to_by_layers_that_work_in_place() -> None:
    model = nn.Sequential(nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(8, 3)).double()
    data = batches()
    with untouched(model, data):
        got = fk.EmpiricalFisher(model, data, structure="ekfac").trace()
    plain = nn.Sequential(nn.ReLU(), *model[1:])
    torch.testing.assert_close(got, fk.EmpiricalFisher(plain, batches(), structure="ekfac").trace())


DRAWS: dict[str, Callable[[], object]] = {
    "torch": lambda: torch.rand(()),
    "NumPy": lambda: np.random.rand(),  # noqa: NPY002  the global generator is the one to watch
    "Python": random.random,
}


class Drawing(nn.Module):
    """Draws numbers that have no effect, as layer drop does in eval mode."""

    def __init__(self, library: str = "torch") -> None:
        super().__init__()
        self.body = rich()
        self.draw = DRAWS[library]

    def forward(self, x: Tensor) -> Tensor:
        self.draw()
        return self.body(x)


class DrawingDataset(Dataset[tuple[Tensor, Tensor]]):
    """Draws a number for every example, as augmentation does."""

    def __init__(self, library: str) -> None:
        self.draw = DRAWS[library]

    def __len__(self) -> int:
        return len(DATASET)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        self.draw()
        x, y = DATASET[index]
        return x, y


@pytest.mark.parametrize("budget", [None, 1], ids=["stored", "streamed"])
@pytest.mark.parametrize("library", DRAWS)
def test_generators__of_a_model_that_draws_are_put_back(library: str, budget: int | None) -> None:
    model, data = Drawing(library).eval(), batches()
    with untouched(model, data):
        fisher = fk.EmpiricalFisher(model, data, memory_budget=budget)
        fisher @ torch.ones(fisher.size, dtype=F64)


@pytest.mark.parametrize("library", DRAWS)
def test_generators__of_a_data_set_that_draws_are_put_back(library: str) -> None:
    model, loader = rich(), DataLoader(DrawingDataset(library), 3)
    with untouched(model, loader):
        fk.EmpiricalFisher(model, loader, structure="ekfac")


def test_generators__of_a_model_that_is_refused_are_put_back() -> None:
    class Noisy(Drawing):
        def forward(self, x: Tensor) -> Tensor:
            return self.body(x + torch.randn_like(x))

    model, data = Noisy().eval(), batches()
    with untouched(model, data), pytest.raises(fk.ModelError):
        fk.EmpiricalFisher(model, data)


# -- modes -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode], ids=["no_grad", "inference_mode"])
@pytest.mark.parametrize("structure", STRUCTURES)
def test_modes__construction_works_in_any(structure: str, mode: Callable[[], Any]) -> None:
    model, data = rich(), batches()
    expected = fk.TruncatedFisher(model, data, structure=structure).diagonal()
    with mode(), untouched(model, data):
        fisher = fk.TruncatedFisher(model, data, structure=structure)
        use(fisher)
        got = fisher.diagonal()
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode], ids=["no_grad", "inference_mode"])
def test_modes__streamed_products_and_loaders_work_in_any(mode: Callable[[], Any]) -> None:
    model, loader = rich(), LOADERS["in order"]()
    v = torch.ones(fk.EmpiricalFisher(model, loader).size, dtype=F64)
    expected = fk.EmpiricalFisher(model, loader) @ v
    with mode(), untouched(model, loader):
        got = fk.EmpiricalFisher(model, loader, memory_budget=1) @ v
    torch.testing.assert_close(got, expected)


def test_modes__a_fisher_built_outside_works_in_inference_mode() -> None:
    fisher = fk.EmpiricalFisher(rich(), batches(), memory_budget=1)
    v = torch.ones(fisher.size, dtype=F64)
    expected = fisher @ v
    with torch.inference_mode():
        torch.testing.assert_close(fisher @ v, expected)


def test_frozen__all_parameters_can_be_chosen_and_stay_frozen() -> None:
    model, data = rich(), batches()
    expected = fk.EmpiricalFisher(model, data, params=lambda name, p: True, structure="block").diagonal()
    model.requires_grad_(False)
    with untouched(model, data):
        fisher = fk.EmpiricalFisher(model, data, params=lambda name, p: True, structure="block")
        use(fisher)
    assert "frozen.weight" in fisher.space.names
    torch.testing.assert_close(fisher.diagonal(), expected)


@pytest.mark.parametrize("enabled", [True, False])
def test_fast_path__of_attention_is_put_back_and_does_not_matter(enabled: bool) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(4, 2, 6, batch_first=True, dropout=0.1)
        model = nn.Sequential(nn.TransformerEncoder(layer, 1), nn.Flatten(), nn.Linear(8, 3)).double().eval()
    data = [(x.mT.reshape(-1, 2, 4), y) for x, y in batches()]
    before = torch.backends.mha.get_fastpath_enabled()
    try:
        torch.backends.mha.set_fastpath_enabled(enabled)
        with untouched(model, data):
            fisher = fk.EmpiricalFisher(model, data)
        x, y = data[0]
        (row,) = by_hand.rows(model, (x[:1], y[:1]))
        first = fk.EmpiricalFisher(model, (x[:1], y[:1]))
        torch.testing.assert_close(first.diagonal(), row.square())
        assert fisher.size == len(row)
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def test_default_dtype__does_not_matter() -> None:
    model, data = rich(), batches()
    expected = fk.TruncatedFisher(model, data, structure="ekfac").diagonal()
    try:
        torch.set_default_dtype(F64)
        with untouched(model, data):
            got = fk.TruncatedFisher(model, data, structure="ekfac").diagonal()
    finally:
        torch.set_default_dtype(torch.float32)
    torch.testing.assert_close(got, expected)


def test_snapshot__notices_what_it_is_for() -> None:
    """A test of the tests: every kind of trace is found."""
    traces: dict[str, Callable[[Any], object]] = {
        "a parameter": lambda m: m.head.weight.data.mul_(2),
        "a gradient": lambda m: m.body.weight.grad.zero_(),
        "a missing gradient": lambda m: setattr(m.head.weight, "grad", None),
        "a flag": lambda m: m.frozen.weight.requires_grad_(True),
        "a mode": lambda m: m.dropout.train(),
        "a buffer": lambda m: m.norm.running_mean.add_(1),
        "a hook": lambda m: m.body.register_forward_hook(Calls()),
        "an attribute": lambda m: setattr(m.body, "activations", None),
        "a random number": lambda m: torch.rand(1),
    }
    for name, leave in traces.items():
        model = rich()
        with torch.random.fork_rng(devices=[]), pytest.raises(AssertionError, match="touched"), untouched(model, []):
            leave(model)
        assert of_model(model).keys() >= {"parameter head.weight", "buffer norm.running_mean"}, name


# -- an exception in the middle of the data ----------------------------------------------------------------------------


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
