"""Influence scores against brute force in float64: every kind × structure, every form of rows."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import fisherkit as fk
from tests.axes import paired
from tests.conformance_cases import KINDS, annotations_checked, build, problem
from tests.influence_cases import count, damped_inverse, data, dense, gradients
from tests.kronecker_cases import RECURRENT
from tests.reference.models import EVERY_FORM

STRUCTURES = ("full", "block", "diagonal", "kfac", "ekfac")
FEW = ("mlp", "gaussian_vector", "bernoulli_multilabel", "conv2d", "token_attention_by_token", "embedding")


def check(family: str, kind: str, structure: str, dtype: torch.dtype = torch.float64, rtol: float = 1e-8) -> None:
    of = problem(family, dtype)
    with annotations_checked(False):
        fisher = build(family, kind, structure, dtype)
        influence = fk.influence.InfluenceScores(fisher, of.model, damping=fk.RelativeDamping(1.0))
        queries, train = data(of, slice(1, 4)), data(of)
        found: Any = influence.scores(queries, train)
        own = influence.self_influence(train)
    g = gradients(family)
    inverse = damped_inverse(dense(family, kind, structure, fisher))
    expected = g @ inverse @ g.T / count(family, kind)
    scale = expected.diagonal().abs().max()
    assert (found - expected[1:4]).abs().max() <= rtol * scale
    assert (own - expected.diagonal()).abs().max() <= rtol * scale


@pytest.mark.parametrize(("kind", "structure"), paired(KINDS, STRUCTURES))
def test_scores__are_the_formula_s_for_every_kind_and_structure(kind: str, structure: str) -> None:
    check("mlp", kind, structure)


@pytest.mark.parametrize("family", EVERY_FORM)
def test_scores__are_the_formula_s_for_every_form_of_rows(family: str) -> None:
    """What a layer's rows are is tested with the rows; scores know them alone."""
    for structure in STRUCTURES if family in FEW else ("full",) if family in RECURRENT else ("full", "ekfac"):
        check(family, "ef", structure)


@pytest.mark.parametrize("structure", STRUCTURES)
def test_scores__are_accurate_in_float32(structure: str) -> None:
    for family in FEW:
        check(family, "ef", structure, torch.float32, 1e-4)
