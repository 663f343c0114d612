"""What becomes of names that are not merged, and of models and Fishers that do not fit: refused, with the flag."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fisherkit as fk
from fisherkit.operators import DiagonalOperator

merging = fk.merging
MergePolicy = merging.MergePolicy
State = dict[str, Tensor]


def fisher(state: State, *names: str, seed: int = 0, metadata: dict[str, str] | None = None) -> DiagonalOperator:
    """A diagonal Fisher of some entries."""
    space = fk.ParameterSpace(tuple(names), tuple(tuple(state[name].shape) for name in names))
    entries = torch.rand(space.size, generator=torch.Generator().manual_seed(seed)) + 0.1
    operator = DiagonalOperator(space, entries)
    operator.metadata = metadata or {}
    return operator


def state(seed: int, **extra: Tensor) -> State:
    g = torch.Generator().manual_seed(seed)
    return {"w": torch.randn(2, 3, generator=g), "b": torch.randn(2, generator=g), **extra}


def merge(a: State, b: State, *names: str, **settings: Any) -> Any:
    fishers = [fisher(a, *(names or ("w", "b"))), fisher(b, *(names or ("w", "b")), seed=1)]
    return merging.merge([a, b], fishers, **settings)


# -- parameters without Fisher ---------------------------------------------------------------------------------------


def test_merge__refuses_uncovered_parameters_with_list_and_flag() -> None:
    with pytest.raises(
        fk.InvalidArgumentError, match=r"not every Fisher covers: 'b'; expected none.*uncovered=\"average\""
    ):
        merge(state(0), state(1), "w")


@pytest.mark.parametrize("policy", ["refuse", "average"])
def test_merge__fishers_of_other_names_are_said_first_whatever_the_policy(policy) -> None:
    a, b = state(0), state(1)
    fishers = [fisher(a, "w", "b"), fisher(b, "w", "b")]
    wrapped = [{f"module.{name}": tensor for name, tensor in model.items()} for model in (a, b)]
    with pytest.raises(
        fk.InvalidArgumentError, match=r"that no model has: 'b', 'w';.*name\.removeprefix\('module\.'\)"
    ):
        merging.merge(wrapped, fishers, policy=MergePolicy(uncovered=policy))
    strange = [fisher({"v": a["w"]}, "v") for _ in range(2)]
    with pytest.raises(fk.InvalidArgumentError, match=r"that no model has: 'v';.*Try: the Fishers measured again"):
        merging.merge([a, b], strange, policy=MergePolicy(uncovered=policy))


@pytest.mark.parametrize("policy", ["average", "first", "center"])
def test_merge__uncovered_parameters_follow_the_policy(policy) -> None:
    a, b, center = state(0), state(1), state(2)
    result, info = merge(a, b, "w", policy=MergePolicy(uncovered=policy), center=center, return_info=True)
    expected = {"average": (a["b"] + b["b"]) / 2, "first": a["b"], "center": center["b"]}[policy]
    assert torch.allclose(result["b"], expected)
    assert info.names == {"w": "merged", "b": {"average": "averaged"}.get(policy, policy)}


def test_merge__the_center_of_an_average_is_the_weighted_average() -> None:
    a, b = state(0), state(1)
    result = merge(a, b, "w", weights=[1.0, 3.0], policy=MergePolicy(uncovered="center"))
    assert torch.allclose(result["b"], (a["b"] + 3 * b["b"]) / 4)


def test_merge__equal_uncovered_parameters_pass_without_a_flag() -> None:
    a, b = state(0), state(1)
    b["b"] = a["b"].clone()
    result, info = merge(a, b, "w", return_info=True)
    assert torch.equal(result["b"], a["b"])
    assert result["b"].data_ptr() != a["b"].data_ptr()
    assert info.names["b"] == "equal"


def test_merge__fishers_over_different_parameters_cover_what_they_share() -> None:
    a, b = state(0), state(1)
    fishers = [fisher(a, "w", "b"), fisher(b, "w")]
    with pytest.raises(fk.InvalidArgumentError, match=r"not every Fisher covers: 'b'"):
        merging.merge([a, b], fishers)
    assert torch.allclose(
        merging.merge([a, b], fishers, policy=MergePolicy(uncovered="average"))["b"], (a["b"] + b["b"]) / 2
    )


def test_merge__refuses_a_block_that_not_all_fishers_have_whole() -> None:
    a, b = state(0), state(1)
    space = fk.ParameterSpace(("w", "b"), ((2, 3), (2,)))
    whole = fk.operators.DenseOperator(space, torch.eye(8))
    with pytest.raises(fk.InvalidArgumentError, match=r"Fisher 1.*block over 'w', 'b', of which 'b'.*same params="):
        merging.merge([a, b], [whole, fisher(b, "w")], policy=MergePolicy(uncovered="average"))


# -- buffers ---------------------------------------------------------------------------------------------------------


def normed(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    for _ in range(seed + 1):
        model(torch.randn(8, 3))
    return model.eval()


def test_merge__batch_norm_statistics_and_counters_need_their_flags() -> None:
    models = [normed(0), normed(1)]
    data = (torch.randn(6, 3), torch.randint(4, (6,)))
    fishers = [fk.EmpiricalFisher(m, data, structure="diagonal") for m in models]
    with pytest.raises(fk.InvalidArgumentError, match=r"float buffers.*'1.running_mean', '1.running_var'.*buffers="):
        merging.merge(models, fishers)
    with pytest.raises(fk.InvalidArgumentError, match=r"'1.num_batches_tracked'.*integers=\"first\""):
        merging.merge(models, fishers, policy=MergePolicy(buffers="average"))
    result = merging.merge(models, fishers, policy=MergePolicy(buffers="average", integers="first"))
    states = [m.state_dict() for m in models]
    mean = (states[0]["1.running_mean"] + states[1]["1.running_mean"]) / 2
    assert torch.allclose(result["1.running_mean"], mean)
    assert int(result["1.num_batches_tracked"]) == 1
    assert list(result) == list(states[0])
    normed(5).load_state_dict(result)
    first = merging.merge(models, fishers, policy=MergePolicy(buffers="first"))
    assert torch.equal(first["1.running_var"], states[0]["1.running_var"])
    # State dicts have no buffers: their names tell.
    with pytest.raises(fk.InvalidArgumentError, match=r"float buffers.*'1.running_mean', '1.running_var'"):
        merging.merge(states, fishers)


def test_merge__integer_entries_pass_when_equal() -> None:
    ids = torch.arange(4)
    result = merge(state(0, ids=ids), state(1, ids=ids.clone()))
    assert torch.equal(result["ids"], ids)
    with pytest.raises(fk.InvalidArgumentError, match=r"not floating point.*'ids'.*integers=\"first\""):
        merge(state(0, ids=ids), state(1, ids=ids + 1))


# -- heads that differ -------------------------------------------------------------------------------------------------


def test_merge__heads_that_differ_are_refused_skipped_or_taken_from_the_first() -> None:
    a = state(0, head=torch.zeros(5, 2), only_a=torch.ones(1))
    b = state(1, head=torch.zeros(7, 2), only_b=torch.ones(2))
    with pytest.raises(
        fk.InvalidArgumentError, match=r"'head' \(shapes \[5, 2\], \[7, 2\]\).*mismatched=\"skip\""
    ) as e:
        merge(a, b)
    assert "'only_a' (not in model 2)" in str(e.value)
    assert "'only_b' (not in model 1)" in str(e.value)
    result, info = merge(a, b, policy=MergePolicy(mismatched="skip"), return_info=True)
    assert set(result) == {"w", "b"}
    assert info.names["head"] == "skipped"
    first, info = merge(a, b, policy=MergePolicy(mismatched="first"), return_info=True)
    assert torch.equal(first["head"], a["head"])
    assert set(first) == {"w", "b", "head", "only_a"}
    assert info.names["only_b"] == "skipped"


def test_merge__a_fisher_may_cover_the_head_that_is_skipped() -> None:
    a, b = state(0, head=torch.zeros(5, 2)), state(1, head=torch.zeros(7, 2))
    fishers = [fisher(a, "w", "b", "head"), fisher(b, "w", "b", "head", seed=1)]
    settings: dict[str, Any] = {
        "policy": MergePolicy(mismatched="skip"),
        "normalize": None,
        "damping": 1e-3,
        "output_damping": 0,
    }
    skipped = merging.merge([a, b], fishers, **settings)
    without = merge(a, b, **settings)
    rows = [f.diagonal()[:8] for f in fishers]
    center = (torch.cat([a["w"].reshape(-1), a["b"]]) + torch.cat([b["w"].reshape(-1), b["b"]])) / 2
    delta = torch.cat([b["w"].reshape(-1), b["b"]]) - center
    expected = center + (rows[1] - rows[0]) * delta / (rows[0] + rows[1] + 2e-3)
    assert torch.allclose(skipped["w"].reshape(-1), expected[:6], atol=1e-6)
    assert set(without) == set(skipped) == {"w", "b"}


# -- tied weights ----------------------------------------------------------------------------------------------------


class Tied(nn.Module):
    def __init__(self, seed: int, tie: bool = True) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embed, self.head = nn.Embedding(6, 4), nn.Linear(4, 6, bias=False)
        if tie:
            self.head.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.embed(x))


def test_merge__tied_weights_stay_tied() -> None:
    models = [Tied(0), Tied(1)]
    data = (torch.randint(6, (5, 1)), torch.randint(6, (5, 1)))
    fishers = [fk.EmpiricalFisher(m, data, structure="diagonal") for m in models]
    result, info = merging.merge(models, fishers, return_info=True)
    assert result["head.weight"] is result["embed.weight"]
    assert info.names["head.weight"] == "tied to embed.weight"
    model = Tied(2)
    model.load_state_dict(result)
    assert torch.equal(model.head.weight, result["embed.weight"])
    assert merging.average(models)["head.weight"] is not None
    untied, warn = [models[0].state_dict(), Tied(3, tie=False).state_dict()], MergePolicy(other_weights="warn")
    with (
        pytest.warns(UserWarning, match="Fisher 2 was measured at other parameters"),
        pytest.raises(fk.InvalidArgumentError, match=r"not every Fisher covers: 'head.weight'"),
    ):
        merging.merge(untied, fishers, policy=warn)


def test_merge__a_tied_pair_that_is_skipped_is_skipped_whole() -> None:
    shared = [torch.zeros(5, 2), torch.zeros(7, 2)]
    a, b = (state(i, embed=tensor, head=tensor) for i, tensor in enumerate(shared))
    assert set(merge(a, b, policy=MergePolicy(mismatched="skip"))) == {"w", "b"}
    first = merge(a, b, policy=MergePolicy(mismatched="first"))
    assert first["head"] is first["embed"]


# -- dtypes, hashes, weights -------------------------------------------------------------------------------------------


def test_merge__of_half_precision_models_computes_in_float64_and_rounds_once() -> None:
    a, b = ({k: v.bfloat16() for k, v in state(s).items()} for s in (0, 1))
    result = merge(a, b)
    wide = merge({k: v.double() for k, v in a.items()}, {k: v.double() for k, v in b.items()})
    assert all(torch.equal(result[name], wide[name].bfloat16()) for name in result)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float8_e4m3fn], ids=str)
def test_merge__numbers_beyond_the_results_dtype_are_refused(dtype: torch.dtype) -> None:
    large = {k: v + 1e5 for k, v in state(0).items()}
    with pytest.raises(fk.NonFiniteError, match=rf"entries of 'w' up to 1e\+05, beyond {dtype}.*dtype="):
        merge(large, large, policy=MergePolicy(dtype=dtype))
    with pytest.raises(fk.NonFiniteError, match=r"beyond torch\.float16"):
        merging.task_arithmetic([{"w": torch.ones(2).half()}], {"w": torch.zeros(2).half()}, 1e6)
    assert torch.equal(merging.average([{"w": torch.full((1,), torch.inf)}] * 2)["w"], torch.full((1,), torch.inf))


def test_merge__models_of_different_dtypes_need_dtype() -> None:
    a, b = state(0), {k: v.bfloat16() for k, v in state(1).items()}
    with pytest.raises(fk.InvalidTypeError, match=r"torch.bfloat16 and torch.float32.*'w', 'b'|w, b.*dtype="):
        merge(a, b)
    assert {t.dtype for t in merge(a, b, policy=MergePolicy(dtype=torch.float16)).values()} == {torch.float16}


def test_merge__refuses_a_fisher_measured_at_another_model() -> None:
    torch.manual_seed(0)
    models = [nn.Linear(3, 2), nn.Linear(3, 2)]
    data = (torch.randn(5, 3), torch.randint(2, (5,)))
    fishers = [fk.EmpiricalFisher(m, data, structure="diagonal") for m in models]
    _, info = merging.merge(models, fishers, return_info=True)
    assert info.unverified == ()
    with pytest.raises(fk.InvalidArgumentError, match=r"Fisher [12] was measured at other .*other_weights=\"warn\""):
        merging.merge(models[::-1], fishers)
    with pytest.warns(UserWarning, match=r"Fisher [12] was measured at other parameters"):
        merging.merge(models[::-1], fishers, policy=MergePolicy(other_weights="warn"))
    states = [m.state_dict() for m in models]
    _, info = merging.merge(states, fishers, return_info=True)
    assert info.unverified == ()
    with pytest.raises(fk.InvalidArgumentError, match=r"Fisher [12] was measured at other .*other_weights=\"warn\""):
        merging.merge(states[::-1], fishers)
    with pytest.warns(UserWarning, match=r"Fisher [12] was measured at other parameters"):
        merging.merge(states[::-1], fishers, policy=MergePolicy(other_weights="warn"))
    half = [{name: tensor.half() for name, tensor in state.items()} for state in states]
    _, info = merging.merge(half, fishers, return_info=True)
    assert info.unverified == (1, 2)


def test_merge__weights_by_examples_are_read_from_the_fishers() -> None:
    a, b = state(0), state(1)
    fishers = [fisher(a, "w", "b", metadata={"examples": "30"}), fisher(b, "w", "b", metadata={"examples": "10"})]
    result, info = merging.merge([a, b], fishers, "examples", return_info=True)
    assert info.weights == (30.0, 10.0)
    same = merging.merge([a, b], fishers, [30, 10])
    assert all(torch.equal(result[name], same[name]) for name in result)
    with pytest.raises(fk.InvalidArgumentError, match=r"do not say on how many examples.*weights=\[N_1"):
        merge(a, b, weights="examples")
    for f in fishers:
        f.metadata["normalization"] = "sum"
    with pytest.raises(fk.InvalidArgumentError, match=r"have their number in them already"):
        merging.merge([a, b], fishers, "examples", normalize=None)


# -- arguments -------------------------------------------------------------------------------------------------------

BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"weights": [1.0]}, fk.InvalidArgumentError, "1 weights"),
    ({"weights": [1.0, -1.0]}, fk.InvalidArgumentError, "0 or more"),
    ({"weights": [0, 0]}, fk.InvalidArgumentError, "not all 0"),
    ({"weights": [1.0, float("nan")]}, fk.InvalidArgumentError, "finite"),
    ({"weights": [1e308, 1e308]}, fk.InvalidArgumentError, "of a finite sum"),
    ({"weights": ["a", 1]}, fk.InvalidTypeError, "numbers"),
    ({"weights": "N"}, fk.InvalidTypeError, "one number for each"),
    ({"damping": -1.0}, fk.InvalidArgumentError, "0 or more"),
    ({"damping": "a"}, fk.InvalidTypeError, "damping"),
    ({"method": "sgd"}, fk.InvalidArgumentError, "method='sgd'"),
    ({"normalize": "max"}, fk.InvalidArgumentError, "normalize='max'"),
    ({"output_damping": -0.5}, fk.InvalidArgumentError, "0 or more"),
    ({"tolerance": 0}, fk.InvalidArgumentError, "tolerance"),
    ({"max_steps": 0}, fk.InvalidArgumentError, "max_steps"),
    ({"uncovered": "drop"}, fk.InvalidArgumentError, "uncovered='drop'"),
    ({"buffers": True}, fk.InvalidArgumentError, "buffers=True"),
    ({"dtype": torch.int64}, fk.InvalidArgumentError, "floating-point"),
    ({"dtype": "float32"}, fk.InvalidTypeError, "torch.dtype"),
    ({"center": 0}, fk.InvalidTypeError, '"average"'),
    ({"center": {"w": torch.zeros(2, 3)}}, fk.InvalidArgumentError, "a center without"),
    ({"max_shard_size": 0}, fk.InvalidArgumentError, "1 or more"),
    ({"out": 3}, fk.InvalidTypeError, "a path"),
]


@pytest.mark.parametrize(("settings", "error", "text"), BAD, ids=lambda v: str(v)[:40])
def test_merge__refuses_what_it_cannot_use(settings, error, text) -> None:
    policy = {name: settings[name] for name in settings if name in MergePolicy.__dataclass_fields__}
    others = {name: value for name, value in settings.items() if name not in policy}
    with pytest.raises(error) as caught:
        merge(state(0), state(1), policy=MergePolicy(**policy), **others)
    assert text in str(caught.value)


def test_merge__refuses_models_and_fishers_that_do_not_belong_together() -> None:
    a, b = state(0), state(1)
    f = fisher(a, "w", "b")
    other = fisher({"x": torch.zeros(3)}, "x")
    transposed = fisher({"w": a["w"].T, "b": a["b"]}, "w", "b")
    swapped = fisher(a, "b", "w")
    cases: list[tuple[Any, Any, type[Exception], str]] = [
        ([a, b], [f], fk.InvalidArgumentError, "2 models and 1 Fishers"),
        ([], [], fk.InvalidArgumentError, "no models"),
        (a, [f], fk.InvalidTypeError, "models of type dict"),
        ([a, b], f, fk.InvalidTypeError, "fishers of type DiagonalOperator"),
        ([a, 3], [f, f], fk.InvalidTypeError, "model 2: got an int"),
        ([a, b], [f, 3], fk.InvalidTypeError, "Fisher 2: got an int"),
        ([a, {"w": 3}], [f, f], fk.InvalidTypeError, "no named tensors"),
        (
            [a, b],
            [f, other],
            fk.InvalidArgumentError,
            "Fisher 2 over parameters that model 2 lacks or has in another shape: 'x'",
        ),
        ([a, b], [f, transposed], fk.InvalidArgumentError, "'w' ([3, 2] and [2, 3])"),
        ([a, {**b, "w": b["w"] / 0}], [f, f], fk.NonFiniteError, "NaN or infinite entries in 'w'"),
    ]
    for models, fishers, error, text in cases:
        with pytest.raises(error) as caught:
            merging.merge(models, fishers, policy=MergePolicy(uncovered="average"))
        assert text in str(caught.value)
    joined = fk.operators.DenseOperator(swapped.space, torch.eye(8))
    with pytest.raises(fk.InvalidArgumentError, match=r"another order than the first"):
        merging.merge([a, b], [f, joined])
    zero = 0.0 * copy.copy(f)
    with pytest.raises(fk.InvalidArgumentError, match=r"Fisher 2 that is 0 \(trace 0\)"):
        merging.merge([a, b], [f, zero])
    huge = fk.operators.DiagonalOperator(f.space, torch.full((8,), 1e308, dtype=torch.float64))
    with pytest.raises(fk.NonFiniteError, match=r"Fisher 2 with trace inf"):
        merging.merge([a, b], [f, huge])
    with pytest.raises(fk.InvalidArgumentError, match=r"one of \['block', 'output', 'trace', 'norm', None\]"):
        merging.merge([a, b], [f, f], normalize="mean")
