"""Structures beside the reference: nearest Kronecker products, and factors kept in a coarser dtype."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typer.testing import CliRunner

import fisherkit as fk
from fisherkit.cli import app
from fisherkit.operators.linalg import nearest_orthonormal
from fisherkit.structures import nkp
from fisherkit.testing import check_fisher
from tests import by_hand

KINDS = [fk.EmpiricalFisher, fk.ExactFisher]


class Transposed(nn.Module):
    """A layer with its weight stored as [I, O]."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(inputs, outputs) / 2), nn.Parameter(torch.randn(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x, self.weight)


def task(name: str, batches: int = 3) -> tuple[nn.Module, list[tuple[Tensor, Tensor]]]:
    """A small model in float64, and batches of data."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layers: dict[str, nn.Module] = {
            "linear": nn.Sequential(nn.Linear(4, 3, bias=False), nn.Tanh(), nn.Linear(3, 3, bias=False)),
            "biased": nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 3)),
            "transposed": nn.Sequential(Transposed(4, 3), nn.Tanh(), Transposed(3, 3)),
            "conv": nn.Sequential(nn.Conv2d(1, 2, 2), nn.Tanh(), nn.Flatten(), nn.Linear(8, 3)),
            "narrow_conv": nn.Sequential(nn.Conv2d(1, 1, 1), nn.Tanh(), nn.Flatten(), nn.Linear(9, 3)),
            "positions": nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(6, 3)),
        }
        shape = {"conv": (1, 3, 3), "narrow_conv": (1, 3, 3), "positions": (2, 4)}.get(name, (4,))
        data = [(torch.randn(5 + i, *shape).double(), torch.randint(3, (5 + i,))) for i in range(batches)]
        return layers[name].double(), data


def blocks(model: nn.Module, dense: Tensor) -> list[tuple[Tensor, int, int]]:
    """Each layer's block in the order [O, I + 1], with O and I + 1, of a matrix in flat order."""
    found, start = [], 0
    for layer in model:
        if not list(layer.parameters()):
            continue
        weight, bias = layer.weight, layer.bias
        outputs = weight.shape[1] if isinstance(layer, Transposed) else weight.shape[0]
        index = torch.arange(start, start + weight.numel()).reshape(weight.shape)
        index = index.T if isinstance(layer, Transposed) else index.flatten(1)
        start += weight.numel()
        if bias is not None:
            index = torch.cat([index, torch.arange(start, start + outputs)[:, None]], 1)
            start += outputs
        found.append((dense[index.flatten()][:, index.flatten()], outputs, index.shape[1]))
    return found


def nearest(block: Tensor, outputs: int, width: int) -> Tensor:
    """The nearest G ⊗ A to a block over [outputs, width], by the singular value decomposition."""
    rearranged = block.reshape(outputs, width, outputs, width).transpose(1, 2).reshape(outputs**2, width**2)
    u, s, v = torch.linalg.svd(rearranged)
    return s[0] * torch.kron(u[:, 0].reshape(outputs, outputs), v[0].reshape(width, width))


def expected_blocks(model: nn.Module, full: Tensor) -> list[Tensor]:
    return [nearest(*block) for block in blocks(model, full)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["linear", "biased", "transposed", "conv", "narrow_conv", "positions"])
def test_build__is_the_nearest_product_of_each_block(name: str, kind: type[fk.FisherApproximation]) -> None:
    model, data = task(name)
    full = kind(model, data).to_dense()
    found = kind(model, data, structure="nkp")
    for (block, _, _), expected in zip(blocks(model, found.to_dense()), expected_blocks(model, full), strict=True):
        torch.testing.assert_close(block, expected, rtol=1e-6, atol=1e-7 * float(expected.norm()))
        assert float(torch.linalg.eigvalsh(block).min()) > -1e-12 * float(block.norm())
    assert {entry.structure for entry in found.coverage().entries} == {"nkp"}


def test_build__is_never_farther_than_kfac() -> None:
    model, data = task("positions")
    full = fk.ExactFisher(model, data).to_dense()
    own = [blocks(model, fk.ExactFisher(model, data, structure=s).to_dense()) for s in ("nkp", "kfac")]
    for (block, _, _), (ours, _, _), (kfac, _, _) in zip(blocks(model, full), *own, strict=True):
        assert float((ours - block).norm()) <= float((kfac - block).norm())


def test_build__reads_the_data_again_where_rows_do_not_fit() -> None:
    model, data = task("biased")
    kept = fk.ExactFisher(model, data, structure="nkp")
    read = fk.ExactFisher(model, data, structure="nkp", memory_budget=1200)
    torch.testing.assert_close(read.to_dense(), kept.to_dense(), rtol=1e-7, atol=1e-10)


def test_build__says_where_it_has_not_converged(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nkp, "MOST", 3)
    model, data = task("biased")
    with pytest.warns(fk.NotConvergedWarning, match='structure="nkp": after 3 passes'):
        fk.ExactFisher(model, data, structure="nkp")


def test_average__is_nearest_to_the_sum_of_both() -> None:
    model, data = task("biased", batches=2)
    preconditioner = fk.optim.Preconditioner(model, kind="exact", structure="nkp", damping=0.1, ema=0.7)
    for x, y in data:
        model.zero_grad()
        F.cross_entropy(model(x), y).backward()
        preconditioner.step()
    parts = [expected_blocks(model, fk.ExactFisher(model, batch).to_dense()) for batch in data]
    model_gradient = torch.autograd.grad(F.cross_entropy(model(data[1][0]), data[1][1]), list(model.parameters()))
    start = 0
    for i, (first, second) in enumerate(zip(*parts, strict=True)):
        weight, bias = model_gradient[start : start + 2]
        start += 2
        g = torch.cat([weight, bias[:, None]], 1)
        matrix = nearest((0.7 * first + second) / 1.7, *g.shape) + 0.1 * torch.eye(g.numel()).double()
        step = torch.linalg.solve(matrix, g.flatten()).reshape(g.shape)
        layer = model[2 * i]
        found = torch.cat([layer.weight.grad, layer.bias.grad[:, None]], 1)
        torch.testing.assert_close(found, step, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("options", [{}, {"ema": 0.5, "refresh_every": 2}, {"ema": 0.5, "max_rank": 2}])
def test_optimizer__goes_on_bit_for_bit(options: dict[str, float]) -> None:
    ends = []
    for stop in (False, True):
        model, data = task("biased")
        optimizer = fk.optim.NaturalGradient(model, 0.2, kind="ief", structure="nkp", damping=0.1, **options)
        for number, (x, y) in enumerate(data * 2):
            if stop and number == 3:
                state = optimizer.state_dict()
                optimizer.close()
                optimizer = fk.optim.NaturalGradient(model, 0.2, kind="ief", structure="nkp", damping=0.1, **options)
                optimizer.load_state_dict(state)
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()
        ends.append(by_hand.weights(model))
    assert torch.equal(*ends)


def test_file__comes_back(tmp_path: Path) -> None:
    model, data = task("conv")
    fisher = fk.ExactFisher(model, data, structure="nkp")
    fisher.save(tmp_path / "f.safetensors")
    torch.testing.assert_close(fk.load(tmp_path / "f.safetensors").to_dense(), fisher.to_dense())


def test_applications__take_it() -> None:
    (first, data), (second, _) = task("biased"), task("biased")
    with torch.no_grad():
        for p in second.parameters():
            p.add_(0.1 * torch.ones_like(p).cumsum(0))
    fishers = [fk.ExactFisher(model, data, structure="nkp") for model in (first, second)]
    matrices = [fisher.to_dense() for fisher in fishers]
    eye = torch.eye(len(matrices[0])).double()

    penalty = fk.continual.EWC(first, strength=2.0, normalize=None)
    penalty.consolidate(fishers[0])
    change = by_hand.weights(second) - by_hand.weights(first)
    with torch.no_grad():
        for p, q in zip(first.parameters(), second.parameters(), strict=True):
            p.copy_(q)
    torch.testing.assert_close(penalty.penalty().detach(), change @ matrices[0] @ change)

    first, _ = task("biased")
    merged = fk.merging.merge([first, second], fishers, damping=1e-3, normalize=None, output_damping=0.0)
    total, ends = (matrices[0] + matrices[1]) / 2, (by_hand.weights(first), by_hand.weights(second))
    weighed = (matrices[0] @ ends[0] + matrices[1] @ ends[1]) / 2 + 1e-3 * (ends[0] + ends[1]) / 2
    expected = torch.linalg.solve(total + 1e-3 * eye, weighed)
    found = torch.cat([merged[name].flatten() for name in fishers[0].space.names])
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)

    x, y = data[0]
    J = by_hand.rows(second, (x, y))
    scores = fk.influence.InfluenceScores(fishers[1], second, damping=0.1).scores((x[:2], y[:2]), (x, y))
    expected = J[:2] @ torch.linalg.solve(matrices[1] + 0.1 * eye, J.T) / fishers[1].examples
    torch.testing.assert_close(scores, expected, rtol=1e-7, atol=1e-9)


# -- factors and diagonals in a coarser dtype than they are added up in ------------------------------------------------


STRUCTURES = ("diagonal", "kfac", "ekfac", "nkp")
WORST = {torch.bfloat16: 1e-2, torch.float32: 1e-7}
"""Of rounding entries, or eigenvectors and eigenvalues, relative to the norm."""


def network(dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.LayerNorm(9), nn.Linear(9, 4)).to(dtype)


def data(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(40, 6, generator=generator).to(dtype), torch.randint(4, (40,), generator=generator)


def built(structure: str, dtype: torch.dtype | None, of: torch.dtype = torch.float64, **options: Any) -> Any:
    return fk.ExactFisher(network(of), data(of), structure=structure, dtype=dtype, **options)


def error(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


@pytest.mark.parametrize("dtype", WORST, ids=str)
@pytest.mark.parametrize("structure", STRUCTURES)
def test_packed__is_a_fisher_matrix_near_the_one_that_was_rounded(structure: str, dtype: torch.dtype) -> None:
    """All operations belong to one matrix, in float64; its eigenvalues are those that there were."""
    fisher, whole = built(structure, dtype), built(structure, None)
    assert fisher.dtype == torch.float64
    dense = fisher.to_dense()
    check_fisher(fisher, dense)
    assert error(dense, whole.to_dense()) <= WORST[dtype]
    assert error(fisher.trace(), whole.trace()) <= WORST[dtype]
    if structure in ("kfac", "nkp"):
        layer, before = (found.held.blocks[0] for found in (fisher, whole))
        assert error(layer.eigenvalues(layer.size), before.eigenvalues(layer.size)) <= 1e-12
    share = torch.finfo(dtype).bits / 64
    assert share * whole.nbytes <= fisher.nbytes <= share * whole.nbytes + 8 * 30 + 8 * 18**2
    assert fisher.metadata["kept_dtype"] == str(dtype).removeprefix("torch.")


@pytest.mark.parametrize("of", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("structure", STRUCTURES)
def test_packed__of_models_in_float32_and_below_computes_in_float32(structure: str, of: torch.dtype) -> None:
    fisher, whole = built(structure, torch.bfloat16, of), built(structure, None, of)
    assert fisher.dtype == whole.dtype == torch.float32
    check_fisher(fisher, fisher.to_dense().double())
    assert error(fisher.to_dense(), whole.to_dense()) <= WORST[torch.bfloat16]
    same = built(structure, torch.float32, of)
    assert torch.equal(same.to_dense(), whole.to_dense())
    assert same.nbytes == whole.nbytes


@pytest.mark.parametrize("structure", STRUCTURES)
def test_packed__goes_to_a_file_and_back_as_it_is(structure: str, tmp_path: Path) -> None:
    fisher, whole = built(structure, torch.bfloat16), built(structure, None)
    fisher.save(tmp_path / "a")
    whole.save(tmp_path / "b")
    loaded = fk.load(tmp_path / "a")
    assert torch.equal(loaded.to_dense(), fisher.to_dense())
    assert loaded.nbytes == fisher.nbytes
    half = (2.0 * fisher).to_dense()
    (2.0 * loaded).save(tmp_path / "c")
    assert torch.equal(fk.load(tmp_path / "c").to_dense(), half)
    assert error(half, 2 * fisher.to_dense()) <= 1e-15


@pytest.mark.parametrize("structure", ["kfac", "ekfac"])
def test_packed__in_parts_is_the_whole_build(structure: str, tmp_path: Path) -> None:
    """Also to a file; the plan knows what is kept."""
    options: dict[str, Any] = {"structure": structure, "dtype": torch.bfloat16}
    whole, model = built(**options), network()
    plan = fk.plan(model, data(), "exact", **options)
    assert plan.result_bytes == whole.held.nbytes
    assert plan.peak_bytes < fk.plan(model, data(), "exact", structure=structure).peak_bytes + 32 * 10**2
    budget = 8000  # less than all layers need together
    assert len(fk.plan(model, data(), "exact", to_file=True, memory_budget=budget, **options).parts) > 1
    fk.build_file(tmp_path / "f", model, data(), "exact", memory_budget=budget, **options)
    assert error(fk.load(tmp_path / "f").to_dense(), whole.to_dense()) <= 1e-12


@pytest.mark.parametrize("structure", STRUCTURES)
def test_packed__has_the_blocks_of_the_whole(structure: str, tmp_path: Path) -> None:
    """In memory and in a file, so that what is normalised block by block is the same."""
    fishers = {dtype: built(structure, dtype, torch.float32) for dtype in (None, torch.bfloat16)}
    fishers[torch.bfloat16].save(tmp_path / "f")
    names = {dtype: [block.space.names for block in fk.operators.split(fisher)] for dtype, fisher in fishers.items()}
    assert names[torch.bfloat16] == names[None] == list(fk.operators.open_file(tmp_path / "f").blocks)
    other = {name: value + 0.1 for name, value in network(torch.float32).state_dict().items()}
    policy = fk.merging.MergePolicy(other_weights="warn")
    with pytest.warns(UserWarning, match="measured at other"):
        merged = [
            fk.merging.merge([network(torch.float32), other], [fisher, 2.0 * fisher], policy=policy)
            for fisher in fishers.values()
        ]
    assert all(float((merged[1][name] - value).abs().max()) < 2e-3 for name, value in merged[0].items())


def test_packed__serves_applications() -> None:
    """Merging, consolidation and scores take it as any Fisher, and do not widen what they keep."""
    model, (x, y) = network(), data()
    fishers = [fk.ExactFisher(model, (x, y), structure="kfac", dtype=dtype) for dtype in (torch.bfloat16, None)]
    states = []
    for fisher in fishers:
        ewc = fk.continual.EWC(model)
        ewc.consolidate(fisher)
        states.append(ewc.nbytes)
    assert states[1] - states[0] == fishers[1].nbytes - fishers[0].nbytes > 0
    merged = [fk.merging.merge([model, model], [fisher, fisher], damping=1e-3) for fisher in fishers]
    for name, value in model.named_parameters():
        assert float((merged[0][name] - value).abs().max()) < 1e-9
    scores = [
        fk.influence.InfluenceScores(fisher, model, damping=fk.RelativeDamping(0.1)).scores((x[:3], y[:3]), (x, y))
        for fisher in fishers
    ]
    assert error(*scores) < 1e-2


@pytest.mark.parametrize("dtype", WORST, ids=str)
def test_nearest_orthonormal__is_the_polar_factor(dtype: torch.dtype) -> None:
    basis = torch.linalg.qr(torch.randn(30, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))[0]
    rounded = basis.to(dtype).double()
    u, _, v = torch.linalg.svd(rounded, full_matrices=False)
    assert error(nearest_orthonormal(rounded), u @ v) < 1e-14


@pytest.mark.parametrize(
    ("structure", "dtype", "words"),
    [("full", torch.bfloat16, "kfac"), ("block", torch.float32, "kfac"), ("kfac", torch.float16, "dtype")],
)
def test_packed__is_refused_where_it_would_be_no_fisher_matrix(structure: str, dtype: torch.dtype, words: str) -> None:
    with pytest.raises(fk.InvalidArgumentError, match=words):
        built(structure, dtype)


def test_estimate__keeps_factors_in_a_dtype(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own.py").write_text(
        "import torch\n"
        "def make():\n"
        "    torch.manual_seed(0)\n"
        "    return torch.nn.Linear(6, 4), (torch.randn(20, 6), torch.arange(20) % 4)\n"
    )
    monkeypatch.chdir(tmp_path)
    options = ["--kind", "ef", "--structure", "ekfac", "--keep-dtype", "bfloat16", "--out", "f"]
    result = CliRunner().invoke(app, ["estimate", "own:make", *options])
    assert result.exit_code == 0, result.output
    found = fk.load(tmp_path / "f")
    assert found.dtype == torch.float32
    assert found.metadata["kept_dtype"] == "bfloat16"
    assert found.nbytes == 2 * (7 * 7 + 4 * 4 + 7 * 4)


@pytest.mark.parametrize("beside", [["--out", "f"], ["--plan"]], ids=" ".join)
@pytest.mark.parametrize("structure", ["full", "block"])
def test_estimate__refuses_a_dtype_by_its_option_before_a_model_is_loaded(structure: str, beside: list[str]) -> None:
    options = ["--structure", structure, "--keep-dtype", "bfloat16", *beside]
    result = CliRunner().invoke(app, ["estimate", "no_such_module:make", *options])
    assert result.exit_code == 1
    said = f"got --keep-dtype bfloat16 with --structure {structure}; expected --keep-dtype none."
    assert said in " ".join(result.output.split())
    assert "--structure kfac" in result.output


@pytest.mark.parametrize("size", [1e-13, 1e12])
def test_nkp__of_gradients_of_any_size_in_float32(size: float) -> None:
    torch.manual_seed(0)
    x, y = size * torch.randn(20, 4), torch.arange(20) % 3
    found, expected = (
        fk.EmpiricalFisher(
            nn.Linear(4, 3, bias=False).to(dtype).apply(lambda m: nn.init.zeros_(m.weight)),
            (x.to(dtype), y), structure="nkp",
        ).to_dense().double() / size**2
        for dtype in (torch.float32, torch.float64)
    )  # fmt: skip
    assert float(expected.trace()) > 0.1
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


class Scaled(nn.Module):
    """A layer whose inputs are multiplied by 10^p and outputs by rows' size / 10^p, p the last input of a position."""

    def __init__(self, size: float, bias: bool) -> None:
        super().__init__()
        self.layer, self.size = nn.Linear(4, 3, bias=bias), size
        with torch.no_grad():
            for p in self.layer.parameters():
                p.copy_(torch.linspace(-0.2, 0.2, p.numel()).reshape(p.shape))

    def forward(self, x: Tensor) -> Tensor:
        scale = 10 ** x[..., 4:]
        return (self.layer(x[..., :4] * scale) * (self.size / scale)).sum(1)


POWERS = {
    "large": [[25.0]], "larger": [[30.0]], "squares too large": [[20.0]], "small": [[-25.0]],
    "positions": [[25.0, 20.0]], "far apart": [[25.0, -25.0]], "examples": [[25.0], [0.0], [-22.0]],
    "all": [[18.0, 0.0], [0.0, -18.0], [-30.0, 28.0]],
}  # fmt: skip


@pytest.mark.parametrize("kind", ["ef", "exact"])
@pytest.mark.parametrize("size", [1.0, 1e-5])
@pytest.mark.parametrize(
    ("name", "bias"),  # whose own gradient's square would be beyond float32 beside small inputs
    [
        (name, bias)
        for name, powers in POWERS.items()
        for bias in (False, True)
        if min(map(min, powers)) > -9 or not bias
    ],
)
def test_nkp__of_inputs_and_gradients_whose_products_alone_are_of_ordinary_size(
    name: str, size: float, kind: str, bias: bool
) -> None:
    """Float32 ends at 1e38 and 1e-38, which their squares are beyond."""
    powers = torch.tensor(POWERS[name]).repeat(6, 1)
    x = torch.randn(*powers.shape, 4, generator=torch.Generator().manual_seed(1))
    data = torch.cat([x, powers[..., None]], -1), torch.arange(len(x)) % 3
    model = Scaled(size, bias)
    found = fk.FisherApproximation(model, data, kind, structure="nkp").to_dense().double()
    full = by_hand.fisher(model.double(), (data[0].double(), data[1]), kind)
    (block, _, _), (whole, *sides) = (blocks(nn.Sequential(model.layer), one)[0] for one in (found, full))
    expected = nearest(whole, *sides)
    assert float((block - expected).norm()) < 1e-4 * float(expected.norm())
