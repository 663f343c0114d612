"""The influence experiment: its page, runs, candidates and peers."""

import importlib.util
import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fisherkit as fk
from examples.influence import outcomes, peers, run, scoring
from examples.influence.candidates import Candidate, fit
from examples.influence.dattri_peer import dattri_trak
from examples.influence.evaluation import Retraining, retrain
from examples.influence.evaluation import retraining as module
from examples.influence.methods import cosine, dot, methods
from examples.influence.run import main
from examples.influence.scorer import Method, needed, seed_of
from examples.influence.settings import SETTINGS, tiny
from examples.influence.summary import aims, curves
from examples.influence.traker_peer import traker
from examples.shared.results import markers
from tests.examples.retraining_cases import ADAMW, MASKS, QUERIES, SGD, TRAIN, mlp


@pytest.mark.smoke
def test_main__writes_files_and_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["--tiny", "--setting", "digits-0", "--subsets", "6", "--seeds", "2", "--out", str(tmp_path)]
    main([*arguments, "--only-retrain"])
    assert [file.name for file in tmp_path.iterdir()] == ["digits-0-6x2.safetensors"]
    main([*arguments, "--method", "dot product", "full, EF", "--damping", "0.1", "1"])
    found = json.loads((tmp_path / "digits-0.json").read_text("utf-8"))
    expected = [("dot product", None), ("full, EF", 0.1), ("full, EF", 1.0)]
    assert [(row["method"], row["damping"]) for row in found["rows"]] == expected
    assert "| dot product | " in capsys.readouterr().out
    with monkeypatch.context() as patch:
        patch.setattr(scoring, "methods", dict)  # nothing is scored again
        main([*arguments, "--method", "dot product"])
    again = json.loads((tmp_path / "digits-0.json").read_text("utf-8"))
    assert again["rows"] == found["rows"]


def test_report__fills_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page, assets = tmp_path / "page.md", tmp_path / "assets"
    page.write_text("before\n" + "\n".join(markers(run.SECTION)) + "\nafter\n", "utf-8")
    monkeypatch.setattr(run, "PAGE", page)
    monkeypatch.setattr(run, "ASSETS", assets)
    out = tmp_path / "out"
    arguments = ["--out", str(out), "--docs"]
    with pytest.raises(SystemExit, match="no results"):
        main([*arguments, "--report"])
    sizes = ["--tiny", "--setting", "softmax", "--subsets", "6", "--seeds", "2"]
    main([*arguments, *sizes, "--method", "full, EF", "full, exact", "--damping", "1e-6", "1", "10"])
    main([*arguments, "--report"])
    text = page.read_text("utf-8")
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert text.count("| full, exact | ") == 3  # a table of scores, of aims, of dampings
    assert {file.name for file in assets.iterdir()} == {"softmax.json", "time.png", "damping.png"}


@pytest.mark.parametrize("name", SETTINGS)
def test_settings__train_and_are_scored(name: str) -> None:
    setting = tiny(SETTINGS[name]())
    models = outcomes.scored_models(setting)
    assert len(models) == outcomes.SCORED
    assert 0 <= outcomes.accuracy(setting, models) <= 1
    model, (x, y), (a, b) = models[0], setting.train, setting.queries

    def gradient(inputs: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        loss = F.cross_entropy(model(inputs.unsqueeze(0)), label.unsqueeze(0))
        trained = [p for p in model.parameters() if p.requires_grad]
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, trained)])

    q, n = gradient(a[1], b[1]), gradient(x[2], y[2])
    found = dot(model, setting.train)(setting.queries, None)[1, 2]
    torch.testing.assert_close(found, q @ n / 60, rtol=1e-4, atol=1e-7)
    found = cosine(model, setting.train)(setting.queries, None)[1, 2]
    torch.testing.assert_close(found, F.cosine_similarity(q, n, dim=0), rtol=1e-4, atol=1e-6)


def test_methods__with_a_damping_refuse_to_go_without() -> None:
    setting = tiny(SETTINGS["digits-0"]())
    model = setting.build(0)
    for name in ("full, EF", "full, exact, N rows"):
        with pytest.raises(ValueError, match="needs a damping"):
            methods()[name](model, setting.train)(setting.queries, None)


def test_aims__are_those_of_all_three() -> None:
    def row(method: str, damping: float, mean: float, seconds: float) -> dict[str, object]:
        return {"method": method, "damping": damping, "mean": mean, "fit_seconds": 0.0, "seconds": seconds}

    rows = [row("full, exact", 1.0, 0.6, 9.0), row("full, EF", 1.0, 0.5, 1.0)]
    rows += [row("good", d, mean, 1.9) for d, mean in ((1e-6, 0.45), (1.0, 0.595), (10.0, 0.5))]
    rows += [row("slow", d, mean, 2.1) for d, mean in ((1e-6, 0.45), (1.0, 0.595), (10.0, 0.5))]
    rows += [row("frail", d, mean, 1.9) for d, mean in ((1e-6, 0.3), (1.0, 0.595), (10.0, 0.5))]
    rows += [row("narrow", d, mean, 1.9) for d, mean in ((1e-3, 0.5), (1.0, 0.595), (10.0, 0.5))]
    found = aims(curves({"rows": rows}))
    assert [name for name, aim in found.items() if aim.reached] == ["good"]
    assert found["narrow"].robustness is None
    assert found["frail"].robustness == pytest.approx(0.3 / 0.595)


# -- the file of a long retraining -------------------------------------------------------------------------------------


def interrupted(monkeypatch: pytest.MonkeyPatch, path: Path, models: int, **options: Any) -> None:
    """Stop a run after some models."""
    train, count = module.train_model, 0

    def stopping(*args: Any) -> Any:
        nonlocal count
        count += 1
        if count > models:
            raise KeyboardInterrupt
        return train(*args)

    with monkeypatch.context() as patch:
        patch.setattr(module, "train_model", stopping)
        with pytest.raises(KeyboardInterrupt):
            retrain(mlp, TRAIN, QUERIES, MASKS, SGD, path=path, **options)


@pytest.mark.smoke
@pytest.mark.parametrize("save_every", [0.0, 1e9])
def test_retrain__goes_on_where_it_stopped(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, save_every: float) -> None:
    options: dict[str, Any] = {"seeds": (0, 5), "save_every": save_every}
    path = tmp_path / "runs.safetensors"
    whole = retrain(mlp, TRAIN, QUERIES, MASKS, SGD, **options)
    interrupted(monkeypatch, path, 4, **options)
    with pytest.raises(fk.errors.FileFormatError, match="unfinished run, 4 of 10"):
        Retraining.load(path)
    calls: list[int] = []
    train = module.train_model
    monkeypatch.setattr(module, "train_model", lambda *args: calls.append(1) or train(*args))
    finished = retrain(mlp, TRAIN, QUERIES, MASKS, SGD, path=path, **options)
    assert sum(calls) == 6
    assert torch.equal(finished.outputs["loss"], whole.outputs["loss"])
    again = retrain(mlp, TRAIN, QUERIES, MASKS, SGD, path=path, **options)
    assert sum(calls) == 6
    loaded = Retraining.load(path)
    for other in (again, loaded):
        assert torch.equal(other.outputs["loss"], whole.outputs["loss"])
        assert torch.equal(other.train_losses, whole.train_losses)
    assert torch.equal(loaded.masks, MASKS)
    assert loaded.seeds == (0, 5)
    assert [file.name for file in tmp_path.iterdir()] == ["runs.safetensors"]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"recipe": ADAMW}, "recipe"),
        ({"seeds": (0, 2)}, "models"),
        ({"masks": ~MASKS | MASKS[[1, 2, 3, 4, 0]]}, "subsets"),
        ({"train": (TRAIN[0] + 1, TRAIN[1])}, "data"),
        ({"measurements": ("margin",)}, "measurements"),
        ({"build": lambda seed: nn.Linear(5, 3).double()}, "models"),
    ],
)
def test_retrain__refuses_the_file_of_another_run(tmp_path: Path, change: dict[str, Any], named: str) -> None:
    path = tmp_path / "runs.safetensors"
    arguments: dict[str, Any] = {
        "build": mlp, "train": TRAIN, "queries": QUERIES, "masks": MASKS, "recipe": SGD, "seeds": (0, 1), "path": path,
    }  # fmt: skip
    retrain(**arguments)
    content = path.read_bytes()
    with pytest.raises(fk.errors.InvalidArgumentError, match=f"another run, which differs in .*{named}"):
        retrain(**{**arguments, **change})
    assert path.read_bytes() == content


def test_files__of_other_kinds_are_refused_and_left(tmp_path: Path) -> None:
    broken, fisher = tmp_path / "broken", tmp_path / "fisher"
    broken.write_bytes(b"nothing")
    fk.EmpiricalFisher(mlp(0), TRAIN).save(fisher)
    for path in (broken, fisher):
        content = path.read_bytes()
        with pytest.raises(fk.errors.FileFormatError):
            retrain(mlp, TRAIN, QUERIES, MASKS, SGD, path=path)
        with pytest.raises(fk.errors.FileFormatError):
            Retraining.load(path)
        assert path.read_bytes() == content
    with pytest.raises(fk.errors.FileFormatError, match="no such file"):
        Retraining.load(tmp_path / "none")
    with pytest.raises(fk.errors.InvalidArgumentError, match="does not exist"):
        retrain(mlp, TRAIN, QUERIES, MASKS, SGD, path=tmp_path / "no" / "runs")


# -- what the influence experiments try beside the package's structures ------------------------------------------------


N, DAMPING = 12, 0.5


class Dense:
    """A small perceptron's gradients and exact Fisher by autograd, flat order as the model's."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(5, 4), nn.GELU(), nn.Linear(4, 3)).double()
        self.train = torch.randn(N, 5).double(), torch.randint(3, (N,))
        self.queries = torch.randn(4, 5).double(), torch.randint(3, (4,))
        rows = []
        for x in self.train[0]:
            z = self.model(x)
            p = z.detach().softmax(0)
            root = torch.linalg.eigh(torch.diag(p) - torch.outer(p, p))
            half = root.eigenvectors * root.eigenvalues.clamp_min(0).sqrt()
            rows += [self._flat((z * v).sum()) for v in half.mT]
        self.rows = torch.stack(rows)
        self.fisher = self.rows.mT @ self.rows / N
        self.sizes = [4 * 5 + 4, 3 * 4 + 3]

    def _flat(self, value: Tensor) -> Tensor:
        found = torch.autograd.grad(value, list(self.model.parameters()), retain_graph=True)
        return torch.cat([g.flatten() for g in found])

    def gradients(self, pair: tuple[Tensor, Tensor]) -> Tensor:
        return torch.stack(
            [self._flat(nn.functional.cross_entropy(self.model(x[None]), y[None])) for x, y in zip(*pair, strict=True)]
        )

    def scores(self, matrix: Tensor) -> Tensor:
        """With the whole of F + B."""
        return self.gradients(self.queries) @ torch.linalg.solve(matrix, self.gradients(self.train).mT) / N


@pytest.fixture(scope="module")
def dense() -> Dense:
    return Dense()


def close(candidate: Candidate, dense: Dense, matrix: Tensor) -> None:
    found = fit(candidate, dense.model, dense.train)(dense.queries, DAMPING)
    torch.testing.assert_close(found, dense.scores(matrix), rtol=1e-8, atol=1e-12)


def test_fit__is_the_damped_fisher(dense: Dense) -> None:
    damping = DAMPING * dense.fisher.trace() / len(dense.fisher)
    close(Candidate(fk.ExactFisher), dense, dense.fisher + damping * torch.eye(len(dense.fisher), dtype=torch.float64))


@pytest.mark.parametrize("blocks", [False, True])
def test_by_layer__damps_each_layer_by_its_own_mean(dense: Dense, blocks: bool) -> None:
    parts = dense.fisher.diagonal().split(dense.sizes)
    damping = torch.cat([DAMPING * part.mean().expand(len(part)) for part in parts])
    matrix = dense.fisher.clone()
    if blocks:
        first = dense.sizes[0]
        matrix[:first, first:] = matrix[first:, :first] = 0
    close(Candidate(fk.ExactFisher, by_layer=True, blocks=blocks), dense, matrix + torch.diag(damping))


def test_keep__keeps_the_largest_rows(dense: Dense) -> None:
    found = fk.ExactFisher(dense.model, dense.train).gram()
    kept = fk.ExactFisher(dense.model, dense.train, max_rows=N)
    assert float(kept.trace()) == pytest.approx(float(found.diagonal().topk(N).values.sum()))
    matrix = kept.to_dense()
    damping = DAMPING * matrix.trace() / len(matrix)
    close(Candidate(fk.ExactFisher, keep=1), dense, matrix + damping * torch.eye(len(matrix), dtype=torch.float64))


def test_floor__adds_ekfac(dense: Dense) -> None:
    ekfac = fk.ExactFisher(dense.model, dense.train, structure="ekfac").to_dense()
    damping = DAMPING * dense.fisher.trace() / len(dense.fisher)
    matrix = 0.7 * dense.fisher + 0.3 * ekfac + damping * torch.eye(len(ekfac), dtype=torch.float64)
    close(Candidate(fk.ExactFisher, floor=0.3), dense, matrix)


def test_kronecker__adds_kfac_with_factored_damping(dense: Dense) -> None:
    inputs = [dense.train[0], dense.model[:2](dense.train[0]).detach()]
    pairs = []
    start = 0
    for a, size in zip(inputs, dense.sizes, strict=True):
        with_bias = torch.cat([a, torch.ones(N, 1).double()], 1)
        outputs = size // with_bias.shape[1]
        g = dense.rows[:, start + size - outputs : start + size]  # a bias's gradient is its output's
        pairs.append((with_bias.mT @ with_bias / N, g.mT @ g / N))
        start += size
    root = (DAMPING * sum(a.trace() * g.trace() for a, g in pairs) / len(dense.fisher)) ** 0.5
    blocks = []
    for a, g in pairs:
        ratio = ((a.trace() / len(a)) / (g.trace() / len(g))) ** 0.5
        left = 0.3**0.5 * g + root / ratio * torch.eye(len(g), dtype=torch.float64)
        right = 0.3**0.5 * a + root * ratio * torch.eye(len(a), dtype=torch.float64)
        place = torch.arange(len(a) * len(g)).view(len(g), len(a))
        order = torch.cat([place[:, :-1].flatten(), place[:, -1]])  # weight, then bias
        blocks.append(torch.kron(left, right)[order][:, order])
    close(Candidate(fk.ExactFisher, kronecker=0.3), dense, dense.fisher + torch.block_diag(*blocks))


# -- other libraries in the influence experiments ----------------------------------------------------------------------


SHOWN, PEER_DAMPING = 20, 0.5
UNPROJECTED = {"dattri": partial(dattri_trak, None), "traker": partial(traker, None)}


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 6), nn.GELU(), nn.Linear(6, 3))


def data(count: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(count)
    return torch.randn(count, 5, generator=generator), torch.randint(3, (count,), generator=generator)


def installed(library: str) -> None:
    if library in peers.missing():
        pytest.skip(f"{library} is not installed")


@pytest.mark.parametrize("gone", peers.METHODS)
def test_peers__leave_out_what_is_not_installed(gone: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == peers.MODULES[gone] else object())
    assert peers.missing() == [gone]
    others = {name for library, own in peers.METHODS.items() if library != gone for name in own}
    assert set(peers.peers()) == others
    assert others <= set(methods())
    assert set(peers.UNDAMPED) <= {name for own in peers.METHODS.values() for name in own}


@pytest.mark.parametrize("library", UNPROJECTED)
def test_unprojected_trak__is_its_formula(library: str, model: nn.Module) -> None:
    installed(library)
    train, queries = data(SHOWN), data(4)

    def rows(pair: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Gradients of the margin, and 1 − p."""
        found, wrong = [], []
        for x, y in zip(*pair, strict=True):
            p = model(x).softmax(0)[y]
            grads = torch.autograd.grad((p / (1 - p)).log(), list(model.parameters()))
            found.append(torch.cat([g.flatten() for g in grads]))
            wrong.append(1 - p.detach())
        return torch.stack(found).double(), torch.stack(wrong).double()

    (j, r), (q, s) = rows(train), rows(queries)
    damping = PEER_DAMPING * j.square().sum() / j.shape[1]
    inverse = torch.linalg.inv(j.mT @ j + damping * torch.eye(j.shape[1], dtype=torch.float64))
    expected = s[:, None] * (q @ inverse @ j.mT) * r
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = UNPROJECTED[library](model, train)(queries, PEER_DAMPING).double()
    # A library may choose its scale.
    torch.testing.assert_close(found / found.norm(), expected / expected.norm(), rtol=1e-3, atol=1e-5)
    assert (found * expected).sum() > 0
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("library", UNPROJECTED)
def test_unprojected_trak__is_nearly_ief(library: str, model: nn.Module) -> None:
    """Its rows are the gradients over 1 − p, the improved empirical Fisher's over their norm, up to √2 times that."""
    installed(library)
    train, queries = data(SHOWN), data(4)
    fisher = fk.ImprovedEmpiricalFisher(model, train, structure="full")
    relative = fk.RelativeDamping(PEER_DAMPING)
    ours = fk.influence.InfluenceScores(fisher, model, likelihood="categorical", examples=SHOWN, damping=relative)
    found = UNPROJECTED[library](model, train)(queries, PEER_DAMPING)
    both = torch.stack([found.flatten().double(), ours.scores(queries, train).flatten().double()])
    assert torch.corrcoef(both)[0, 1] > 0.98


@pytest.mark.parametrize("name", [name for own in peers.METHODS.values() for name in own])
def test_peers__score_every_pair_and_keep_the_model(name: str, model: nn.Module) -> None:
    found: Method | None = peers.peers().get(name)
    if found is None:
        pytest.skip("not installed")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    scorer = found(model, data(SHOWN))
    damping = None if name in peers.UNDAMPED else PEER_DAMPING
    scores = scorer(data(4), damping)
    assert scores.shape == (4, SHOWN)
    if "dimensions" not in name:  # more than examples: singular
        assert torch.isfinite(scores).all()
        with pytest.raises(ValueError, match="damping"):
            scorer(data(4), None if damping else PEER_DAMPING)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_seed_of__depends_on_the_parameters(model: nn.Module) -> None:
    first = seed_of(model)
    assert seed_of(model) == first
    with torch.no_grad():
        next(model.parameters()).mul_(2)
    assert seed_of(model) != first


def test_needed__refuses_none() -> None:
    assert needed(0.5) == 0.5
    with pytest.raises(ValueError, match="needs a damping"):
        needed(None)
