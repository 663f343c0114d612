"""The same numbers on an accelerator as on the CPU; skipped, visibly, where there is none."""

import copy

import pytest
import torch

import fisherkit as fk
from tests.reference.models import FAMILIES

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
NAMES = ("mlp", "conv2d", "layernorm", "embedding", "attention_batch_first", "token_attention", "lstm")
STRUCTURES = ("full", "block", "diagonal", "kfac", "ekfac")


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("kind", ["ef", "ief", "sf", "exact", "truncated"])
@pytest.mark.parametrize("name", NAMES)
def test_matvec_and_solve__agree_with_the_cpu(name: str, kind: str, structure: str) -> None:
    problem = FAMILIES[name].problem(torch.float64)
    data = (problem.inputs, problem.targets)
    options = {"likelihood": problem.likelihood, "example": problem.example, "structure": structure}
    here = fk.KINDS[kind](problem.model, data, **options)
    there = fk.KINDS[kind](copy.deepcopy(problem.model).cuda(), data, **options)
    v = torch.randn(here.size, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for operation in (lambda f, x: f @ x, lambda f, x: f.solve(x, damping=0.1)):
        expected, found = operation(here, v), operation(there, v.cuda())
        assert found.device.type == "cuda"
        assert (found.cpu() - expected).norm() <= 1e-8 * expected.norm()


def test_vector_on_another_device__is_refused() -> None:
    problem = FAMILIES["mlp"].problem(torch.float64)
    fisher = fk.EmpiricalFisher(problem.model.cuda(), (problem.inputs, problem.targets))
    with pytest.raises(fk.InvalidArgumentError, match=r"a vector on cpu; expected cuda"):
        fisher @ torch.zeros(fisher.size, dtype=torch.float64)
