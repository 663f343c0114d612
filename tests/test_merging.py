"""Merging against one dense system, for every structure, method and setting; and the theorems it must obey."""

import copy
import functools

import pytest
import torch
from torch import Tensor, nn

import fisherkit as fk
from fisherkit.merging import MergePolicy, blocks
from fisherkit.operators import DiagonalOperator, KroneckerOperator, kronecker_sum
from tests import by_hand
from tests import merging_cases as mc
from tests import operator_cases as oc
from tests.merging_cases import F64

merge = functools.partial(fk.merging.merge, normalize="trace", output_damping=0.0)
STRUCTURES = [pytest.param(make, id=name) for name, make in mc.STRUCTURES.items()]


def check(result: dict[str, Tensor], expected: Tensor, space: fk.ParameterSpace, tolerance: float = 1e-9) -> None:
    got = mc.flat(result, space)
    assert float((got - expected).norm() / expected.norm()) < tolerance


@pytest.mark.parametrize("method", ["auto", "direct", "cg"])
@pytest.mark.parametrize("make", STRUCTURES)
def test_merge__is_the_minimiser_of_the_dense_problem(make, method) -> None:
    pairs = make()
    space = pairs[0][0].space
    models, weights = mc.states(space, len(pairs)), [0.3, 0.7, 1.1][: len(pairs)]
    for damping in (0.0, 1e-3):
        expected = mc.brute_force(models, mc.matrices(pairs), space, weights, damping)
        result, info = merge(
            models, mc.operators(pairs), weights, damping=damping, normalize=None, policy=MergePolicy(method=method),
            return_info=True,
        )  # fmt: skip
        check(result, expected, space)
        assert info.converged
        assert info.residual <= 1e-12
        assert sum(block.size for block in info.blocks) == space.size


@pytest.mark.parametrize("normalize", ["trace", "norm", None])
@pytest.mark.parametrize("name", ["diagonal", "dense", "kronecker", "eigen_kronecker", "block_diagonal"])
def test_merge__normalizes_and_damps_relative_to_the_mean_eigenvalue(name, normalize) -> None:
    pairs = mc.STRUCTURES[name]()
    pairs = [(1e4 * pairs[0][0], 1e4 * pairs[0][1]), *pairs[1:]]
    space, weights = pairs[0][0].space, [0.25, 0.75]
    models = mc.states(space, 2)
    dense = [mc.normalized(matrix, normalize) for matrix in mc.matrices(pairs)]
    damping = 0.05 * float(sum(w * m.trace() for w, m in zip(weights, dense, strict=True))) / space.size
    expected = mc.brute_force(models, dense, space, weights, damping)
    result, info = merge(
        models, mc.operators(pairs), weights, damping=fk.RelativeDamping(0.05), normalize=normalize, return_info=True
    )
    check(result, expected, space, 1e-8)
    assert info.damping == pytest.approx(damping)
    assert info.normalize == normalize


def test_merge__block_and_output_normalize_each_block() -> None:
    pairs = mc.STRUCTURES["block_diagonal"]()
    space = pairs[0][0].space
    models = mc.states(space, 2)
    _, info = merge(models, mc.operators(pairs), normalize="block", return_info=True)
    for block in info.blocks:
        for factor, (operator, _) in zip(block.factors, pairs, strict=True):
            part = next(p for p in fk.operators.split(operator) if p.space.names == block.names)
            assert factor == pytest.approx(0.5 * block.size / float(part.trace()))
    layers = mc.STRUCTURES["kronecker"]()
    _, info = merge(mc.states(oc.LAYER, 2), mc.operators(layers), normalize="output", return_info=True)
    for factor, operator in zip(info.blocks[0].factors, mc.operators(layers), strict=True):
        assert factor == pytest.approx(0.5 / float(operator.gradient.diagonal().mean()))


@pytest.mark.parametrize("ratio", [0.5, 1.0, 100.0])
@pytest.mark.parametrize("name", ["diagonal", "dense", "kronecker", "kronecker_transposed", "eigen_kronecker", "sum"])
def test_merge__output_damping_mixes_in_the_average_over_outputs(name, ratio) -> None:
    pairs = mc.STRUCTURES[name]()
    space, transposed = pairs[0][0].space, name == "kronecker_transposed"
    models = mc.states(space, 2)
    mixed = [(m + ratio * mc.averaged(m, 4, 3, True, transposed)) / (1 + ratio) for m in mc.matrices(pairs)]
    expected = mc.brute_force(models, mixed, space, [0.5, 0.5], 1e-3)
    result = merge(models, mc.operators(pairs), damping=1e-3, normalize=None, output_damping=ratio)
    check(result, expected, space)


def _ratio_of_outputs(matrix: torch.Tensor) -> float:
    """O tr(G²) / tr(G)² of a layer's matrix over its weight [3, 4] and bias [3], by the sum over inputs."""
    places = torch.cat([torch.arange(12).reshape(3, 4), torch.arange(12, 15).reshape(3, 1)], 1)
    partial = sum(matrix[own][:, own] for own in places.mT)
    return 3 * float(partial.square().sum()) / float(partial.trace()) ** 2


@pytest.mark.parametrize("name", ["kronecker", "three_kroneckers"])
def test_merge__default_output_damping_is_of_each_gradient_factor(name: str) -> None:
    pairs = mc.STRUCTURES[name]()
    space, count = pairs[0][0].space, len(pairs)
    models, mixed = mc.states(space, count), []
    for matrix in mc.matrices(pairs):
        ratio = _ratio_of_outputs(matrix)
        mixed.append((matrix + ratio * mc.averaged(matrix, 4, 3, True, False)) / (1 + ratio))
    result = merge(models, mc.operators(pairs), damping=1e-3, normalize=None, output_damping=None)
    check(result, mc.brute_force(models, mixed, space, [1 / count] * count, 1e-3), space)


def test_merge__default_output_damping_is_3_without_gradient_factors() -> None:
    pairs = mc.STRUCTURES["diagonal"]()
    models = mc.states(pairs[0][0].space, 2)
    result, three = (merge(models, mc.operators(pairs), output_damping=ratio) for ratio in (None, 3.0))
    assert all(torch.equal(result[name], three[name]) for name in result)


@pytest.mark.parametrize("center", ["average", "other"])
@pytest.mark.parametrize("name", ["kronecker", "kronecker_transposed", "eigen_kronecker"])
def test_merge__says_how_far_outputs_move_beside_the_plain_average(name, center) -> None:
    pairs = mc.STRUCTURES[name]()
    space, transposed = pairs[0][0].space, name == "kronecker_transposed"
    models, weights = mc.states(space, 2), [0.6, 1.4]  # which do not sum to one
    where = "average" if center == "average" else mc.states(space, 1, seed=7)[0]
    result, info = merge(models, mc.operators(pairs), weights, damping=0.5, center=where, return_info=True)
    mean = sum(w / 2 * mc.flat(model, space) for w, model in zip(weights, models, strict=True))
    for model, matrix, ratio in zip(models, mc.matrices(pairs), info.blocks[0].against_average, strict=True):
        metric = mc.averaged(matrix, 4, 3, True, transposed)
        a, b = mc.flat(result, space) - mc.flat(model, space), mean - mc.flat(model, space)
        assert ratio == pytest.approx(float(a @ metric @ a) / float(b @ metric @ b), rel=1e-9)
    assert info.blocks[0].worst == max(info.blocks[0].against_average)


def test_against_average__is_large_where_the_plain_average_keeps_outputs_nearer() -> None:
    """Each Fisher knows one output alone, and the other model's says of it what it never saw."""
    space = fk.ParameterSpace(("l.weight",), ((2, 2),))
    inputs = torch.tensor([[1.0, 0.9], [0.9, 1.0]], dtype=F64)
    other = torch.tensor([[1.0, -0.9], [-0.9, 1.0]], dtype=F64)
    fishers = [
        KroneckerOperator(space, inputs, torch.diag(torch.tensor([1.0, 1e-6], dtype=F64))),
        KroneckerOperator(space, other, torch.diag(torch.tensor([1e-6, 1.0], dtype=F64))),
    ]
    models = [
        {"l.weight": torch.tensor([[1.0, 0.0], [9.0, 9.0]], dtype=F64)},
        {"l.weight": torch.zeros(2, 2, dtype=F64)},
    ]
    _, info = merge(models, fishers, damping=0.0, return_info=True)
    assert info.blocks[0].against_average[0] == pytest.approx(4, rel=1e-2)
    _, info = merge(models, fishers, damping=fk.RelativeDamping(1e4), return_info=True)  # the average
    assert info.blocks[0].worst == pytest.approx(1, rel=1e-2)


@pytest.mark.parametrize("name", ["diagonal", "kronecker", "three_kroneckers"])
def test_merge__damping_of_each_fisher_is_damping_of_the_sum_towards_the_average(name: str) -> None:
    pairs = mc.STRUCTURES[name]()
    space = pairs[0][0].space
    models, weights = mc.states(space, len(pairs)), [0.3, 0.7, 1.1][: len(pairs)]
    damped = [matrix + 0.2 * torch.eye(space.size, dtype=F64) for matrix in mc.matrices(pairs)]
    result = merge(models, mc.operators(pairs), weights, damping=0.2 * sum(weights), normalize=None)
    check(result, mc.brute_force(models, damped, space, weights, 0.0), space)


def test_merge__damping_pulls_to_the_center_and_never_to_zero() -> None:
    pairs = mc.STRUCTURES["kronecker"]()
    models = mc.states(oc.LAYER, 2)
    center = mc.states(oc.LAYER, 1, seed=500)[0]
    far = merge(models, mc.operators(pairs), [1.0, 3.0], damping=1e12)
    check(far, (mc.flat(models[0], oc.LAYER) + 3 * mc.flat(models[1], oc.LAYER)) / 4, oc.LAYER)
    check(merge(models, mc.operators(pairs), damping=1e12, center=center), mc.flat(center, oc.LAYER), oc.LAYER)
    expected = mc.brute_force(models, mc.matrices(pairs), oc.LAYER, [0.5, 0.5], 0.7, center)
    check(merge(models, mc.operators(pairs), damping=0.7, center=center, normalize=None), expected, oc.LAYER)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, F64], ids=str)
@pytest.mark.parametrize("make", STRUCTURES)
def test_merge__of_equal_models_is_that_model_to_the_last_bit(make, dtype) -> None:
    pairs = make()
    model = mc.states(pairs[0][0].space, 1, dtype)[0]
    weights = [0.1, 0.7, 0.3][: len(pairs)]
    result = merge([model] * len(pairs), mc.operators(pairs), weights)
    assert all(torch.equal(result[name], tensor) for name, tensor in model.items())
    assert all(result[name].data_ptr() != tensor.data_ptr() for name, tensor in model.items())


def test_merge__where_no_fisher_says_anything_stays_at_the_center() -> None:
    entries = [torch.tensor([1.0, 0.0, 2.0, 0.0], dtype=F64), torch.tensor([3.0, 0.0, 0.0, 4.0], dtype=F64)]
    space = fk.ParameterSpace(("w",), ((4,),))
    models = [{"w": torch.zeros(4, dtype=F64)}, {"w": torch.ones(4, dtype=F64)}]
    fishers = [DiagonalOperator(space, e) for e in entries]
    result = merge(models, fishers, damping=0, normalize=None)["w"]
    assert torch.allclose(result, torch.tensor([0.75, 0.5, 0.0, 1.0], dtype=F64))
    with pytest.raises(fk.SingularMatrixError, match=r"leaves them at the center"):
        merge(models, [fk.operators.DenseOperator(space, e.diag()) for e in entries], damping=0)


# -- rows: the full and block structures of real models ---------------------------------------------------------------


def tasks(count: int = 2, sizes: tuple[int, ...] = (7, 9)) -> tuple[list[nn.Module], list[tuple[Tensor, Tensor]]]:
    torch.manual_seed(3)
    models = [nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double() for _ in range(count)]
    data = [(torch.randn(n, 3, dtype=F64), torch.randint(3, (n,))) for n in sizes[:count]]
    return models, data


@pytest.mark.parametrize("method", ["auto", "direct", "cg"])
def test_merge__of_rows_stacks_them(method) -> None:
    models, data = tasks()
    fishers = [fk.EmpiricalFisher(m, d, structure="full") for m, d in zip(models, data, strict=True)]
    dense = [by_hand.fisher(m, d) for m, d in zip(models, data, strict=True)]
    states = [m.state_dict() for m in models]
    for damping in (1e-1, 1e-6):
        expected = mc.brute_force(states, dense, fishers[0].space, [0.5, 0.5], damping)
        policy = MergePolicy(method=method)
        result, info = merge(models, fishers, damping=damping, normalize=None, policy=policy, return_info=True)
        check(result, expected, fishers[0].space, 1e-7)
        assert info.blocks[0].method == {"auto": "woodbury", "direct": "direct", "cg": "conjugate_gradient"}[method]


def test_merge__output_damping_of_rows_is_by_module() -> None:
    models, data = tasks()
    fishers = [fk.EmpiricalFisher(m, d, structure="full") for m, d in zip(models, data, strict=True)]
    states = [m.state_dict() for m in models]
    mixed = []
    for model, d in zip(models, data, strict=True):
        matrix = by_hand.fisher(model, d)
        mean = torch.block_diag(mc.averaged(matrix[:16, :16], 3, 4, True), mc.averaged(matrix[16:, 16:], 4, 3, True))
        mixed.append((matrix + mean) / 2)
    expected = mc.brute_force(states, mixed, fishers[0].space, [0.5, 0.5], 1e-4)
    for method in ("auto", "cg"):
        result = merge(
            models, fishers, damping=1e-4, normalize=None, output_damping=1.0, policy=MergePolicy(method=method)
        )
        check(result, expected, fishers[0].space, 1e-7)


@pytest.mark.parametrize("structures", [("full", "kfac"), ("block", "diagonal"), ("ekfac", "full")])
def test_merge__fishers_of_different_structures_join_blocks(structures) -> None:
    models, data = tasks()
    fishers = [fk.ExactFisher(m, d, structure=s) for m, d, s in zip(models, data, structures, strict=True)]
    dense = [f.to_dense() for f in fishers]
    states = [m.state_dict() for m in models]
    expected = mc.brute_force(states, dense, fishers[0].space, [0.5, 0.5], 1e-3)
    result, info = merge(models, fishers, damping=1e-3, normalize=None, return_info=True)
    check(result, expected, fishers[0].space, 1e-7)
    assert len(info.blocks) == (1 if "full" in structures else 2)


# -- theorems ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("outputs", [1, 3])
@pytest.mark.parametrize("structure", ["full", "block", "kfac", "ekfac"])
@pytest.mark.parametrize("ratio", [0.0, 1.0])
def test_merge__of_linear_regressions_is_the_joint_least_squares_solution(structure, outputs, ratio) -> None:
    torch.manual_seed(0)
    truth, models, data = torch.randn(4, outputs, dtype=F64), [], []
    for n in (20, 35, 11):
        x = torch.randn(n, 4, dtype=F64) @ torch.randn(4, 4, dtype=F64)
        y = x @ truth + torch.randn(n, outputs, dtype=F64)
        best = torch.linalg.lstsq(torch.cat([x, torch.ones(n, 1, dtype=F64)], 1), y).solution
        model = nn.Linear(4, outputs).double()
        with torch.no_grad():
            model.weight.copy_(best[:4].T)
            model.bias.copy_(best[4])
        models.append(model)
        data.append((x, y))
    inputs = torch.cat([torch.cat([x, torch.ones(len(x), 1, dtype=F64)], 1) for x, _ in data])
    joint = torch.linalg.lstsq(inputs, torch.cat([y for _, y in data])).solution
    fishers = [
        fk.ExactFisher(m, d, likelihood="gaussian", structure=structure) for m, d in zip(models, data, strict=True)
    ]
    for weights in ([20, 35, 11], "examples"):
        result = merge(models, fishers, weights, normalize=None, damping=0, output_damping=ratio)
        assert torch.allclose(result["weight"], joint[:4].T, atol=1e-11)
        assert torch.allclose(result["bias"], joint[4], atol=1e-11)


def test_merge__sums_over_examples_at_weight_one_are_means_weighted_by_examples_but_for_the_center() -> None:
    pairs, counts = mc.STRUCTURES["kronecker"](), [30.0, 10.0]
    models, means = mc.states(oc.LAYER, 2), mc.operators(pairs)
    sums = [n * f for n, f in zip(counts, means, strict=True)]
    plain = functools.partial(merge, models, normalize=None, damping=0.5)
    by_examples = plain(means, counts)
    center = fk.merging.average(models, weights=counts)
    check(plain(sums, [1.0, 1.0], center=center), mc.flat(by_examples, oc.LAYER), oc.LAYER, 1e-12)
    off_center = mc.flat(plain(sums, [1.0, 1.0]), oc.LAYER) - mc.flat(by_examples, oc.LAYER)
    assert float(off_center.norm()) > 1e-3
    # 1/T is another merge: the same as twice the damping at weight one.
    halves = plain(sums)
    check(plain(sums, [1.0, 1.0], damping=1.0), mc.flat(halves, oc.LAYER), oc.LAYER, 1e-12)


def test_merge__scales_of_fishers_do_not_matter_once_normalized() -> None:
    pairs = mc.STRUCTURES["kronecker"]()
    models, (a, b) = mc.states(oc.LAYER, 2), mc.operators(pairs)
    for how in ("trace", "norm", "block", "output"):
        first = merge(models, [a, b], normalize=how)
        second = merge(models, [1e-6 * a, 1e3 * b], normalize=how)
        check(second, mc.flat(first, oc.LAYER), oc.LAYER, 1e-8)


# -- conjugate gradients -----------------------------------------------------------------------------------------------


def hard_layers(count: int, dtype: torch.dtype, outputs: int = 24, inputs: int = 40) -> list[KroneckerOperator]:
    """Kronecker products with spectra over nine decades, each in a basis of its own, of deficient rank."""
    space = fk.ParameterSpace(("l.weight", "l.bias"), ((outputs, inputs), (outputs,)))
    result = []
    for t in range(count):
        factors = []
        for size, rank, seed in ((inputs + 1, inputs - 5, 7 * t), (outputs, outputs // 3, 7 * t + 1)):
            basis = torch.linalg.qr(oc.normal(size, size, seed=seed)).Q[:, :rank]
            values = torch.logspace(0, -9, rank, dtype=F64)
            factors.append(((basis * values) @ basis.T).to(dtype))
        result.append(KroneckerOperator(space, *factors, symmetric=True))
    return result


@pytest.mark.parametrize("dtype", [F64, torch.float32], ids=str)
@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("damping", [1e-2, 1e-4, 1e-6, 1e-8])
def test_merge__conjugate_gradients_converge_on_kronecker_sums(count, damping, dtype) -> None:
    fishers = hard_layers(count, dtype)
    models = mc.states(fishers[0].space, count)
    settings = {"damping": fk.RelativeDamping(damping), "return_info": True}
    result, info = merge(models, fishers, policy=MergePolicy(method="cg"), **settings)
    assert info.converged
    assert info.blocks[0].method == "conjugate_gradient"
    assert 0 < info.blocks[0].steps < 1000
    if dtype == F64:
        direct, _ = merge(models, fishers, policy=MergePolicy(method="direct"), **settings)
        check(result, mc.flat(direct, fishers[0].space), fishers[0].space, 1e-4)


@pytest.mark.parametrize("make", ["hard", "kronecker", "kronecker_transposed", "kronecker_convolution"])
@pytest.mark.parametrize("damping", [1e-1, 1e-3, 1e-6])
def test_merge__two_kronecker_products_of_a_large_layer_are_solved_in_a_basis_of_their_own(
    make: str, damping: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    fishers = hard_layers(2, F64) if make == "hard" else mc.operators(mc.STRUCTURES[make]())
    models, settings = mc.states(fishers[0].space, 2), {"damping": fk.RelativeDamping(damping), "return_info": True}
    direct, _ = merge(models, fishers, policy=MergePolicy(method="direct"), **settings)
    other, _ = merge(models, fishers, policy=MergePolicy(method="cg"), **settings)
    monkeypatch.setattr(blocks, "DENSE_SIZE", 0)
    monkeypatch.setattr(kronecker_sum, "MOST_NUMBERS", 0)
    result, info = merge(models, fishers, **settings)
    assert info.converged
    assert info.residual <= 1e-12
    assert info.blocks[0].method == "conjugate_gradient"
    assert any(not torch.equal(result[name], other[name]) for name in result)  # another way was taken
    check(result, mc.flat(direct, fishers[0].space), fishers[0].space, 1e-6 if damping < 1e-3 else 1e-8)


@pytest.mark.parametrize("damping", [3e-2, 1e-4])
@pytest.mark.parametrize(("count", "most"), [(2, 10), (3, 15), (5, 18)])
def test_merge__products_whose_outputs_are_damped_take_few_steps(
    count: int, most: int, damping: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blocks, "DENSE_SIZE", 0)
    monkeypatch.setattr(kronecker_sum, "MOST_NUMBERS", 0)
    fishers = hard_layers(count, F64)
    models, (outputs, inputs) = mc.states(fishers[0].space, count), fishers[0].space.shapes[0]
    merged, info = fk.merging.merge(models, fishers, damping=fk.RelativeDamping(damping), return_info=True)
    thetas = [torch.cat([m["l.weight"], m["l.bias"].unsqueeze(1)], 1).reshape(-1) for m in models]
    center = torch.stack(thetas).mean(0)
    total, right = damping * torch.eye(len(center), dtype=F64), torch.zeros_like(center)
    for fisher, theta in zip(fishers, thetas, strict=True):
        a, g = fisher.factors
        g = g + (g @ g).trace() / g.trace() * torch.eye(outputs, dtype=F64)
        matrix = torch.kron(g, a)
        matrix *= len(center) / matrix.trace() / count
        total, right = total + matrix, right + matrix @ (theta - center)
    expected = (center + torch.linalg.solve(total, right)).reshape(outputs, inputs + 1)
    found = torch.cat([merged["l.weight"], merged["l.bias"].unsqueeze(1)], 1)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)
    assert info.converged
    assert 0 < info.blocks[0].steps <= most


def test_merge__two_products_that_run_out_of_steps_are_warned_of(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kronecker_sum, "MOST_NUMBERS", 0)
    fishers = hard_layers(2, F64)
    monkeypatch.setattr(blocks, "DENSE_SIZE", 0)
    with pytest.warns(fk.NotConvergedWarning, match="1 of 1 blocks missed tolerance"):
        _, info = merge(mc.states(fishers[0].space, 2), fishers, policy=MergePolicy(max_steps=3), return_info=True)
    assert info.blocks[0].steps == 3


def test_merge__a_block_that_misses_its_tolerance_is_warned_of_by_name() -> None:
    fishers = hard_layers(2, F64)
    models = mc.states(fishers[0].space, 2)
    with pytest.warns(fk.NotConvergedWarning, match=r"1 of 1 blocks missed tolerance.*l\.weight.*max_steps") as caught:
        _, info = merge(models, fishers, policy=MergePolicy(method="cg", max_steps=2), return_info=True)
    assert len(caught) == 1
    assert not info.converged
    assert "NOT CONVERGED" in str(info)


def test_merge__changes_neither_models_nor_fishers_nor_random_numbers() -> None:
    models, data = tasks()
    fishers = [fk.EmpiricalFisher(m, d, structure="kfac") for m, d in zip(models, data, strict=True)]
    before = [copy.deepcopy(m.state_dict()) for m in models]
    dense, state = [f.to_dense() for f in fishers], torch.get_rng_state()
    result = merge(models, fishers, output_damping=1.0)
    for tensor in result.values():
        tensor.zero_()
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(m.state_dict()[n], t) for m, old in zip(models, before, strict=True) for n, t in old.items())
    assert all(torch.equal(f.to_dense(), d) for f, d in zip(fishers, dense, strict=True))
    assert all(m.training and not m._forward_hooks for m in models)


def test_merge__defaults_are_those_of_the_documentation() -> None:
    pairs = mc.STRUCTURES["kronecker"]()
    models = mc.states(pairs[0][0].space, len(pairs))
    result = fk.merging.merge(models, mc.operators(pairs))
    settings = {"normalize": "block", "output_damping": None, "damping": fk.RelativeDamping(0.03)}
    expected = fk.merging.merge(models, mc.operators(pairs), [1 / 2, 1 / 2], center="average", **settings)
    assert all(torch.equal(result[name], expected[name]) for name in result)


@pytest.mark.parametrize("structure", ["full", "block", "kfac", "ekfac"])
def test_merge__of_linear_regressions_is_the_joint_one_at_any_output_damping(structure: str) -> None:
    generator = torch.Generator().manual_seed(0)
    parts = [
        (torch.randn(n, 4, generator=generator).double(), torch.randn(n, 2, generator=generator).double())
        for n in (20, 11)
    ]

    def fit(x: Tensor, y: Tensor) -> nn.Module:
        solution = torch.linalg.lstsq(torch.cat([x, x.new_ones(len(x), 1)], 1), y).solution
        model = nn.Linear(4, 2).double()
        model.load_state_dict({"weight": solution[:4].mT, "bias": solution[4]})
        return model

    models = [fit(*part) for part in parts]
    fishers = [
        fk.ExactFisher(m, p, likelihood="gaussian", structure=structure) for m, p in zip(models, parts, strict=True)
    ]
    joint = fit(*(torch.cat(tensors) for tensors in zip(*parts, strict=True)))
    for settings in ({}, {"output_damping": 0.0}):
        result = fk.merging.merge(models, fishers, weights=[20, 11], normalize=None, damping=0, **settings)
        for name, tensor in joint.state_dict().items():
            torch.testing.assert_close(result[name], tensor, rtol=1e-9, atol=1e-10)
