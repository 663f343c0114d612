"""`line_search` by its definition, in loops over entries; and that a checked merge is no worse than the average."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import fisherkit as fk

merging, line_search = fk.merging, fk.merging.line_search
F64 = torch.float64
State = dict[str, Tensor]


def ends(dtype: torch.dtype = F64) -> tuple[State, State]:
    g = torch.Generator().manual_seed(0)
    shapes = {"w": (3, 2), "b": (3,)}
    start, end = ({n: torch.randn(s, generator=g, dtype=F64).to(dtype) for n, s in shapes.items()} for _ in range(2))
    return start, end


def squares(target: State) -> Callable[[State], float]:
    """The squared distance to a point, entry by entry."""

    def loss(state: State) -> float:
        total = 0.0
        for name, tensor in state.items():
            for one, other in zip(tensor.flatten().tolist(), target[name].flatten().tolist(), strict=True):
                total += (one - other) ** 2
        return total

    return loss


def between(start: State, end: State, share: float) -> State:
    return {name: start[name] + share * (end[name] - start[name]) for name in start}


@pytest.mark.parametrize("place", [-1.0, 0.1, 0.3, 0.6, 0.7, 1.0, 3.0])
def test_line_search__finds_the_least_of_a_quadratic(place: float) -> None:
    start, end = ends()
    loss, shares = squares(between(start, end, place)), (0.0, 0.25, 0.5, 0.75, 1.0)
    expected = min(shares, key=lambda share: abs(share - place))
    found, info = line_search(start, end, loss, return_info=True)
    for name, tensor in between(start, end, expected).items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-14, atol=1e-15)
    assert info.method == "line_search"
    assert info.share == expected
    assert [share for share, _ in info.losses] == list(shares)
    assert str(info).endswith(f"; {expected:g} of the way of least loss {loss(found):.4g}")
    assert [value for _, value in info.losses] == pytest.approx([loss(between(start, end, s)) for s in shares])


def test_line_search__is_either_end_to_the_last_bit_and_of_equal_losses_the_first() -> None:
    start, end = ends()
    for target in (start, end):
        found = line_search(start, end, squares(target))
        assert all(torch.equal(found[name], tensor) for name, tensor in target.items())
    found = line_search(start, end, lambda state: 1.0)
    assert all(torch.equal(found[name], tensor) for name, tensor in start.items())


def test_line_search__losses_that_are_not_finite_are_the_largest() -> None:
    start, end = ends()
    losses = iter([math.nan, 3.0, math.inf, 2.0, math.nan])
    _, info = line_search(start, end, lambda state: torch.tensor([next(losses)]), return_info=True)
    assert info.share == 0.75
    with pytest.raises(fk.NonFiniteError, match=r"line_search: got losses \[nan, nan\]"):
        line_search(start, end, lambda state: math.nan, shares=(0, 1))


def test_line_search__errors_of_models_name_it() -> None:
    start, end = ends()
    with pytest.raises(fk.InvalidTypeError, match="line_search, model 2: got a int"):
        line_search(start, 3, squares(end))
    with pytest.raises(fk.InvalidArgumentError, match=r'line_search\(mismatched="refuse"\): got entries'):
        line_search(start, {}, squares(end))


def test_line_search__of_files_writes_a_file(tmp_path: Path) -> None:
    start, end = ends(torch.bfloat16)
    for name, state in (("a", start), ("b", end)):
        save_file(state, tmp_path / f"{name}.safetensors")
    loss = squares(between(start, end, 0.5))
    paths = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    path, info = line_search(*paths, loss, out=tmp_path / "c.safetensors", return_info=True)
    written, found = load_file(path), line_search(start, end, loss)
    assert info.share == 0.5
    assert all(torch.equal(written[name], found[name]) for name in found)
    assert all(tensor.dtype == torch.bfloat16 for tensor in written.values())


def test_line_search__a_loss_may_load_states_into_the_module_that_is_searched_from() -> None:
    torch.manual_seed(0)
    model, other = nn.Linear(2, 3).double(), nn.Linear(2, 3).double()
    start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    end, loss = other.state_dict(), squares(between(start, other.state_dict(), 0.25))

    def loads(state: State) -> float:
        model.load_state_dict(state)
        return loss(model.state_dict())

    found = line_search(model, end, loads)
    for name, tensor in line_search(start, end, loss).items():
        assert torch.equal(found[name], tensor)


def test_line_search__a_checked_merge_is_never_worse_than_the_average_on_what_it_is_checked_by() -> None:
    """Networks of other labels, merged by Fishers as they are: often below the average, by any of several draws."""
    below = 0
    for seed in range(6):
        torch.manual_seed(seed)
        x = torch.randn(80, 6, dtype=F64)
        y = (x @ torch.randn(6, 4, dtype=F64)).argmax(1)
        parts = [(x[y < 2], y[y < 2]), (x[y > 1], y[y > 1])]
        start = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4)).double()
        models = []
        for inputs, labels in parts:
            model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4)).double()
            model.load_state_dict(start.state_dict())
            optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
            for _ in range(60):
                optimizer.zero_grad()
                nn.functional.cross_entropy(model(inputs), labels).backward()
                optimizer.step()
            models.append(model)
        fishers = [fk.EmpiricalFisher(m, part, structure="kfac") for m, part in zip(models, parts, strict=True)]
        merged = merging.merge(models, fishers, output_damping=0, normalize=None)

        def loss(state: State, x: Tensor = x, y: Tensor = y, model: nn.Module = start) -> Tensor:
            model.load_state_dict(state)
            with torch.no_grad():
                return nn.functional.cross_entropy(model(x), y)

        average = merging.average(models)
        checked = line_search(average, merged, loss)
        below += bool(loss(merged) > loss(average))
        assert loss(checked) <= min(loss(average), loss(merged))
    assert below > 0


def test_line_search__refuses_what_it_cannot_use() -> None:
    start, end = ends()
    lone = {"w": end["w"]}
    for arguments, settings, error, text in (
        ((start, end, 1.0), {}, fk.InvalidTypeError, "loss of type float"),
        ((start, end, lambda s: "low"), {}, fk.InvalidTypeError, "a loss that returns 'low'"),
        ((start, end, lambda s: s["w"]), {}, fk.InvalidTypeError, "a loss that returns tensor"),
        ((start, end, lambda s: 1.0), {"shares": 0.5}, fk.InvalidTypeError, "shares of type float"),
        ((start, end, lambda s: 1.0), {"shares": ()}, fk.InvalidArgumentError, "at least one"),
        ((start, end, lambda s: 1.0), {"shares": (0, 1.5)}, fk.InvalidArgumentError, "from 0 to 1"),
        ((start, lone, lambda s: 1.0), {}, fk.InvalidArgumentError, "'b'"),
    ):
        with pytest.raises(error, match=text):
            line_search(*arguments, **settings)
