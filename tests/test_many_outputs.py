"""The exact kind with many outputs: the last layer's sums without backward passes, and what the others will cost.

The reference makes each position's loss Hessian in z and Jacobian by automatic differentiation of torch's own losses.
"""

import copy
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fisherkit as fk
from fisherkit.rows.problem import Problem
from fisherkit.vectors import ExactVectors
from tests import by_hand
from tests.axes import pairwise
from tests.reference.zoo import Compose

F64 = torch.float64
Loss = Callable[[Tensor, Tensor | None], Tensor]
"""Of one position: its outputs and target."""


@pytest.fixture
def backward_passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry for each call of torch.autograd.grad: the output vectors that go through it."""
    own, seen = torch.autograd.grad, []

    def counted(outputs: Any, inputs: Any, grad_outputs: Any = None, *args: Any, **kwargs: Any) -> Any:
        seen.append(len(grad_outputs) if kwargs.get("is_grads_batched") else 1)
        return own(outputs, inputs, grad_outputs, *args, **kwargs)

    monkeypatch.setattr(torch.autograd, "grad", counted)
    return seen


class Tagger(nn.Module):
    """A classifier of positions, ``[B, T, 5]``; the head may be tied, hooked, moved or followed by something."""

    def __init__(self, after: str = "") -> None:
        super().__init__()
        self.body, self.head, self.after = nn.Linear(3, 4), nn.Linear(4, 5), after
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        z: Tensor = self.head(self.body(x).tanh())
        if self.after == "hook" and z.requires_grad:
            z.register_hook(lambda g: 2 * g)
        if self.after == "twice":
            z = z + self.head(x.flip(1).mean(-1, keepdim=True).expand(-1, -1, 4))
        return {"scale": 2 * z, "classes second": z.movedim(-1, 1), "reshape": z.unsqueeze(1).squeeze(1)}.get(
            self.after, z
        )


def softmax_loss(weight: Tensor | None = None, smoothing: float = 0.0) -> Loss:
    def loss(z: Tensor, y: Tensor | None) -> Tensor:
        y = torch.zeros((), dtype=torch.long) if y is None else y
        return F.cross_entropy(z[None], y[None], weight=weight, label_smoothing=smoothing, reduction="sum")

    return loss


def bernoulli_loss(z: Tensor, y: Tensor | None) -> Tensor:
    return F.binary_cross_entropy_with_logits(z, torch.zeros_like(z) if y is None else y, reduction="sum")


def gaussian_loss(z: Tensor, y: Tensor | None) -> Tensor:
    return 0.5 * (z if y is None else z - y).square().sum()


def positions(
    model: Any, x: Tensor, target: Tensor | None, loss: Loss, names: list[str]
) -> Iterator[tuple[int, Tensor, Tensor, Tensor]]:
    """Each position that counts: its example, its Hessian in z, its Jacobian, and the head's input with a 1 behind."""
    own = [dict(model.named_parameters())[name] for name in names]
    for n in range(len(x)):
        seen: list[Tensor] = []
        hook = model.head.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0]))
        z = model(x[n : n + 1])[0]
        hook.remove()
        a = seen[0][0].detach().reshape(-1, seen[0].shape[-1])
        flat, y = z.reshape(-1, z.shape[-1]), None if target is None else target[n]
        for t in range(len(flat)):
            label = None if y is None else y.reshape(len(flat), -1)[t]
            label = label[0] if label is not None and not label.is_floating_point() else label
            if label is not None and not label.is_floating_point() and int(label) == -100:
                continue
            h = torch.autograd.functional.hessian(lambda u, label=label: loss(u, label), flat[t].detach())
            j = torch.stack([by_hand.gradient(f, own) for f in flat[t]])
            yield n, h, j, torch.cat([a[t], a.new_ones(1)])


def head_of(model: nn.Module, bias: bool = True) -> list[str]:
    return ["head.weight", "head.bias"] if bias else ["head.weight"]


LABELS = torch.tensor([[0, 4, -100], [1, -100, -100], [2, 2, 3], [-100, -100, -100], [4, 0, 1]])
CLASS_WEIGHT = torch.tensor([0.5, 1.0, 2.0, 0.0, 1.5], dtype=F64)
CASES: dict[str, tuple[Any, Loss, Tensor | None]] = {
    "categorical": ("categorical", softmax_loss(), LABELS),
    "no-labels": ("categorical", softmax_loss(), None),
    "weighted": (fk.likelihoods.Categorical(weight=CLASS_WEIGHT), softmax_loss(CLASS_WEIGHT), LABELS),
    "smoothed": (
        fk.likelihoods.Categorical(weight=CLASS_WEIGHT, label_smoothing=0.2), softmax_loss(CLASS_WEIGHT, 0.2), LABELS,
    ),
    "gaussian": ("gaussian", gaussian_loss, torch.linspace(-1, 1, 75, dtype=F64).reshape(5, 3, 5)),
    "bernoulli": ("bernoulli", bernoulli_loss, torch.linspace(0, 1, 75, dtype=F64).reshape(5, 3, 5).round()),
}  # fmt: skip


def made(after: str = "") -> tuple[Tagger, Tensor]:
    torch.manual_seed(0)
    return Tagger(after), torch.randn(5, 3, 3, dtype=F64)


def data_of(x: Tensor, target: Tensor | None) -> Any:
    return [(x[part], None if target is None else target[part]) for part in (slice(3), slice(3, None))]


def count_of(found: list[tuple[int, Tensor, Tensor, Tensor]], example: str) -> int:
    return len(found) if example == "token" else len({n for n, *_ in found})


@pytest.mark.parametrize("example", ["sequence", "token"])
@pytest.mark.parametrize("case", CASES)
def test_diagonal__of_a_head_is_that_of_the_hessians(case: str, example: str) -> None:
    likelihood, loss, target = CASES[case]
    model, x = made()
    fisher = fk.ExactFisher(
        model, data_of(x, target), likelihood=likelihood, structure="diagonal", params=head_of(model), example=example
    )
    found = list(positions(model, x, target, loss, head_of(model)))
    expected = sum(((j.mT @ h @ j).diagonal() for _, h, j, _ in found), torch.zeros(25, dtype=F64))
    assert fisher.examples == count_of(found, example)
    torch.testing.assert_close(fisher.diagonal(), expected / fisher.examples, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("case", "bias", "kfac_positions"), pairwise(CASES, [True, False], ["expand", "reduce"]))
def test_kfac__of_a_head_has_the_sum_of_the_hessians_as_factor(case: str, bias: bool, kfac_positions: str) -> None:
    likelihood, loss, target = CASES[case]
    model, x = made()
    fisher = fk.ExactFisher(
        model, data_of(x, target), likelihood=likelihood, structure="kfac", params=head_of(model, bias),
        kfac_positions=kfac_positions,
    )  # fmt: skip
    found = list(positions(model, x, target, loss, head_of(model, bias)))
    examples = sorted({n for n, *_ in found})
    g = sum((h for _, h, _, _ in found), torch.zeros(5, 5, dtype=F64)) / len(examples)
    inputs = 5 if bias else 4
    # Activations of whole examples where some positions count, as everywhere in the package (a mask of labels cuts).
    a = torch.stack([a[:inputs] for _, _, _, a in found])
    if kfac_positions == "reduce":
        a = torch.stack([a[[n == m for n, *_ in found]].mean(0) for m in examples])
    moment = a.mT @ a / len(a)
    expected = torch.kron(g, moment[:4, :4])
    torch.testing.assert_close(fisher.to_dense()[:20, :20], expected, rtol=1e-9, atol=1e-12)
    if bias:
        torch.testing.assert_close(fisher.to_dense()[20:, 20:], g * moment[4, 4], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("example", ["sequence", "token"])
@pytest.mark.parametrize("case", CASES)
def test_ekfac__of_a_head_has_the_traces_of_the_hessians_in_its_basis(case: str, example: str) -> None:
    likelihood, loss, target = CASES[case]
    model, x = made()
    options: dict[str, Any] = {"likelihood": likelihood, "params": head_of(model), "example": example}
    data = data_of(x, target)
    fisher = fk.ExactFisher(model, data, structure="ekfac", **options)
    found = list(positions(model, x, target, loss, head_of(model)))
    exact = sum((j.mT @ h @ j for _, h, j, _ in found), torch.zeros(25, 25, dtype=F64)) / fisher.examples
    kfac = fk.ExactFisher(model, data, structure="kfac", **options).to_dense()
    torch.testing.assert_close(fisher.trace(), exact.trace(), rtol=1e-9, atol=1e-12)
    # In the eigenbasis, whose vectors are kfac's, the diagonal is the exact matrix's.
    values, vectors = torch.linalg.eigh(fisher.to_dense())
    own = (vectors.mT @ exact @ vectors).diagonal()
    torch.testing.assert_close(own, values, rtol=1e-7, atol=1e-9)
    assert float((fisher.to_dense() - exact).norm()) <= float((kfac - exact).norm()) + 1e-9


@pytest.mark.parametrize("structure", ["diagonal", "kfac", "ekfac"])
def test_backward_passes__of_a_head_are_those_of_the_plan_alone(structure: str, backward_passes: list[int]) -> None:
    model, x = made()
    counts = []
    for copies in (1, 4):
        own = copy.deepcopy(model)
        backward_passes.clear()
        data = data_of(x, LABELS) * copies
        fisher = fk.ExactFisher(own, data, structure=structure, params=head_of(own))
        assert fisher.rows == copies * 9 * 4
        counts.append(sum(backward_passes))
        backward_passes.clear()
        fk.ExactFisher(own, data, structure=structure, params=head_of(own))
        assert not backward_passes  # the forward pass confirms a known plan
    assert counts[0] == counts[1]


AS_ROWS: dict[str, dict[str, Any]] = {
    "": {}, "reshape": {}, "scale": {}, "hook": {}, "twice": {},
    "classes second": {"likelihood": fk.likelihoods.Categorical(class_axis=1)},
}  # fmt: skip


@pytest.mark.parametrize("structure", ["diagonal", "kfac", "ekfac"])
@pytest.mark.parametrize("after", AS_ROWS)
def test_sums__are_the_same_with_rows_whatever_follows_the_head(
    after: str, structure: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rows' own way is checked against brute force elsewhere; here the two must agree."""
    model, x = made(after)
    options: dict[str, Any] = {"structure": structure, "params": head_of(model), **AS_ROWS[after]}
    fisher = fk.ExactFisher(model, data_of(x, LABELS), **options)
    monkeypatch.setattr(ExactVectors, "of_hessian", property(lambda _: False))
    rows = fk.ExactFisher(model, data_of(x, LABELS), **options)
    assert (fisher.rows, fisher.examples) == (rows.rows, rows.examples)
    torch.testing.assert_close(fisher.to_dense(), rows.to_dense(), rtol=1e-8, atol=1e-10)


class Masked(nn.Module):
    """A transposed head (Hugging Face's Conv1D) over the tokens of a mapping with an attention mask."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(3, 5, dtype=F64)), nn.Parameter(torch.zeros(5, dtype=F64))

    def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
        return torch.addmm(self.bias, x.flatten(0, 1), self.weight).view(*x.shape[:2], 5)


@pytest.mark.parametrize("example", ["sequence", "token"])
@pytest.mark.parametrize("kfac_positions", ["expand", "reduce"])
@pytest.mark.parametrize("structure", ["diagonal", "kfac", "ekfac"])
def test_sums__are_the_same_with_rows_under_an_attention_mask(
    structure: str, kfac_positions: str, example: str, monkeypatch: pytest.MonkeyPatch, backward_passes: list[int]
) -> None:
    torch.manual_seed(0)
    model, x = Masked(), torch.randn(5, 3, 3, dtype=F64)
    mask = torch.tensor([[1, 1, 0], [1, 0, 0], [1, 1, 1], [1, 1, 1], [1, 1, 1]])
    data = [{"x": x, "attention_mask": mask, "labels": LABELS}]
    options: dict[str, Any] = {"structure": structure, "kfac_positions": kfac_positions, "example": example}
    fk.ExactFisher(model, data, **options)
    backward_passes.clear()
    fisher = fk.ExactFisher(model, data, **options)
    assert not backward_passes
    monkeypatch.setattr(ExactVectors, "of_hessian", property(lambda _: False))
    rows = fk.ExactFisher(model, data, **options)
    torch.testing.assert_close(fisher.to_dense(), rows.to_dense(), rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize(
    ("after", "closed"),
    [("", True), ("reshape", True), ("scale", False), ("hook", False), ("twice", False), ("classes second", False)],
)
def test_sums__need_no_rows_only_where_the_outputs_are_the_heads_own(
    after: str, closed: bool, backward_passes: list[int]
) -> None:
    model, x = made(after)
    options: dict[str, Any] = {"structure": "diagonal", "params": head_of(model), **AS_ROWS[after]}
    fk.ExactFisher(model, data_of(x, LABELS), **options)
    backward_passes.clear()
    fk.ExactFisher(model, data_of(x, LABELS), **options)
    assert (not backward_passes) is closed


class Changing(nn.Module):
    """Scales its outputs, or their gradient, where an input is above 9: in some batch they are not the head's own."""

    def __init__(self, hook: bool = False) -> None:
        super().__init__()
        self.head, self.hook = nn.Linear(3, 5).double(), hook

    def forward(self, x: Tensor) -> Tensor:
        z: Tensor = self.head(x)
        if self.hook and z.requires_grad and bool((x > 9).any()):
            z.register_hook(lambda g: 2 * g)
            return z
        return 2 * z if bool((x > 9).any()) else z


@pytest.mark.parametrize("structure", ["diagonal", "kfac", "ekfac"])
def test_sums__see_a_hook_that_only_a_later_batch_has(structure: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model, x = Changing(hook=True), torch.randn(6, 3, dtype=F64)
    x[3:, 0] = 10.0
    data = [(x[:3], torch.tensor([0, 1, 2])), (x[3:], torch.tensor([3, 4, 0]))]
    fisher = fk.ExactFisher(model, data, structure=structure)
    monkeypatch.setattr(ExactVectors, "of_hessian", property(lambda _: False))
    rows = fk.ExactFisher(model, data, structure=structure)
    torch.testing.assert_close(fisher.to_dense(), rows.to_dense(), rtol=1e-8, atol=1e-10)
    first = fk.ExactFisher(model, data[0], structure="diagonal").trace() / 2
    second = 4 * fk.ExactFisher(model.head, data[1], structure="diagonal").trace() / 2
    torch.testing.assert_close(fk.ExactFisher(model, data, structure="diagonal").trace(), first + second)


@pytest.mark.parametrize("structure", ["diagonal", "kfac", "ekfac"])
def test_sums__of_batches_with_and_without_rows_add_up(structure: str) -> None:
    torch.manual_seed(0)
    model, x = Changing(), torch.randn(6, 3, dtype=F64)
    x[3:, 0] = 10.0
    data = [(x[:3], torch.tensor([0, 1, 2])), (x[3:], torch.tensor([3, 4, 0]))]
    fisher = fk.ExactFisher(model, data, structure=structure)
    found = list(positions(model, x, None, softmax_loss(), ["head.weight", "head.bias"]))
    found = [(n, h, j, a) for n, h, j, a in found if n < 3]
    for n in range(3, 6):
        z = 2 * model.head(x[n])
        h = torch.autograd.functional.hessian(lambda u: softmax_loss()(u, None), z.detach())
        a = torch.cat([x[n], x.new_ones(1)])
        found.append((n, h, 2 * torch.cat([torch.kron(torch.eye(5, dtype=F64), x[n]), torch.eye(5, dtype=F64)], 1), a))
    exact = sum((j.mT @ h @ j for _, h, j, _ in found), torch.zeros(20, 20, dtype=F64)) / 6
    if structure == "kfac":
        g = sum((h * (4 if n > 2 else 1) for n, h, _, _ in found), torch.zeros(5, 5, dtype=F64)) / 6
        a = torch.stack([a for *_, a in found])
        torch.testing.assert_close(fisher.to_dense()[:15, :15], torch.kron(g, (a.mT @ a / 6)[:3, :3]))
    else:
        torch.testing.assert_close(fisher.trace(), exact.trace())
    if structure == "diagonal":
        torch.testing.assert_close(fisher.diagonal(), exact.diagonal())


class OwnLoss(fk.likelihoods.Likelihood):
    """Half the squared norm of B z, with nothing but what a likelihood must say."""

    name = "own"
    b = torch.arange(15, dtype=F64).reshape(3, 5).sin()

    def gradient(self, z: Tensor, target: Tensor) -> Tensor:
        return (z - target) @ self.b.mT @ self.b

    def hessian_factor(self, z: Tensor) -> Tensor:
        return self.b.mT.to(z).expand(*z.shape[:-1], 5, 3)

    def sample(self, z: Tensor, uniform: Tensor) -> Tensor:
        raise NotImplementedError


@pytest.mark.parametrize("structure", ["diagonal", "kfac"])
def test_sums__of_a_likelihood_of_ones_own_follow_from_its_factor(structure: str) -> None:
    model, x = made()
    fisher = fk.ExactFisher(model, data_of(x, None), likelihood=OwnLoss(), structure=structure, params=head_of(model))
    h = OwnLoss.b.mT @ OwnLoss.b
    a = torch.cat([model.body(x).tanh().detach(), x.new_ones(5, 3, 1)], -1).flatten(0, 1)
    if structure == "diagonal":
        expected = torch.outer(h.diagonal(), a.square().sum(0)[:4]).flatten() / 5
        torch.testing.assert_close(fisher.diagonal()[:20], expected)
    else:
        torch.testing.assert_close(fisher.to_dense()[:20, :20], torch.kron(3 * h, (a.mT @ a / 15)[:4, :4]))


class Columnless(ExactVectors):
    """A kind of one's own: one column of the square root alone."""

    def output_vectors(self, outputs: fk.Outputs) -> fk.OutputVectors:
        return fk.OutputVectors(torch.ones_like(outputs.z).unsqueeze(1))


def test_sums__of_a_kind_that_changes_the_exact_ones_vectors_are_its_own() -> None:
    model, x = made()
    fisher = fk.FisherApproximation(model, data_of(x, None), Columnless(), structure="diagonal", params=head_of(model))
    torch.testing.assert_close(fisher.diagonal()[20:], torch.full((5,), 3.0, dtype=F64))


def test_kfac__of_thousands_of_outputs_keeps_the_digits_of_sure_predictions() -> None:
    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    with torch.no_grad():
        model.weight.mul_(30)
    x = torch.randn(6, 4)
    single = fk.ExactFisher(model, (x, None), structure="diagonal").diagonal()
    double = fk.ExactFisher(copy.deepcopy(model).double(), (x.double(), None), structure="diagonal").diagonal()
    torch.testing.assert_close(single.double(), double, rtol=1e-4, atol=1e-12)


# -- what needs a backward pass for every output -----------------------------------------------------------------------


def hundred_outputs() -> Compose:
    """A hundred outputs that are not its head's own."""
    return Compose(lambda m, x: 2 * m.head(x), head=nn.Linear(3, 100))


@pytest.fixture
def wide(monkeypatch: pytest.MonkeyPatch) -> Callable[..., fk.FisherApproximation]:
    """Fishers of a wide model on forty examples, where a backward pass takes as many seconds as it is told."""
    torch.manual_seed(0)
    model, data = hundred_outputs(), (torch.randn(40, 3), torch.randint(100, (40,)))

    def build(kind: type[fk.FisherApproximation] = fk.ExactFisher, seconds: float = 1.0, **options: Any) -> Any:
        monkeypatch.setattr(Problem, "_pass_seconds", lambda self, linearized: seconds * len(linearized.z) / 40)
        return kind(model, data, **options)

    return build


@pytest.mark.parametrize("structure", ["full", "block", "diagonal", "kfac", "ekfac"])
def test_warning__says_before_a_long_run_what_it_takes(wide: Callable[..., Any], structure: str) -> None:
    with pytest.warns(UserWarning, match="output vectors an example") as found:
        wide(seconds=60.0, structure=structure)
    assert len(found) == 1
    text = str(found[0].message)
    # One backward pass of all forty examples for each of 99 vectors, a minute each.
    assert "99 output vectors an example here, which is 99 backward passes: about 99 minutes" in text
    assert "B of memory" in text
    assert all(word in text for word in ("TruncatedFisher(rank=2)", "SampledFisher", 'structure="kfac"', "last layer"))


def test_warning__is_not_given_for_short_runs_few_vectors_and_sums_in_closed_form(wide: Callable[..., Any]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        wide(seconds=6.0, structure="diagonal")
        wide(fk.TruncatedFisher, seconds=1e9, structure="diagonal", rank=2)
        wide(fk.EmpiricalFisher, seconds=1e9, structure="diagonal")
        head = hundred_outputs().head
        fk.ExactFisher(head, (torch.randn(40, 3), None), structure="kfac")


def test_warning__counts_both_readings_of_ekfac(wide: Callable[..., Any]) -> None:
    needed = 4 * (100**2 + 4**2 + 100 * 4)
    with pytest.warns(UserWarning, match="198 backward passes: about 3.3 hours"):
        wide(seconds=60.0, structure="ekfac", memory_budget=needed)


@pytest.mark.parametrize(("seconds", "advised"), [(1.0, False), (60.0, True)])
def test_progress__tells_the_cost_first(
    wide: Callable[..., Any], seconds: float, advised: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        wide(seconds=seconds, structure="diagonal", progress=True)
    text = capsys.readouterr().err
    assert "99 backward passes" in text
    assert ("TruncatedFisher" in text) is advised


def test_refusal__names_the_cost_and_the_kinds_of_few_vectors(wide: Callable[..., Any]) -> None:
    with pytest.raises(fk.MemoryBudgetError, match=r"99 backward passes: about 99 s.*TruncatedFisher\(rank=2\)"):
        wide(structure="block", memory_budget=1000)
    with pytest.raises(fk.MemoryBudgetError, match="99 backward passes") as found:
        wide(structure="kfac", memory_budget=1000)
    # Its factors are as large for every kind.
    assert "TruncatedFisher" not in str(found.value)
    with pytest.raises(fk.MemoryBudgetError) as found:
        wide(fk.EmpiricalFisher, structure="kfac", memory_budget=1000)
    assert "backward" not in str(found.value)


def test_forecast__measures_a_pass_and_leaves_the_model_alone() -> None:
    torch.manual_seed(0)
    model, x = hundred_outputs(), torch.randn(8, 3)
    state, random = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fisher = fk.ExactFisher(model, iter_twice(x), structure="diagonal")
    assert fisher.examples == 8
    assert torch.equal(torch.get_rng_state(), random)
    torch.testing.assert_close(model.state_dict(), state, rtol=0, atol=0)
    assert all(p.grad is None for p in model.parameters())


class iter_twice:  # noqa: N801  (reads as what it does)
    """Batches whose number nobody knows."""

    def __init__(self, x: Tensor) -> None:
        self.x = x

    def __iter__(self) -> Iterator[tuple[Tensor, None]]:
        yield self.x[:4], None
        yield self.x[4:], None
