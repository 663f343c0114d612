"""Which merges of text models are measured, each as the options of the ``fisherkit`` commands."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from examples.merging.methods import DAMPING, RATIO

DEFAULT = ("--normalize", "block", "--output-damping", f"{RATIO:g}", "--damping", f"{DAMPING:g}")
"""The setting that is proposed for everything, spelled out."""


@dataclass(frozen=True)
class Method:
    """One merge.

    Args:
        options: of ``fisherkit merge``.
        structure: of its Fishers; "" for none.
        kind: of its Fishers.
        likelihood: of its Fishers.
        based: it needs the common start.
    """

    options: tuple[str, ...]
    structure: str = ""
    kind: str = "ief"
    likelihood: str = "categorical"
    based: bool = False


def _setting(normalize: str, ratio: float, damping: float) -> tuple[str, ...]:
    return "--normalize", normalize, "--output-damping", f"{ratio:g}", "--damping", f"{damping:g}"


def _methods() -> dict[str, Method]:
    found = {"average": Method(("--method", "average"))}
    for scale in (0.2, 0.5, 1.0):
        options = ("--method", "task-arithmetic", "--scale", f"{scale:g}")
        found[f"task arithmetic, {scale:g}"] = Method(options, based=True)
    for shrink in (1.0, 0.9):
        found[f"RegMean, {shrink:g}"] = Method(("--method", "regmean", "--shrink", f"{shrink:g}"), "kfac")
    for structure in ("kfac", "diagonal"):
        for name, kind, likelihood in (
            ("EF", "ef", "categorical"), ("iEF", "ief", "categorical"), ("truncated, rank 2", "truncated:2", "categorical"),
            ("SF", "sf", "categorical"), ("exact", "exact", "categorical"), ("JᵀJ", "exact", "gaussian"),
        ):  # fmt: skip
            found[f"{structure}, {name}"] = Method(DEFAULT, structure, kind, likelihood)
            if structure == "diagonal" or kind in ("ef", "exact", "ief") and likelihood == "categorical":
                plain = _setting("none", 0.0, 1e-2)
                found[f"{structure}, {name}, as it is"] = Method(plain, structure, kind, likelihood)
    for ratio in (1.0, 10.0):
        found[f"kfac, iEF, ρ = {ratio:g}"] = Method(_setting("block", ratio, DAMPING), "kfac")
    for damping in (1e-3, 0.3):
        found[f"kfac, iEF, λ = {damping:g}"] = Method(_setting("block", RATIO, damping), "kfac")
    return found


METHODS: Mapping[str, Method] = _methods()
"""By name, in the tables' order."""

FEW: Mapping[str, Method] = {
    name: METHODS[name] for name in ("average", "task arithmetic, 0.5", "RegMean, 0.9", "kfac, iEF")
}
"""Every command."""
