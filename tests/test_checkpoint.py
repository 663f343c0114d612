"""A solve that is interrupted and called again goes on from its last iterate; no file is taken for another's."""

import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import fisherkit as fk
from fisherkit import io
from fisherkit.errors import FileFormatError, InvalidArgumentError, InvalidTypeError, NotConvergedWarning
from fisherkit.operators import unwrap
from fisherkit.solvers import SolveInfo, conjugate_gradient
from tests.small_data import DATASET, X, Y, cut, mlp, normal
from tests.snapshot import untouched

D = 60
DAMPING = 1e-3


class Interrupted:
    """A product that is interrupted, as by Ctrl-C, at its k-th call, counted from 1."""

    def __init__(self, matrix: Tensor, at: int = 0, error: type[BaseException] = KeyboardInterrupt) -> None:
        self.matrix, self.at, self.error, self.calls = matrix, at, error, 0

    def __call__(self, columns: Tensor) -> Tensor:
        self.calls += 1
        if self.calls == self.at:
            raise self.error
        return self.matrix @ columns


def matrix(dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    basis = torch.linalg.qr(normal(D, D, seed=seed)).Q
    return ((basis * torch.logspace(0, -4, D, dtype=torch.float64)) @ basis.T).to(dtype)


def right_hand_side(columns: int = 3, dtype: torch.dtype = torch.float64) -> Tensor:
    return (normal(D, columns, seed=1) * torch.logspace(0, 6, columns)).to(dtype)


def solve(
    a: Tensor | Callable[[Tensor], Tensor], rhs: Tensor, path: Path | None = None, **options: Any
) -> tuple[Tensor, SolveInfo]:
    product = Interrupted(a) if isinstance(a, Tensor) else a
    tolerance = 1e-10 if rhs.dtype == torch.float64 else 1e-4
    return conjugate_gradient(product, rhs, checkpoint=path, **{"damping": DAMPING, "tolerance": tolerance, **options})


def same(a: tuple[Tensor, SolveInfo], b: tuple[Tensor, SolveInfo]) -> None:
    assert torch.equal(a[0], b[0])
    assert torch.equal(a[1].residual, b[1].residual)
    assert (a[1].steps, a[1].converged, a[1].damping) == (b[1].steps, b[1].converged, b[1].damping)


def solved(found: tuple[Tensor, SolveInfo], a: Tensor, rhs: Tensor, damping: float = DAMPING) -> None:
    x, info = found
    wanted = torch.linalg.solve(a.double() + damping * torch.eye(D, dtype=torch.float64), rhs.double())
    tolerance = 1e-10 if rhs.dtype == torch.float64 else 1e-4
    assert info.converged
    assert (info.residual <= tolerance).all()
    error = (x.double() - wanted).norm(dim=0) / wanted.norm(dim=0)
    assert (error <= 1.01 * tolerance * (1 + damping) / damping).all()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "solve.safetensors"


@pytest.fixture(autouse=True)
def no_part_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr("fisherkit.solvers.EVERY", 0.0)
    yield
    assert [p.name for p in tmp_path.iterdir() if p.suffix == ".part"] == []


# -- going on ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("columns", [1, 3])
@pytest.mark.parametrize("every", [0, 1e9], ids=["each step", "only when interrupted"])
def test_resumed__goes_on_from_the_last_iterate(
    path: Path, dtype: torch.dtype, columns: int, every: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fisherkit.solvers.EVERY", every)
    a, rhs = matrix(dtype), right_hand_side(columns, dtype)
    uninterrupted, spent, energies = Interrupted(a), 0, []
    solve(uninterrupted, rhs, damping=1e-2)
    wanted = torch.linalg.solve(a + 1e-2 * torch.eye(D, dtype=dtype), rhs)
    for at in (2, 9, 17):
        with pytest.raises(KeyboardInterrupt):
            solve(Interrupted(a, at), rhs, path, damping=1e-2)
        spent += at
        with safe_open(path, framework="pt") as file:
            error = file.get_tensor("solution") * rhs.abs().amax(0) - wanted
            assert json.loads(file.metadata()["numbers"])["products"] == [0, 7, 21][len(energies)]
        energies.append((error * (a @ error + 1e-2 * error)).sum(0) / (wanted * rhs).sum(0))
    assert (energies[0] > energies[1]).all()
    assert (energies[1] > 2 * energies[2]).all()
    rest = Interrupted(a)
    found = solve(rest, rhs, path, damping=1e-2)
    solved(found, a, rhs, 1e-2)
    # A call recognises the matrix and computes a true residual; new search directions cost some steps.
    assert rest.calls < uninterrupted.calls
    assert spent + rest.calls <= 1.6 * uninterrupted.calls + 9
    assert found[1].steps == 21 + rest.calls - 3


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError, MemoryError, SystemExit])
def test_resumed__after_any_exception_which_comes_out_as_it_is(path: Path, error: type[BaseException]) -> None:
    a, rhs = matrix(), right_hand_side()
    with pytest.raises(error):
        solve(Interrupted(a, 12, error), rhs, path)
    solved(solve(a, rhs, path), a, rhs)


def test_resumed__at_every_few_products(path: Path) -> None:
    a, rhs = matrix(), right_hand_side(2)
    found, calls = None, 0
    while found is None:
        calls += 1
        try:
            # One product recognises the matrix, one is a true residual, five are steps, the eighth is interrupted.
            found = solve(Interrupted(a, 8), rhs, path, damping=1e-1)
        except KeyboardInterrupt:
            assert calls < 100, "no call gets any further"
    solved(found, a, rhs, 1e-1)


def test_resumed__with_preconditioner(path: Path) -> None:
    a, rhs = matrix(), right_hand_side()
    scale = (1 / (a.diagonal() + DAMPING)).unsqueeze(1)
    options: dict[str, Any] = {"preconditioner": lambda r: scale * r}
    with pytest.raises(KeyboardInterrupt):
        solve(Interrupted(a, 12), rhs, path, **options)
    solved(solve(a, rhs, path, **options), a, rhs)


def test_resumed__steps_that_ran_out_go_on_with_more(path: Path) -> None:
    a, rhs = matrix(), right_hand_side()
    with pytest.warns(NotConvergedWarning, match="max_steps=9 ran out"):
        short = solve(a, rhs, path, max_steps=9)
    again = Interrupted(a)
    with pytest.warns(NotConvergedWarning, match="max_steps=9 ran out"):
        same(solve(again, rhs, path, max_steps=9), short)
    assert again.calls == 2
    solved(solve(a, rhs, path), a, rhs)


def test_resumed__for_a_smaller_tolerance_goes_on(path: Path) -> None:
    a, rhs = matrix(), right_hand_side()
    _, rough = solve(a, rhs, path, tolerance=1e-2)
    rest = Interrupted(a)
    x, info = solve(rest, rhs, path, tolerance=1e-9)
    assert info.converged
    assert info.steps > rough.steps
    assert (info.residual <= 1e-9).all()
    torch.testing.assert_close(x, torch.linalg.solve(a + DAMPING * torch.eye(D), rhs), rtol=1e-5, atol=1e-5)


def test_finished__returns_at_once(path: Path) -> None:
    a, rhs = matrix(), right_hand_side()
    done = solve(a, rhs, path)
    again = Interrupted(a)
    same(solve(again, rhs, path), done)
    assert again.calls == 2


def test_finished__without_reaching_the_tolerance_tries_once_more_and_warns(path: Path) -> None:
    rhs = right_hand_side()
    for calls in (None, 3):
        product = Interrupted(torch.zeros(D, D, dtype=torch.float64))
        with pytest.warns(NotConvergedWarning, match="not in the range"):
            solve(product, rhs, path, damping=0.0)
        assert calls is None or product.calls == calls


def test_checkpoint__changes_no_result(path: Path) -> None:
    a, rhs = matrix(), right_hand_side()
    same(solve(a, rhs, path), solve(a, rhs))


def test_checkpoint__is_written_no_more_often_than_asked(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now, written = 0.0, []
    monkeypatch.setattr("fisherkit.solvers.EVERY", 60.0)
    monkeypatch.setattr("fisherkit.solvers.time.monotonic", lambda: now)
    replace = io.replace_checked_file
    monkeypatch.setattr(io, "replace_checked_file", lambda *args: (written.append(now), replace(*args)))
    a = matrix()

    def slow(columns: Tensor) -> Tensor:
        nonlocal now
        now += 10
        return a @ columns

    _, info = solve(slow, right_hand_side(), path)
    steps = info.steps
    # The first, the last of a recursion, and one a minute.
    assert 2 + 10 * steps / 70 - 1 <= len(written) <= 3 + 10 * steps / 60
    assert all(later - earlier >= 60 for earlier, later in itertools.pairwise(written[:-1]))


# -- what is refused, and left as it is --------------------------------------------------------------------------------

OTHERS: dict[str, tuple[dict[str, Any], str]] = {
    "right-hand side": ({"rhs": right_hand_side() + 1e-5}, "with another right-hand side"),
    "scaled right-hand side": ({"rhs": right_hand_side() * 2}, "with another right-hand side"),
    "swapped columns": ({"rhs": right_hand_side().flip(1)}, "with another right-hand side"),
    "columns": ({"rhs": right_hand_side()[:, :2]}, r"with shape = \[60, 3\]; expected .* shape = \[60, 2\]"),
    "damping": ({"damping": 2 * DAMPING}, r"with damping = 0.001; expected .* damping = 0.002"),
    "dtype": ({"rhs": right_hand_side().float(), "a": matrix().float()}, "with dtype = torch.float64"),
    "matrix": ({"a": matrix(seed=3)}, "with another matrix"),
    "slightly other matrix": ({"a": matrix() * (1 + 1e-6)}, "with another matrix"),
}


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("finished", [False, True])
def test_other_problem__is_refused_and_its_file_kept(path: Path, name: str, finished: bool) -> None:
    if finished:
        solve(matrix(), right_hand_side(), path)
    else:
        with pytest.raises(KeyboardInterrupt):
            solve(Interrupted(matrix(), 8), right_hand_side(), path)
    before = path.read_bytes()
    changed, message = OTHERS[name]
    arguments: dict[str, Any] = {"a": matrix(), "rhs": right_hand_side(), **changed}
    with pytest.raises(InvalidArgumentError, match=message) as caught:
        solve(path=path, **arguments)
    assert all(part in str(caught.value) for part in (str(path), "left as it is", "Try: another path"))
    assert path.read_bytes() == before


def test_rounding__is_not_another_problem(path: Path) -> None:
    """Gradients and products computed again, with other threads or on another device, differ in their last digits."""
    a, rhs = matrix(), right_hand_side()
    with pytest.raises(KeyboardInterrupt):
        solve(Interrupted(a, 12), rhs, path)
    noise = 1 + 1e-13 * normal(D, 1, seed=9)
    nearly = a * noise * noise.T
    x, info = solve(nearly, rhs * noise, path, damping=DAMPING * (1 + 1e-14))
    assert info.converged
    torch.testing.assert_close(x, solve(a, rhs)[0], rtol=1e-6, atol=1e-6)


def damaged(path: Path) -> None:
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])


def foreign(path: Path) -> None:
    save_file({"a": torch.zeros(3)}, path)


def fisher(path: Path) -> None:
    path.unlink()
    fk.EmpiricalFisher(mlp(), (X, Y), structure="diagonal").save(path)


def rewritten(change: Callable[[dict[str, str], dict[str, Tensor]], object]) -> Callable[[Path], None]:
    """A change of a file without checksums, or nothing but these would be found."""

    def damage(path: Path) -> None:
        with safe_open(path, framework="pt") as file:
            header, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        del header["checksum"], header["checksums"]
        change(header, tensors)
        save_file(tensors, path, metadata=header)

    return damage


BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "cut": (damaged, "cannot be read"),
    "text": (lambda path: path.write_text("not yours"), "cannot be read"),
    "empty": (lambda path: path.write_bytes(b""), "cannot be read"),
    "foreign": (foreign, "a file of another kind"),
    "a Fisher": (fisher, "a file of another kind"),
    "newer": (rewritten(lambda h, _: h.update(version="99")), "format version 99; expected version 2"),
    "no numbers": (rewritten(lambda h, _: h.update(numbers="{}")), "cannot be read"),
    "bad numbers": (rewritten(lambda h, _: h.update(numbers="]")), "cannot be read"),
    "older": (rewritten(lambda h, _: h.update(version="1")), "format version 1; expected version 2.*delete the file"),
    "a number that is none": (rewritten(lambda h, _: h.update(numbers='{"steps": true, "products": 1}')), "be read"),
    "no solution": (rewritten(lambda _, t: t.pop("solution")), "cannot be read"),
    "no right-hand side": (rewritten(lambda _, t: t.pop("right-hand side")), "cannot be read"),
    "a part of a solution": (rewritten(lambda _, t: t.update(solution=t["solution"][1:])), "cannot be read"),
    "another dtype": (rewritten(lambda _, t: t.update(solution=t["solution"].float())), "cannot be read"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_file__is_refused_and_kept(path: Path, name: str) -> None:
    break_it, message = BROKEN[name]
    with pytest.raises(KeyboardInterrupt):
        solve(Interrupted(matrix(), 8), right_hand_side(), path)
    break_it(path)
    before = path.read_bytes()
    with pytest.raises(FileFormatError, match=message):
        solve(matrix(), right_hand_side(), path)
    assert path.read_bytes() == before


def test_interrupted_writing__leaves_the_last_file(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    a, rhs = matrix(), right_hand_side()
    with pytest.raises(KeyboardInterrupt):
        solve(Interrupted(a, 8), rhs, path)
    before = path.read_bytes()

    def half(part: Path, *_: Any) -> None:
        part.write_bytes(before[:100])
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("fisherkit.io.tensors._lay_out", half)
        with pytest.raises(OSError, match="No space left"):
            solve(a, rhs, path)
    assert path.read_bytes() == before
    solved(solve(a, rhs, path), a, rhs)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"path": Path("nowhere") / "solve"}, InvalidArgumentError, "a folder that does not exist"),
        ({"path": Path()}, InvalidArgumentError, "got a folder; expected a file's name"),
        ({"path": 3}, InvalidTypeError, "got an int; expected the path of a file"),
    ],
)
def test_bad_argument__is_refused_before_any_product(
    options: dict[str, Any], error: type[Exception], message: str
) -> None:
    product = Interrupted(matrix())
    with pytest.raises(error, match=message):
        solve(product, right_hand_side(), **options)
    assert product.calls == 0


def test_file__holds_no_code_and_says_what_it_is(path: Path) -> None:
    solve(matrix(), right_hand_side(), path)
    with safe_open(path, framework="pt") as file:
        header = file.metadata()
    assert header["format"] == "fisherkit-solve"
    assert json.loads(header["settings"]) == {"shape": [D, 3], "dtype": "torch.float64", "damping": DAMPING}
    with pytest.raises(FileFormatError, match="another kind"):
        fk.load(path)


# -- solves of Fishers -------------------------------------------------------------------------------------------------


class Interrupting(Dataset[tuple[Tensor, Tensor]]):
    """Seven examples; reading is interrupted at the given place."""

    def __init__(self, at: int = 0) -> None:
        self.at, self.read = at, 0

    def __len__(self) -> int:
        return len(X)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        self.read += 1
        if self.read == self.at:
            raise KeyboardInterrupt
        return DATASET[index]


KINDS: dict[str, Callable[..., fk.FisherApproximation]] = {
    "rows made again": fk.ImprovedEmpiricalFisher,
    "matrix-free": lambda *args, **options: fk.ExactFisher(*args, **options, likelihood="categorical"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_streamed__interrupted_in_a_product_leaves_the_model_and_resumes(path: Path, kind: str) -> None:
    model, dataset = mlp(), Interrupting()
    loader = DataLoader(dataset, 2)
    streamed = KINDS[kind](model, loader, memory_budget=1)
    v = normal(streamed.size, seed=5)
    expected = streamed.solve(v, 0.01, return_info=True)
    for step in (3, 6):
        dataset.read, dataset.at = 0, step * len(X) + 4
        with untouched(model, loader), pytest.raises(KeyboardInterrupt):
            streamed.solve(v, 0.01, checkpoint=path)
    resumed = streamed.solve(v, 0.01, checkpoint=path, return_info=True)
    assert resumed[1].converged
    torch.testing.assert_close(resumed[0], expected[0], rtol=1e-3, atol=1e-3)

    # Another process: a new Fisher of the same model and data goes on from the file, one of another model does not.
    same(KINDS[kind](mlp(), loader, memory_budget=1).solve(v, 0.01, checkpoint=path, return_info=True), resumed)
    with torch.no_grad():
        next(model.parameters()).mul_(1.01)
    with pytest.raises(InvalidArgumentError, match="another matrix"):
        KINDS[kind](model, loader, memory_budget=1).solve(v, 0.01, checkpoint=path)
    with pytest.raises(InvalidArgumentError, match="another right-hand side"):
        streamed.solve(2 * v, 0.01, checkpoint=path)


def test_solve__of_a_sum_resumes_for_dicts_and_columns(path: Path) -> None:
    model = mlp()
    total = fk.EmpiricalFisher(model, (X, Y), structure="kfac") + fk.ExactFisher(model, (X, Y), structure="ekfac")
    v = normal(total.size, 2, seed=5)
    as_dict = total.space.unflatten(v)
    with pytest.warns(NotConvergedWarning):
        total.solve(as_dict, 0.1, checkpoint=str(path), max_steps=3)
    resumed = total.solve(as_dict, 0.1, checkpoint=str(path))
    torch.testing.assert_close(total.space.flatten(resumed), total.solve(v, 0.1), rtol=1e-4, atol=1e-4)


def test_solve__with_relative_damping_resumes(path: Path) -> None:
    streamed = fk.EmpiricalFisher(mlp(), cut(3, 4), memory_budget=1)
    v, damping = normal(streamed.size, seed=5), fk.RelativeDamping(0.1)
    with pytest.warns(NotConvergedWarning):
        streamed.solve(v, damping, checkpoint=path, max_steps=2)
    torch.testing.assert_close(
        streamed.solve(v, damping, checkpoint=path), streamed.solve(v, damping), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("structure", ["full", "block", "diagonal", "kfac", "ekfac"])
def test_direct_solve__neither_reads_nor_writes_the_file(path: Path, structure: str) -> None:
    direct = fk.EmpiricalFisher(mlp(), (X, Y), structure=structure)
    v = normal(direct.size, seed=5)
    assert torch.equal(direct.solve(v, 0.1, checkpoint=path, progress=True), direct.solve(v, 0.1))
    assert not path.exists()
    path.write_text("somebody's")
    direct.solve(v, 0.1, checkpoint=path)
    assert path.read_text() == "somebody's"


def test_block__whose_blocks_are_solved_iteratively_has_a_file_for_each(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(4, 30), nn.Tanh(), nn.Linear(30, 3)).double()
    # Rows fit, their Gram matrices do not.
    rows = fk.EmpiricalFisher(model, (X, Y), structure="block", memory_budget=1 << 20)
    for block in unwrap(rows).blocks:  # type: ignore[attr-defined]
        block.memory_budget = 1
    v = normal(rows.size, seed=5)
    expected = rows.solve(v, 0.1)
    assert torch.equal(rows.solve(v, 0.1, checkpoint=tmp_path / "solve.safetensors"), expected)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["solve.0.safetensors", "solve.1.safetensors"]


def test_progress__shows_residual_and_where_it_goes_on(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, rhs = matrix(), right_hand_side()
    with pytest.raises(KeyboardInterrupt):
        solve(Interrupted(a, 12), rhs, path, max_steps=200)
    solve(a, rhs, path, max_steps=200, progress=True)
    captured = capsys.readouterr()
    assert not captured.out
    assert " 10/200 " in captured.err
    assert "residual=" in captured.err
    streamed = fk.EmpiricalFisher(mlp(), cut(3, 4), memory_budget=1)
    streamed.solve(normal(streamed.size, seed=5), 0.1, progress=True)
    assert "residual=" in capsys.readouterr().err
