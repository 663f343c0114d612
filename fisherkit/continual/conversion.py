"""Other libraries' strength of EWC in ours.

Owns the facts in which definitions of EWC differ, and what they amount to.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from fisherkit.arguments import check_choice, check_count, check_number
from fisherkit.errors import InvalidArgumentError
from fisherkit.operators import FisherOperator
from fisherkit.operators.normalization import check_normalize, normalization_factor

CALL = "convert_strength"


@dataclass(frozen=True)
class Convention:
    """How a library defines its penalty k · strength · (θ − θ*)ᵀ diag(F) (θ − θ*).

    Args:
        half: k = ½ and not 1.
        average: what the sum of squared gradients is divided by: "examples", "batches", or "sum" for nothing.
        squared: the gradient of each "example", or of the mean loss of each "batch".
        kinds: of our Fishers, those that it squares the gradients of.
    """

    half: bool = True
    average: str = "examples"
    squared: str = "example"
    kinds: tuple[str, ...] = ("ef",)


# Read in November 2026, at each project's main branch.
CONVENTIONS: dict[str, Convention] = {
    "paper": Convention(),  # Kirkpatrick et al., arXiv 1612.00796, eq. 3
    "avalanche": Convention(half=False, average="batches", squared="batch"),  # EWCPlugin
    "facil": Convention(half=True, average="batches", squared="batch"),  # approach ewc
    "kuc2477": Convention(),  # pytorch-ewc
    "mammoth": Convention(half=False),  # ewc_on, but for a weight of each example
    # continual-learning, with its fisher_batch of 1; its default takes all labels, weighted by their probabilities.
    "vandeven": Convention(kinds=("ef", "exact")),
}


def convert_strength(
    strength: float,
    source: str = "paper",
    *,
    half: bool | None = None,
    average: str | None = None,
    squared: str | None = None,
    batch_size: int | None = None,
    examples: int | None = None,
    normalize: str | None = None,
    fisher: FisherOperator | None = None,
) -> float:
    """The strength with which `EWC` has the penalty that another library has with its own.

    The penalties are then equal for one task, with the diagonal empirical Fisher here. Squares of batch gradients are
    another quantity, which no factor makes equal: for independent examples whose mean gradient is 0, as at a minimum,
    they are F/B in expectation, and that is what is assumed. Where it is not 0 they are more, up to F.

    Args:
        strength: the other library's.
        source: "paper", "avalanche", "facil", "kuc2477", "mammoth" or "vandeven"; `docs/continual.md` has the details.
        half: whether the other penalty has a factor ½; None as the source.
        average: what its sum of squares is divided by: "examples", "batches", or "sum" for nothing.
        squared: whose gradient it squares: each "example"'s, or the mean loss's of each "batch".
        batch_size: B, of the batches over which its Fisher is computed; needed where batches matter.
        examples: N; needed for "sum".
        normalize: of the `EWC` that is to get the strength.
        fisher: the empirical Fisher of the task ("vandeven": or the exact one), normalization="mean", not yet
            normalised; needed unless ``normalize`` is None.

    Returns:
        strength · 2k · α / c, with k its ½ or 1, α its Fisher's multiple of F, c what normalising multiplies F by.

    Raises:
        InvalidArgumentError: an unknown source or fact, one that is needed and missing, or a Fisher of another kind.
        InvalidTypeError: not a number, or not a FisherOperator.
    """
    strength = check_number(CALL, "strength", strength)
    check_choice(CALL, "source", source, list(CONVENTIONS), try_="half=, average= and squared= of your library")
    given: dict[str, Any] = {"half": half, "average": average, "squared": squared}
    convention = replace(CONVENTIONS[source], **{name: fact for name, fact in given.items() if fact is not None})
    multiple = _multiple(convention, batch_size, examples)
    return strength * (1 if convention.half else 2) * multiple / _normalization(normalize, fisher, convention.kinds)


def _multiple(convention: Convention, batch_size: int | None, examples: int | None) -> float:
    """α of the other Fisher = α F, F the mean over examples of squared example gradients."""
    check_choice(CALL, "average", convention.average, ("examples", "batches", "sum"))
    check_choice(CALL, "squared", convention.squared, ("example", "batch"))
    by_batch = convention.squared == "batch"
    B = _needed("batch_size", batch_size) if by_batch or convention.average == "batches" else 1
    # A batch has one square of about F/B in place of B squares of F.
    total = 1 / B**2 if by_batch else 1.0  # of the sum over all, divided by N
    if convention.average == "batches":
        return total * B
    return total * _needed("examples", examples) if convention.average == "sum" else total


def _needed(name: str, value: int | None) -> int:
    """A count that the other library's Fisher depends on."""
    if value is None:
        raise InvalidArgumentError(
            CALL, f"{name}=None", "an integer, 1 or more", why="the size of its Fisher depends on it",
            try_=f"{name}= as you have it there",
        )  # fmt: skip
    check_count(CALL, name, value)
    return value


def _normalization(normalize: str | None, fisher: FisherOperator | None, kinds: tuple[str, ...]) -> float:
    check_normalize(normalize, CALL)
    if fisher is None:
        if normalize is None:
            return 1.0
        raise InvalidArgumentError(
            CALL, f"normalize={normalize!r} without fisher=", "the task's Fisher",
            why="other libraries do not normalise, so the strength depends on the Fisher's size",
            try_="fisher=, or normalize=None for an EWC that does not normalise either",
        )  # fmt: skip
    factor = normalization_factor(fisher, normalize, CALL)
    if fisher.metadata.get("normalization") == "sum":
        raise InvalidArgumentError(CALL, 'a Fisher with normalization="sum"', 'normalization="mean"')
    if "terms" in fisher.metadata:
        raise InvalidArgumentError(
            CALL, f"a sum or multiple, {fisher.metadata['terms']}", "a Fisher as it was built",
            why="its trace gives the strength, and a factor would be taken for the task's",
        )  # fmt: skip
    if (kind := fisher.metadata.get("kind", "ef")) not in kinds:
        raise InvalidArgumentError(
            CALL, f"a Fisher of kind {kind!r}", f"one of kind {' or '.join(map(repr, kinds))}",
            why="its trace gives the strength, and kinds differ in it by orders of magnitude",
            try_='fk.EmpiricalFisher(model, data, structure="diagonal"); EWC may then consolidate any kind',
        )  # fmt: skip
    return factor
