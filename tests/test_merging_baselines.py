"""Baselines of merging, merging layer by layer, and the line search between two models."""

import copy
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import fisherkit as fk
from tests.snapshot import of_model
from tests.test_merging_policies import normed, state

merging = fk.merging
F64 = torch.float64


def trained() -> tuple[list[nn.Module], list[tuple[Tensor, Tensor]]]:
    torch.manual_seed(0)
    models = [
        nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3, bias=False), nn.LayerNorm(3)).double()
        for _ in range(3)
    ]
    data = [(torch.randn(n, 5, dtype=F64), torch.randint(3, (n,))) for n in (9, 12, 20)]
    return models, data


def test_average__weighs_every_parameter() -> None:
    a, b = state(0), state(1)
    result, info = merging.average([a, b], [1, 3], return_info=True)
    assert all(torch.allclose(result[name], (a[name] + 3 * b[name]) / 4) for name in a)
    assert info.names == {"w": "averaged", "b": "averaged"}
    assert info.weights == (1.0, 3.0)


def test_task_arithmetic__adds_scaled_task_vectors() -> None:
    base, a, b = state(0), state(1), state(2)
    result = merging.task_arithmetic([a, b], base, 0.3)
    assert all(torch.allclose(result[n], base[n] + 0.3 * (a[n] + b[n] - 2 * base[n]), atol=1e-6) for n in base)
    mean = merging.task_arithmetic([a, b], base, 0.5)
    assert all(torch.allclose(mean[n], tensor, atol=1e-6) for n, tensor in merging.average([a, b]).items())
    # Models that agree with each other and not with the base move away from it, as they must.
    far = merging.task_arithmetic([a, a], base, 1.0)
    assert all(torch.allclose(far[n], 2 * a[n] - base[n], atol=1e-6) for n in base)


def test_baselines__share_the_policies() -> None:
    models = [normed(0), normed(1)]
    for call in (
        lambda **settings: merging.average(models, **settings),
        lambda **settings: merging.task_arithmetic(models, normed(2), 0.4, **settings),
    ):
        with pytest.raises(fk.InvalidArgumentError, match=r"float buffers.*buffers=\"average\""):
            call()
        result = call(policy=fk.merging.MergePolicy(buffers="average", integers="first"))
        means = [m.state_dict()["1.running_mean"] for m in models]
        assert torch.allclose(result["1.running_mean"], sum(means) / 2)
    with pytest.raises(fk.InvalidArgumentError, match=r"'b' \(not in base\)"):
        merging.task_arithmetic([state(0), state(1)], {"w": torch.zeros(2, 3)}, 0.4)
    with pytest.raises(fk.InvalidTypeError, match="scale"):
        merging.task_arithmetic([state(0)], state(1), "0.4")  # type: ignore[arg-type]
    with pytest.raises(fk.InvalidArgumentError, match="scale"):
        merging.task_arithmetic([state(0)], state(1), float("nan"))


@pytest.mark.parametrize("shrink", [1.0, 0.9, 0.0])
@pytest.mark.parametrize("weights", [None, "examples"])
def test_regmean__is_the_least_squares_of_the_layers_outputs(shrink, weights) -> None:
    models, data = trained()
    fishers = [fk.EmpiricalFisher(m, d, structure="kfac") for m, d in zip(models, data, strict=True)]
    result, info = merging.regmean(models, fishers, weights, shrink=shrink, damping=0, return_info=True)
    for layer in (0, 2):
        left, right = torch.zeros(1), torch.zeros(1)
        for model, (x, _) in zip(models, data, strict=True):
            inputs = model[:layer](x)
            w = model[layer].weight.detach()
            if layer == 0:
                inputs, w = torch.cat([inputs, torch.ones(len(x), 1)], 1), torch.cat([w, model[0].bias[:, None]], 1)
            moment = (inputs.T @ inputs).detach() / (1 if weights else len(x))
            moment = shrink * moment + (1 - shrink) * moment.diagonal().diag()
            left, right = left + moment, right + moment @ w.T
        expected = torch.linalg.solve(left, right).T.detach()
        got = result[f"{layer}.weight"]
        got = torch.cat([got, result["0.bias"][:, None]], 1) if layer == 0 else got
        assert torch.allclose(got, expected, atol=1e-8)
    average = merging.average(models)
    assert torch.equal(result["3.weight"], average["3.weight"])
    assert info.names["3.bias"] in ("averaged", "equal")
    assert info.method == "regmean"
    assert info.converged


def test_regmean__is_the_merge_with_much_output_damping() -> None:
    models, data = trained()
    fishers = [fk.ExactFisher(m, d, structure="kfac") for m, d in zip(models, data, strict=True)]
    limit = merging.merge(models, fishers, normalize="output", output_damping=1e9, damping=0)
    result = merging.regmean(models, fishers, shrink=1.0, damping=0)
    for name in ("0.weight", "0.bias", "2.weight"):
        assert torch.allclose(limit[name], result[name], atol=1e-6)


def test_regmean__needs_kronecker_products() -> None:
    models, data = trained()
    fishers = [fk.EmpiricalFisher(m, d, structure="diagonal") for m, d in zip(models, data, strict=True)]
    with pytest.raises(fk.InvalidArgumentError, match=r'without a Kronecker product.*structure="kfac"'):
        merging.regmean(models, fishers)
    with pytest.raises(fk.InvalidArgumentError, match="shrink"):
        merging.regmean(models, fishers, shrink=1.5)


def test_regmean__names_itself_in_what_the_solver_refuses() -> None:
    models, data = trained()
    blind = [(x * torch.tensor([0.0, 1, 1, 1, 1], dtype=F64), y) for x, y in data]
    fishers = [fk.EmpiricalFisher(m, d, structure="kfac") for m, d in zip(models, blind, strict=True)]
    with pytest.raises(fk.SingularMatrixError, match=r"^regmean\(damping=0\): got a sum of Fishers"):
        merging.regmean(models, fishers, shrink=1.0, damping=0)
    with pytest.raises(fk.InvalidArgumentError, match=r"^regmean\(damping=-1\)"):
        merging.regmean(models, fishers, damping=-1)
    with pytest.raises(fk.NoClosedFormError, match=r"^EmpiricalFisher\.gram"):
        fishers[0].gram()


# -- `merge_layers` by its definition ----------------------------------------------------------------------------------


merge, merge_layers = fk.merging.merge, fk.merging.merge_layers


def trained_layers(count: int = 3, *, norm: bool = False) -> tuple[list[nn.Module], list[tuple[Tensor, Tensor]]]:
    torch.manual_seed(0)
    models: list[nn.Module] = []
    for _ in range(count):
        layers = [nn.Linear(5, 4), *([nn.BatchNorm1d(4)] if norm else []), nn.Tanh(), nn.Linear(4, 3)]
        models.append(nn.Sequential(*layers).double().eval())
    if norm:
        for model in models:
            model[1].running_mean += torch.randn(4)
    return models, [(torch.randn(n, 5, dtype=F64), torch.randint(3, (n,))) for n in (9, 12, 20)[:count]]


def regmean_plus_plus(models: list[nn.Module], data: list[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    """Layer after layer in loops: W of the least squares on the merged network's own features."""
    features, result = [x for x, _ in data], {}
    for place in (0, 2):
        left, right = 0.0, 0.0
        for model, x in zip(models, features, strict=True):
            x1 = torch.cat([x, torch.ones(len(x), 1, dtype=F64)], 1)
            own = torch.cat([model[place].weight, model[place].bias.unsqueeze(1)], 1).detach()
            left, right = left + x1.T @ x1 / len(x), right + own @ (x1.T @ x1) / len(x)
        solution = torch.linalg.solve(left, right.T).T
        result |= {f"{place}.weight": solution[:, :-1], f"{place}.bias": solution[:, -1]}
        features = [torch.tanh(x @ solution[:, :-1].T + solution[:, -1]) for x in features]
    return result


def test_merge_layers__of_activations_alone_is_regmean_plus_plus() -> None:
    models, data = trained_layers()
    found = merge_layers(models, data, normalize="output", output_damping=1e9, damping=1e-12)
    for name, tensor in regmean_plus_plus(models, data).items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("structure", ["diagonal", "block", "kfac"])
def test_merge_layers__measures_each_stage_where_the_earlier_ones_are_merged(structure: str) -> None:
    models, data = trained_layers()
    fisher = partial(fk.EmpiricalFisher, structure=structure)
    settings = {"output_damping": 0.5, "damping": 0.1}
    first = merge(
        [{n: p for n, p in m.state_dict().items() if n.startswith("0")} for m in models],
        [fisher(m, own, params=["0.weight", "0.bias"]) for m, own in zip(models, data, strict=True)], **settings,
    )  # fmt: skip
    between = copy.deepcopy(models)
    for model in between:
        model.load_state_dict(first, strict=False)
    last = merge(
        [{n: p for n, p in m.state_dict().items() if n.startswith("2")} for m in models],
        [fisher(m, own, params=["2.weight", "2.bias"]) for m, own in zip(between, data, strict=True)], **settings,
    )  # fmt: skip
    before = [of_model(model) for model in models]
    found, info = merge_layers(models, data, fisher=fisher, return_info=True, **settings)
    assert all(torch.equal(found[name], tensor) for name, tensor in {**first, **last}.items())
    assert {name for block in info.blocks for name in block.names} == set(found)
    assert info.damping == 0.1
    assert [of_model(model) for model in models] == before


def test_merge_layers__stages_buffers_and_the_rest_are_by_policy() -> None:
    models, data = trained_layers(2, norm=True)
    with pytest.raises(fk.InvalidArgumentError, match=r"buffers.*'1.running_mean'"):
        merge_layers(models, data)
    policy = fk.merging.MergePolicy(buffers="average", uncovered="average")
    found, info = merge_layers(models, data, stages=[["3.weight", "3.bias"]], policy=policy, return_info=True)
    assert info.names["1.running_mean"] == info.names["0.weight"] == "averaged"
    between = copy.deepcopy(models)
    for model in between:
        model.load_state_dict(
            {n: t for n, t in fk.merging.average(models, policy=policy).items() if n[0] != "3"}, strict=False
        )
    fishers = [
        fk.ImprovedEmpiricalFisher(m, own, structure="kfac", params=["3.weight", "3.bias"])
        for m, own in zip(between, data, strict=True)
    ]
    states = [{n: t for n, t in m.state_dict().items() if n[0] == "3"} for m in models]
    expected = merge(states, fishers, damping=fk.RelativeDamping(0.01), output_damping=3.0)
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor)


@pytest.mark.parametrize("word", ["skip", "first"])
def test_merge_layers__heads_of_different_labels_are_by_policy(word: str) -> None:
    models, data = trained_layers(2)
    torch.manual_seed(0)
    models[1][-1], data[1] = nn.Linear(4, 5).double(), (data[1][0], torch.randint(5, (len(data[1][0]),)))
    with pytest.raises(fk.InvalidArgumentError, match=r"mismatched.*'2.weight' \(shapes \[3, 4\], \[5, 4\]\)"):
        merge_layers(models, data)
    found = merge_layers(models, data, policy=fk.merging.MergePolicy(mismatched=word))
    ief = fk.ImprovedEmpiricalFisher
    fishers = [ief(m, d, structure="kfac", params="0.*") for m, d in zip(models, data, strict=True)]
    states = [{n: t for n, t in m.state_dict().items() if n[0] == "0"} for m in models]
    expected = merge(states, fishers, damping=fk.RelativeDamping(0.01), output_damping=3.0)
    assert set(found) == {*expected, *([] if word == "skip" else ["2.weight", "2.bias"])}
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, expected.get(name, models[0].state_dict()[name]))


def test_merge_layers__refuses_what_it_cannot_use(tmp_path) -> None:
    models, data = trained_layers(2)
    cases = [
        ((["a", "b"], data), {}, fk.InvalidTypeError, "no modules"),
        ((models[0], data), {}, fk.InvalidTypeError, "no modules"),
        ((models, data[:1]), {}, fk.InvalidArgumentError, "2 models and 1 data"),
        ((models, None), {}, fk.InvalidArgumentError, "2 models and a NoneType as data"),
        (
            (models, data),
            {"stages": [["0.bias"], ["x"]]},
            fk.InvalidArgumentError,
            "no trained parameter, or twice: 'x'",
        ),
        ((models, data), {"stages": [["0.bias"], ["0.bias"]]}, fk.InvalidArgumentError, "twice: '0.bias', '0.bias'"),
        ((models, data), {"stages": []}, fk.InvalidArgumentError, "no trained parameter"),
        ((models, data), {"stages": [["0.weight"]]}, fk.InvalidArgumentError, r"not every Fisher covers.*'0.bias'"),
        ((models, data), {"weights": [1.0]}, fk.InvalidArgumentError, "1 weights"),
        ((models, data), {"output_damping": -1}, fk.InvalidArgumentError, "merge_layers.*output_damping"),
        (
            ([nn.Linear(4, 1), nn.Linear(4, 1)], [(torch.randn(6, 4), torch.arange(6) % 2)] * 2),
            {},
            fk.DataError,
            r'fk.ImprovedEmpiricalFisher, structure="kfac", likelihood=...\), with likelihood="bern',
        ),
    ]
    for arguments, settings, error, text in cases:
        with pytest.raises(error, match=text):
            merge_layers(*arguments, **settings)
    path = merge_layers(models, data, out=tmp_path / "merged")
    assert path.name == "model.safetensors"


# -- `line_search` by its definition -----------------------------------------------------------------------------------


line_search = fk.merging.line_search
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
    with pytest.raises(fk.InvalidTypeError, match="line_search, model 2: got an int"):
        line_search(start, 3, squares(end))
    with pytest.raises(fk.InvalidArgumentError, match=r'line_search\(mismatched="refuse"\): got entries'):
        line_search(start, {}, squares(end))


def test_line_search__of_files_writes_a_file(tmp_path: Path) -> None:
    start, end = ends(torch.bfloat16)
    for name, own in (("a", start), ("b", end)):
        save_file(own, tmp_path / f"{name}.safetensors")
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
        ((start, end, lambda s: 1.0), {"shares": 0.5}, fk.InvalidTypeError, "a float as shares"),
        ((start, end, lambda s: 1.0), {"shares": ()}, fk.InvalidArgumentError, "at least one"),
        ((start, end, lambda s: 1.0), {"shares": (0, 1.5)}, fk.InvalidArgumentError, "from 0 to 1"),
        ((start, lone, lambda s: 1.0), {}, fk.InvalidArgumentError, "'b'"),
    ):
        with pytest.raises(error, match=text):
            line_search(*arguments, **settings)
