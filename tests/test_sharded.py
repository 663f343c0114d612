"""Fishers whose blocks are shared out to processes: equal to the whole one, each process with its share of bytes."""

import functools
import tempfile
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import fisherkit as fk
from fisherkit.operators import ShardedOperator, normalize, unwrap
from fisherkit.operators.outputs_average import average_over_outputs
from fisherkit.testing import check_fisher
from tests import ranks
from tests.test_processes import answers, network, own_data, whole_data

STRUCTURES = ("diagonal", "block", "kfac", "ekfac", "nkp")
WIDE, LAYERS = 8, 12


def held_bytes(found: Any) -> int:
    """Bytes of all tensors' memory that an object of the package holds."""
    storages: dict[int, int] = {}
    seen: set[int] = set()
    queue = [found]
    while queue:
        one = queue.pop()
        if id(one) in seen:
            continue
        seen.add(id(one))
        if isinstance(one, Tensor):
            storages[one.untyped_storage().data_ptr()] = one.untyped_storage().nbytes()
        elif isinstance(one, dict):
            queue += one.values()
        elif isinstance(one, (list, tuple)):
            queue += one
        elif isinstance(one, functools.partial):
            queue += [one.func, one.args, one.keywords]
        elif isinstance(one, (types.FunctionType, types.MethodType)):
            queue += [getattr(one, "__self__", None), *(cell.cell_contents for cell in one.__closure__ or ())]
        elif type(one).__module__.startswith("fisherkit"):
            queue.append(vars(one))
    return sum(storages.values())


def all_answers(fisher: fk.FisherOperator) -> dict[str, Tensor]:
    found = answers(fisher)
    found["effective_dimension"] = fisher.effective_dimension(damping=1e-2)
    found["norm"] = unwrap(fisher)._frobenius()
    found["logdet, relative"] = fisher.logdet(damping=fk.RelativeDamping(0.1))
    v = torch.linspace(-1, 1, fisher.size, dtype=torch.float64)
    found["quadratic_form"] = fisher.quadratic_form(v)
    solution, info = fisher.solve(v, damping=1e-2, return_info=True)
    assert info.converged
    found["solve with info"] = solution
    found["sum"] = (0.5 * fisher + fisher).solve(v, damping=1e-2)
    found["average"] = average_over_outputs(unwrap(fisher)).to_dense()
    found["normalized"] = normalize(fisher, "trace") @ v
    vectors = fisher.eigenvectors(3)
    found["eigenvectors"] = fisher @ vectors - vectors * fisher.eigenvalues(3) + 1
    return found


def compare(rank: int, size: int) -> dict[str, float]:
    worst = {}
    for structure in STRUCTURES:
        for budget in (None, 3000) if structure in ("kfac", "ekfac") else (None,):
            one = fk.TruncatedFisher(network(), [whole_data()], structure=structure, group=False)
            fisher = fk.TruncatedFisher(
                network(), own_data(rank, size), structure=structure, shard=True, memory_budget=budget
            )
            known = [
                (f.is_diagonal, f.decomposed_side, "" if structure == "block" else f.coverage().to_json())
                for f in (one, fisher)
            ]
            assert known[0] == known[1], known
            expected, everything = all_answers(one), all_answers(fisher)
            assert everything.keys() == expected.keys()
            for name, found in everything.items():
                error = (found - expected[name]).norm() / expected[name].norm()
                worst[f"{structure} {budget} {name}"] = float(error)
            worst[f"{structure} {budget} draws"] = 0.0 if plausible_draws(one, fisher) else 1.0
    return worst


def plausible_draws(one: fk.FisherOperator, fisher: fk.FisherOperator, n: int = 20_000) -> bool:
    """Whether many draws have the covariance (F + λI)⁻¹, by its distance in numbers of standard deviations.

    Turned by the Cholesky factor of F + λI they would be normal numbers, whose second moments S have E n‖S − I‖² =
    D (D + 1), with a standard deviation of 2√(D (D + 1)) and a little.
    """
    shifted = one.to_dense() + 1e-2 * torch.eye(one.size, dtype=torch.float64)
    draws = fisher.factorize(damping=1e-2).sample(torch.Generator().manual_seed(3), n)
    normal = torch.linalg.cholesky(shifted).mT @ draws
    distance = n * (normal @ normal.mT / n - torch.eye(one.size, dtype=torch.float64)).square().sum()
    entries = one.size * (one.size + 1)
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, draws[:, :2])
    same = all(torch.equal(other, draws[:, :2]) for other in found)
    return same and bool((distance - entries).abs() < 5 * 2 * entries**0.5)


def deep() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(WIDE, WIDE) for _ in range(LAYERS)), nn.Linear(WIDE, 4)).double()


def memory(rank: int, size: int) -> dict[str, tuple[int, int]]:
    g = torch.Generator().manual_seed(rank)
    data = [(torch.randn(400, WIDE, generator=g, dtype=torch.float64), torch.randint(0, 4, (400,), generator=g))]
    found = {}
    for structure in STRUCTURES:
        bytes_of = []
        for shard in (False, True):
            fisher = fk.EmpiricalFisher(deep(), data, structure=structure, shard=shard)
            fisher.solve(torch.ones(fisher.size, dtype=torch.float64), damping=0.1)  # with eigenbases
            bytes_of.append(held_bytes(fisher.held))
        found[structure] = bytes_of[0], bytes_of[1]
    return found


def conform(rank: int, size: int, folder: str) -> None:
    for structure in STRUCTURES:
        fisher = fk.ExactFisher(network(), own_data(rank, size), structure=structure, shard=True)
        place = mock.MagicMock()
        place.return_value.__enter__.return_value = f"{folder}/{structure}"
        Path(f"{folder}/{structure}").mkdir(exist_ok=True)
        with mock.patch("fisherkit.testing.tempfile.TemporaryDirectory", place):
            check_fisher(fisher, fisher.to_dense())


def files(rank: int, size: int, folder: str) -> dict[str, float]:
    """Saved by all, loaded whole, by all processes together, and by some of them."""
    found, pair = {}, dist.new_group([0, 1])
    for structure in ("diagonal", "ekfac", "nkp"):
        path = f"{folder}/f-{structure}.safetensors"
        fisher = fk.SampledFisher(network(), own_data(rank, size), structure=structure, shard=True)
        fisher.save(path)
        fisher.save(path)  # over itself
        if rank == 0:
            own = [file.name for file in Path(folder).iterdir() if file.name.startswith(f"f-{structure}")]
            assert len(own) == len(fk.operators.open_file(path).files) + 1, own
        v, expected = torch.ones(fisher.size, dtype=torch.float64), fisher.to_dense()
        loaded = [fk.load(path), fk.load(path, shard=True)]
        if rank < 2:
            loaded.append(fk.load(path, shard=True, group=pair))
        assert all(one.metadata == fisher.metadata for one in loaded)
        errors = [(one.to_dense() - expected).norm() / expected.norm() for one in loaded]
        solved = fisher.solve(v, damping=0.1)
        errors += [(one.solve(v, damping=0.1) - solved).norm() / solved.norm() for one in loaded]
        found[structure] = float(max(errors))
    return found


def refusals(rank: int, size: int) -> dict[str, str]:
    """What is refused, by the same error in all processes."""

    def answer(ask: Callable[[], Any]) -> str:
        try:
            return f"{ask()}"
        except fk.FisherkitError as error:
            return f"{type(error).__name__}: {error}"

    fisher = fk.EmpiricalFisher(network(), own_data(rank, size), structure="kfac", shard=True)
    v = torch.ones(fisher.size, dtype=torch.float64)
    asked = {
        "singular": lambda: fisher.solve(v, damping=0.0),
        "no folder": lambda: fisher.save("/nowhere/f.safetensors"),
        "gram": fisher.gram,
        "full": lambda: fk.EmpiricalFisher(network(), own_data(rank, size), shard=True),
        "other vectors": lambda: fisher @ (v * (1 + rank)),
        "other questions": lambda: fisher.trace() if rank else fisher.diagonal(),
        "another setting": lambda: fk.EmpiricalFisher(
            network(), own_data(rank, size), structure="kfac", shard=rank > 0
        ),
        "EWC": lambda: fk.continual.EWC(network(), strength=1.0).consolidate(fisher),
        "merge": lambda: fk.merging.merge([network()], [fisher]),
        "regmean": lambda: fk.merging.regmean([network()], [fisher]),
    }  # fmt: skip
    return {name: answer(ask) for name, ask in asked.items()}


def everything(rank: int, size: int, folder: str) -> dict[str, Any]:
    found: dict[str, Any] = {"memory": memory(rank, size)}
    if size == 2:
        conform(rank, size, folder)
        return found | {"refused": refusals(rank, size)}
    return found | {"equal": compare(rank, size), "files": files(rank, size, folder)}


@pytest.fixture(scope="module")
def found() -> Any:
    def run(size: int) -> list[Any]:
        with tempfile.TemporaryDirectory() as folder:
            return ranks.run(size, everything, folder)

    return functools.lru_cache(run)


def test_sharded__equals_that_of_one_process(found: Any) -> None:
    for one in found(3):
        assert isinstance(one, dict), one
        assert max(one["equal"].values()) < 1e-10, {case: e for case, e in one["equal"].items() if e >= 1e-10}


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("structure", STRUCTURES)
def test_sharded__memory_of_a_process_is_its_share(found: Any, size: int, structure: str) -> None:
    whole = {one["memory"][structure][0] for one in found(size)}
    parts = [one["memory"][structure][1] for one in found(size)]
    assert len(whole) == 1
    assert sum(parts) <= 1.02 * max(whole)
    assert max(parts) <= 1.15 * max(whole) / size


def test_sharded__saved_by_all_and_loaded_by_any_number(found: Any) -> None:
    assert max(error for one in found(3) for error in one["files"].values()) < 1e-10


def test_sharded__conforms_in_every_process(found: Any) -> None:
    assert all(isinstance(one, dict) for one in found(2)), found(2)  # `check_fisher` of every structure has passed


def test_sharded__what_is_refused_is_refused_in_all_processes(found: Any) -> None:
    first, second = (one["refused"] for one in found(2))
    for name in ("singular", "gram", "full", "EWC", "merge", "regmean"):
        assert first[name] == second[name]
    assert first["singular"].startswith("SingularMatrixError")
    assert first["gram"].startswith("NoClosedFormError")
    assert first["full"].startswith("InvalidArgumentError")
    assert first["EWC"].startswith("NoClosedFormError")
    assert "of which each process has some blocks" in first["merge"]
    assert "of which each process has some blocks" in first["regmean"]
    assert first["no folder"].startswith("InvalidArgumentError")
    assert second["no folder"].startswith("ProcessError")
    for name in ("other vectors", "other questions", "another setting"):
        assert first[name].startswith("ProcessError")
        assert second[name].startswith("ProcessError")


def test_sharded__of_one_process_is_the_whole() -> None:
    fisher = fk.EmpiricalFisher(network(), [whole_data()], structure="kfac", shard=True)
    assert not isinstance(unwrap(fisher), ShardedOperator)
