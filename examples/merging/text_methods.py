"""Which merges of text models are measured, each as the options of the ``fisherkit`` commands."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from examples.merging.methods import DAMPING, RATIO

CLOSE = ("--tolerance", "1e-6")
"""Enough for weights in float32."""

DEFAULT = ("--normalize", "block", "--damping", f"{DAMPING:g}", *CLOSE)
"""The setting that is proposed for everything, spelled out but for ρ, which each layer has its own of."""

FIXED = (*DEFAULT, "--output-damping", f"{RATIO:g}")
"""One ρ for all layers, which is also what diagonals have by default."""


KINDS = (
    ("EF", "ef", "categorical"), ("iEF", "ief", "categorical"), ("truncated, rank 2", "truncated:2", "categorical"),
    ("exact", "exact", "categorical"), ("JᵀJ", "exact", "gaussian"),
)  # fmt: skip
"""Name, and ``--kind`` and ``--likelihood`` of ``fisherkit estimate``."""


@dataclass(frozen=True)
class Method:
    """One merge.

    Args:
        options: of ``fisherkit merge``.
        structure: of its Fishers; "" for none.
        kind: of its Fishers.
        likelihood: of its Fishers.
        based: it needs the common start.
        texts: it needs the tasks' texts.
    """

    options: tuple[str, ...]
    structure: str = ""
    kind: str = "ief"
    likelihood: str = "categorical"
    based: bool = False
    texts: bool = False


def _methods() -> dict[str, Method]:
    plain = ("--normalize", "none", "--output-damping", "0", "--damping", "0.01", *CLOSE)
    found = {"average": Method(("--method", "average"))}
    for scale in (0.5, 1.0):
        options = ("--method", "task-arithmetic", "--scale", f"{scale:g}")
        found[f"task arithmetic, {scale:g}"] = Method(options, based=True)
    for shrink in (1.0, 0.9):
        found[f"RegMean, {shrink:g}"] = Method(("--method", "regmean", "--shrink", f"{shrink:g}"), "kfac")
    for name, kind, likelihood in KINDS:
        found[f"kfac, {name}"] = Method(DEFAULT, "kfac", kind, likelihood)
    for name, kind, likelihood in KINDS:
        found[f"kfac, {name}, ρ = {RATIO:g}"] = Method(FIXED, "kfac", kind, likelihood)
    for name, kind, _ in (KINDS[1], KINDS[3]):
        own = ("--method", "layers", "--kind", kind, "--examples", "200")
        found[f"layer after layer, kfac, {name}, 200 texts"] = Method(own, texts=True)
    for name, kind, likelihood in (KINDS[1], KINDS[3]):
        found[f"kfac, {name}, as it is"] = Method(plain, "kfac", kind, likelihood)
        found[f"diagonal, {name}"] = Method(FIXED, "diagonal", kind, likelihood)
        found[f"diagonal, {name}, as it is"] = Method(plain, "diagonal", kind, likelihood)
    return found


METHODS: Mapping[str, Method] = _methods()
"""By name, in the tables' order."""

FEW: Mapping[str, Method] = {name: METHODS[name] for name in ("average", "kfac, iEF")}
"""Every command."""
