"""What one example is: nodes of graphs, and classes on axis 1."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fisherkit as fk
from fisherkit.likelihoods import Categorical
from tests import by_hand
from tests.reference.zoo import Compose

NODES = 12
ADVICE = r'a graph as one element of the batch.*example="token"'


def adjacency() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    a = (torch.rand(NODES, NODES, generator=generator) < 0.3).double() + torch.eye(NODES, dtype=torch.float64)
    return a / a.sum(1, keepdim=True)


class Dense(nn.Module):
    """Means over neighbours, of a graph that the model knows, before a layer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(5, 3).double()
        self.register_buffer("a", adjacency())

    def forward(self, x: Tensor) -> Tensor:
        return self.a @ self.layer(x)  # type: ignore[operator]


class One(Dense):
    """The same, of a batch that is one graph."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x[0])[None]


class Edges(nn.Module):
    """Sums over edges, given beside the nodes."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(5, 3).double()

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        return torch.zeros(len(x), 3, dtype=x.dtype).index_add(0, edges[1], self.layer(x)[edges[0]])


def data() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(NODES, 5, dtype=torch.float64, generator=generator)
    edges = torch.cat([torch.arange(NODES).expand(2, -1), torch.randint(NODES, (2, 30), generator=generator)], 1)
    return x, edges, torch.randint(3, (NODES,), generator=generator)


@pytest.mark.parametrize("structure", ["full", "kfac"])
def test_nodes__as_examples_are_refused_with_advice(structure: str) -> None:
    x, edges, y = data()
    with pytest.raises(fk.DataError, match=ADVICE):
        fk.EmpiricalFisher(Dense(), (x, y), structure=structure)
    with pytest.raises(fk.DataError, match=ADVICE):
        fk.EmpiricalFisher(Edges(), ((x, edges), y), structure=structure)


def test_nodes__as_examples_of_an_optimizer_are_refused_with_advice() -> None:
    x, edges, _ = data()
    model = Edges()
    optimizer = fk.optim.NaturalGradient(model, lr=1.0, damping=1.0)
    with pytest.raises(fk.DataError, match=ADVICE):
        model(x, edges)
    optimizer.close()


def test_nodes__that_only_influence_each_other_are_refused_with_advice() -> None:
    class Mean(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x - x.mean(0))

    x, _, y = data()
    with pytest.raises(fk.ModelError, match='example="token"'):
        fk.EmpiricalFisher(Mean(5, 3).double(), (x, y))


@pytest.mark.parametrize("form", [Dense, One])
@pytest.mark.parametrize("kind", [fk.EmpiricalFisher, fk.ImprovedEmpiricalFisher, fk.ExactFisher], ids=str)
def test_graph__as_one_element_of_the_batch_has_a_row_a_node(kind: Any, form: type[Dense]) -> None:
    """By one autograd call for each node; nodes without a label do not count."""
    x, _, y = data()
    y = y.clone()
    y[:4] = -100
    model = Dense()
    fisher = kind(form(), (x[None], y[None]), example="token")
    total: Any = 0
    for node in range(4, NODES):
        z = model(x)[node]
        p = z.detach().softmax(0)
        u = p - nn.functional.one_hot(y[node], 3)
        h = p.diag() - torch.outer(p, p)
        metric = {"ef": torch.outer(u, u), "ief": torch.outer(u, u) / (u @ u), "exact": h}[fisher.metadata["kind"]]
        jacobian = torch.stack([by_hand.gradient(out, model) for out in z])
        total = total + jacobian.T @ metric @ jacobian
    assert fisher.examples == NODES - 4
    torch.testing.assert_close(fisher.to_dense(), total / (NODES - 4))


def test_failing_model__says_its_own_words() -> None:
    class Failing(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            raise RuntimeError("no such thing")

    x, _, y = data()
    with pytest.raises(RuntimeError, match="no such thing") as caught:
        fk.EmpiricalFisher(Failing(5, 3).double(), (x, y))
    assert not isinstance(caught.value, fk.FisherkitError)


# -- where the classes are ---------------------------------------------------------------------------------------------


ASKS = r"class_axis=-1\) if they are the last axis, or class_axis=1"
KINDS: dict[str, tuple[Any, dict[str, Any], bool]] = {
    "ef": (fk.EmpiricalFisher, {}, True),
    "ief": (fk.ImprovedEmpiricalFisher, {}, True),
    "truncated": (fk.TruncatedFisher, {}, True),
    "exact": (fk.ExactFisher, {}, False),
    "sf": (fk.SampledFisher, {"draws": 3}, False),
}


class Last(nn.Module):
    """A model with its classes moved to the end."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x).movedim(1, -1)


def conv(length: int, classes: int = 5) -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    model = nn.Conv1d(2, classes, 3, padding=1).double()
    return model, torch.randn(6, 2, length, dtype=torch.float64), torch.randint(classes, (6, length))


def images() -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.Tanh(), nn.Conv2d(4, 3, 1)).double()
    return model, torch.randn(5, 2, 4, 3, dtype=torch.float64), torch.randint(3, (5, 4, 3))


@pytest.mark.parametrize(
    ("case", "kind", "example"),
    [*(("(B, C, L)", kind, "sequence") for kind in KINDS), *(("(B, C, H, W)", kind, "token") for kind in KINDS),
     ("(B, C, C)", "truncated", "sequence"), ("(B, C, C)", "exact", "token")],
)  # fmt: skip
def test_axis_1__is_what_the_model_with_its_classes_moved_last_has(case: str, kind: str, example: str) -> None:
    model, x, y = {"(B, C, L)": lambda: conv(9), "(B, C, C)": lambda: conv(5), "(B, C, H, W)": images}[case]()
    make, options, needs = KINDS[kind]
    y = y.clone()
    y[0, 1] = -100
    right = make(Last(model), (x, y), likelihood=Categorical(class_axis=-1), example=example, **options)
    for likelihood in (Categorical(class_axis=1), nn.CrossEntropyLoss()):
        found = make(model, (x, y), likelihood=likelihood, example=example, **options)
        assert found.examples == right.examples
        torch.testing.assert_close(found.to_dense(), right.to_dense())
        kfac = make(model, (x, y), likelihood=likelihood, example=example, structure="kfac", **options)
        moved = make(
            Last(model), (x, y), likelihood=Categorical(class_axis=-1), example=example, structure="kfac", **options
        )
        torch.testing.assert_close(kfac.diagonal(), moved.diagonal())
    if not needs:
        right = make(Last(model), (x, None), likelihood=Categorical(class_axis=-1), example=example, **options)
        found = make(model, (x, None), likelihood=nn.CrossEntropyLoss(), example=example, **options)
        torch.testing.assert_close(found.to_dense(), right.to_dense())


@pytest.mark.parametrize("kind", KINDS)
def test_default__asks_where_labels_fit_both_ways(kind: str) -> None:
    model, x, y = conv(5)
    make, options, _ = KINDS[kind]
    with pytest.raises(fk.DataError, match=ASKS):
        make(model, (x, y), **options)
    with pytest.raises(fk.DataError, match=ASKS):
        fk.evaluation.loss_gradient(model, (x, y))


@pytest.mark.parametrize("length", [5, 9])
@pytest.mark.parametrize("kind", ["exact", "sf"])
def test_default__asks_without_labels_unless_positions_stay_on_axis_1(kind: str, length: int) -> None:
    model, x, _ = conv(length)
    make, options, _ = KINDS[kind]
    with pytest.raises(fk.DataError, match=ASKS):
        make(model, (x, None), **options)
    strided = nn.Conv1d(2, 5, 3, stride=2).double()
    with pytest.raises(fk.DataError, match=ASKS):
        make(strided, (x, None), **options)


@pytest.mark.parametrize("inputs", ["features", "tokens", "several"])
@pytest.mark.parametrize("kind", KINDS)
def test_default__takes_a_models_positions_from_its_inputs(kind: str, inputs: str) -> None:
    """As Hugging Face's models have them, also where there are as many positions as classes."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.embedding, self.layer = nn.Embedding(7, 3).double(), nn.Linear(3, 4).double()

        def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
            return self.layer(x if x.is_floating_point() else self.embedding(x))

    x = torch.randint(7, (6, 4)) if inputs != "features" else torch.randn(6, 4, 3, dtype=torch.float64)
    y = torch.randint(4, (6, 4))
    arguments: Any = (x, torch.ones(6, 4)) if inputs == "several" else x
    model = Model()
    make, options, needs = KINDS[kind]
    params = ["layer.weight", "layer.bias"]
    for targets in (y, *([] if needs else [None])):
        found = make(model, (arguments, targets), params=params, **options)
        chosen = make(model, (arguments, targets), params=params, likelihood=Categorical(class_axis=-1), **options)
        torch.testing.assert_close(found.to_dense(), chosen.to_dense())


def test_torchs_loss__with_classes_last_says_how_to_name_them() -> None:
    torch.manual_seed(0)
    model, x = nn.Linear(3, 4).double(), torch.randn(6, 5, 3, dtype=torch.float64)
    y = torch.randint(4, (6, 5))
    with pytest.raises(fk.DataError, match=r"axis 1 of the outputs.*Categorical\(class_axis=-1\)"):
        fk.EmpiricalFisher(model, (x, y), likelihood=nn.CrossEntropyLoss())
    with pytest.raises(fk.DataError, match=ASKS):
        fk.ExactFisher(model, (x, None), likelihood=nn.CrossEntropyLoss())


def test_default__says_how_to_name_classes_on_axis_1() -> None:
    model, x, y = conv(9)
    with pytest.raises(fk.DataError, match=r"Categorical\(class_axis=1\)"):
        fk.EmpiricalFisher(model, (x, y))
    model, x, y = images()
    with pytest.raises(fk.DataError, match=r"Categorical\(class_axis=1\)"):
        fk.EmpiricalFisher(model, (x, y))


def test_shifted_labels__go_with_either_axis() -> None:
    model, x, y = conv(9)
    found = fk.EmpiricalFisher(model, (x, y), likelihood=nn.CrossEntropyLoss(), shift_labels=True)
    right = fk.EmpiricalFisher(Last(model), (x, y), shift_labels=True)
    torch.testing.assert_close(found.to_dense(), right.to_dense())


def letters() -> Compose:
    """As many features as classes, so that neither inputs nor labels tell where as many positions are."""
    torch.manual_seed(0)
    return Compose(lambda m, x: m.layer(x), layer=nn.Linear(4, 4).double())


def batches(*lengths: int) -> list[tuple[Tensor, Tensor]]:
    torch.manual_seed(1)
    return [(torch.randn(3, n, 4).double(), torch.randint(4, (3, n))) for n in lengths]


@pytest.mark.parametrize("structure", ["full", "diagonal", "ekfac"])
@pytest.mark.parametrize("kind", KINDS)
def test_default__is_settled_by_the_first_batch(kind: str, structure: str) -> None:
    make, options, _ = KINDS[kind]
    model, data, default = letters(), batches(6, 4, 5), Categorical()
    right = make(model, data, likelihood=Categorical(class_axis=-1), structure=structure, **options)
    for likelihood in ("categorical", default):
        found = make(model, data, likelihood=likelihood, structure=structure, **options)
        torch.testing.assert_close(found.to_dense(), right.to_dense())
    # What one model's data have settled says nothing of another's.
    with pytest.raises(fk.DataError, match=ASKS):
        make(model, data[1:], likelihood=default, structure=structure, **options)


def test_default__is_settled_in_all_that_follows(tmp_path: Path) -> None:
    model, data = letters(), batches(6, 4)
    torch.testing.assert_close(
        fk.evaluation.loss_gradient(model, data),
        fk.evaluation.loss_gradient(model, data, likelihood=Categorical(class_axis=-1)),
    )
    with pytest.raises(fk.DataError, match=ASKS):
        fk.evaluation.loss_gradient(model, data[1:])
    fisher = fk.EmpiricalFisher(model, data, structure="kfac")
    right = fk.influence.InfluenceScores(fisher, model, likelihood=Categorical(class_axis=-1)).scores(data[1], data)
    torch.testing.assert_close(fk.influence.InfluenceScores(fisher, model).scores(data[1], data), right)
    fisher.save(tmp_path / "f.safetensors")
    loaded = fk.load(tmp_path / "f.safetensors")
    torch.testing.assert_close(fk.influence.InfluenceScores(loaded, model).scores(data[1], data), right)
    ewc = fk.continual.EWC(model)
    ewc.consolidate(fisher)
    optimizer = fk.optim.NaturalGradient(model, lr=0.1, damping=1e-2)
    for x, y in reversed(data):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x).flatten(0, 1), y.flatten()).backward()
        optimizer.step()
    assert bool(ewc.penalty() > 0)
