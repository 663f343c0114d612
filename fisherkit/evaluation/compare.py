"""`compare`: every kind's update on one batch, judged by the exact Fisher; the table of it, its mean, its picture.

The updates are the paper's (Wu, Yu, Zhang, Woodland, arXiv 2406.06420, eq. 5, 8 and 49). Where the gradient is a known
combination ∇L = Jᵀc of the rows, (JᵀJ + λI)⁻¹∇L = Jᵀ(JJᵀ + λI)⁻¹c: nothing cancels however small λ is. Where it is not,
it is split into its part in the rows' span and the rest, which no row sees and λ alone divides.

The picture needs matplotlib, imported when it is drawn: ``pip install ".[demo]"``.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from fisherkit.arguments import check_number, check_type
from fisherkit.arithmetic import without_autocast
from fisherkit.data import Batch
from fisherkit.errors import InvalidArgumentError, InvalidTypeError, MemoryBudgetError, MissingPackageError, listed
from fisherkit.evaluation.quality import approximation_quality
from fisherkit.fisher import FisherApproximation
from fisherkit.io import as_path, check_folder, replacing
from fisherkit.likelihoods import Likelihood
from fisherkit.model_inputs import ModelInputs
from fisherkit.operators.damped_gram import damped_cholesky
from fisherkit.outputs import OutputRule, Outputs, OutputVectors
from fisherkit.rows.collection import Rows
from fisherkit.space import Selection
from fisherkit.structures import structure_named
from fisherkit.vectors import EmpiricalVectors, rule_of


@dataclass(frozen=True)
class QualityRow:
    """One update and how good it is.

    Args:
        kind: as it was asked for, "truncated:3" for example.
        structure: of its Fisher; "none" for "sgd".
        damping: λ, added to the Gram matrix ("full", "block") or to the Fisher (the others); None for "sgd".
        gamma: γ (eq. 15), in the sum normalization.
        relative_gamma: γ/γ_SGD; below 1 is better than the gradient.
        update_norm: ‖Δ‖₂.
        imbalance: standard deviation of the examples' ‖∇_θ ℓ_n‖ over their mean, a property of the batch. EF's
            step along an example's gradient goes as 1/‖∇_θ ℓ_n‖: the larger this is, the more biased EF.
        rows: R, rows of its Fisher; 0 for "sgd".
        seconds: time that the updates of this kind and structure took, all dampings together, without what kinds share.
    """

    kind: str
    structure: str
    damping: float | None
    gamma: float
    relative_gamma: float
    update_norm: float
    imbalance: float
    rows: int
    seconds: float


_PLAIN: dict[str, Any] = {
    "str": str, "int": int, "float": float | int, "float | None": float | int | None, "tuple[QualityRow, ...]": tuple,
}  # fmt: skip
"""What values of a table's fields are."""


@dataclass(frozen=True)
class QualityTable:
    """How good every kind's update is on one batch.

    Args:
        rows: one for each kind, structure and damping.
        examples: N.
        dropped: examples that the updates left out as near-duplicates.
        seconds: of the whole comparison.
    """

    rows: tuple[QualityRow, ...]
    examples: int
    dropped: int
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, strings and lists, ready for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, found: Mapping[str, Any]) -> QualityTable:
        """The inverse of `to_dict`.

        Raises:
            InvalidArgumentError: it is damaged, or no table's.
        """
        try:
            rows = tuple(QualityRow(**row) for row in found["rows"])
            table = cls(rows, found["examples"], found["dropped"], found["seconds"])
            parts: tuple[QualityTable | QualityRow, ...] = (table, *rows)
            values = [(f, getattr(one, f.name)) for one in parts for f in fields(one)]
            odd = [f"{f.name}={value!r}" for f, value in values if not isinstance(value, _PLAIN[str(f.type)])]
        except (LookupError, TypeError) as error:
            odd = [repr(error)]
        if odd:
            raise InvalidArgumentError(
                "QualityTable.from_dict", f"a damaged table ({listed(odd, 4)})", "what to_dict() gave"
            )
        return table

    def __str__(self) -> str:
        dropped = f", {self.dropped} of them left out of the updates as near-duplicates" if self.dropped else ""
        cells: list[tuple[str, ...]] = [("kind", "structure", "damping", "γ", "γ/γ_SGD", "‖Δ‖", "rows", "ms")]
        for row in self.rows:
            numbers = (f"{value:.4g}" for value in (row.gamma, row.relative_gamma, row.update_norm))
            damping = "" if row.damping is None else f"{row.damping:g}"
            cells.append((row.kind, row.structure, damping, *numbers, f"{row.rows:,}", f"{1e3 * row.seconds:.3g}"))
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        aligned = ("ljust", "ljust", *["rjust"] * (len(widths) - 2))
        lines = [
            "  ".join(getattr(cell, way)(width) for cell, way, width in zip(line, aligned, widths, strict=True))
            for line in cells
        ]
        imbalance = f"gradient-norm imbalance {self.rows[0].imbalance:.3g}" if self.rows else "no rows"
        return "\n".join([f"N = {self.examples} examples{dropped}; {imbalance}", "", *lines])


Key = tuple[str, str, float | None]
"""Kind, structure and damping."""


def average(tables: Sequence[QualityTable]) -> dict[Key, tuple[float, float]]:
    """γ/γ_SGD over several batches: the mean and the standard deviation, 0 for a single batch.

    Args:
        tables: of the same kinds, structures and dampings.

    Raises:
        InvalidTypeError: no tables.
        InvalidArgumentError: none of them, or tables of different updates.
    """
    if not isinstance(tables, Sequence) or not all(isinstance(table, QualityTable) for table in tables):
        raise InvalidTypeError("average(tables)", f"a {type(tables).__name__}", "a list of what compare() made")
    keys = [[(row.kind, row.structure, row.damping) for row in table.rows] for table in tables]
    if not tables or any(other != keys[0] for other in keys):
        raise InvalidArgumentError(
            "average(tables)", "no table" if not tables else "tables of different kinds, structures or dampings",
            "tables that compare() made with the same arguments on different batches",
        )  # fmt: skip
    found: dict[Key, tuple[float, float]] = {}
    for key, rows in zip(keys[0], zip(*(table.rows for table in tables), strict=True), strict=True):
        values = [row.relative_gamma for row in rows]
        found[key] = statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0
    return found


# -- its picture -------------------------------------------------------------------------------------------------------


# Okabe and Ito, "Color universal design" (2008): told apart with any colour vision; the markers say the same again.
_COLOURS = ("#D55E00", "#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#000000", "#8C6D1F", "#777777")
_MARKERS = ("s", "^", "v", "o", "D", "P", "x", "h", "*")


def plot_damping(tables: QualityTable | Sequence[QualityTable], path: str | Path) -> None:
    """γ/γ_SGD of every kind against the damping, a panel for each structure; both axes logarithmic.

    Args:
        tables: one table, or those of several batches, whose mean is drawn with a band of one standard deviation.
        path: of the picture; its ending chooses the format. A reader finds the old file or the whole new one.

    Raises:
        InvalidArgumentError: the folder does not exist, or the tables have no update with a damping.
        MissingPackageError: matplotlib is not installed.
    """
    check_folder(path := as_path(path, "plot_damping(path)"), "plot_damping(path)")
    found = average([tables] if isinstance(tables, QualityTable) else tables)
    values = {key: value for key, value in found.items() if key[2] is not None}
    if not values:
        raise InvalidArgumentError("plot_damping", 'tables of "sgd" alone', "a kind with a damping")
    kinds, structures, _ = ([*dict.fromkeys(part)] for part in zip(*values, strict=True))
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import LogLocator, ScalarFormatter
    except ImportError as error:
        missing = MissingPackageError.of(__name__, "matplotlib", "demo", error)
        raise missing from error

    figure = Figure(figsize=(1.6 + 4.2 * len(structures), 4.2), layout="constrained", dpi=150)
    figure.subplots(1, len(structures), sharey=True, squeeze=False)
    for axes, structure in zip(figure.axes, structures, strict=True):
        for number, kind in enumerate(kinds):
            style: dict[str, Any] = {"color": _COLOURS[number % len(_COLOURS)]}
            points = sorted((key[2], *value) for key, value in values.items() if key[:2] == (kind, structure))
            dampings, means, deviations = ([*part] for part in zip(*points, strict=True))
            axes.plot(dampings, means, label=kind, marker=_MARKERS[number % len(_MARKERS)], **style)
            if any(deviations):
                # In logarithms, as the axis is: the band stays positive.
                ratios = [1 + d / m for m, d in zip(means, deviations, strict=True)]
                low = [m / r for m, r in zip(means, ratios, strict=True)]
                high = [m * r for m, r in zip(means, ratios, strict=True)]
                axes.fill_between(dampings, low, high, alpha=0.12, linewidth=0, **style)
        axes.set(xscale="log", yscale="log", xlabel="damping λ", title=structure)
        # 1, 2 and 5 of every decade, written out: one decade often holds everything.
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(ScalarFormatter())
        axes.yaxis.set_minor_locator(LogLocator(subs=()))
        axes.axhline(1, color="#777777", linewidth=1, zorder=1)
        axes.grid(visible=True, color="#E8E8E8")
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].set_ylabel(r"$\gamma\,/\,\gamma_{\mathrm{SGD}}$  (lower is better)")
    figure.axes[-1].legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    with replacing(path) as part:
        figure.savefig(part, format=path.suffix.lstrip(".") or "png")


# -- the comparison ----------------------------------------------------------------------------------------------------


CALL = "compare"
EXACT, SGD = "exact", "sgd"
"""The kind that judges, and the gradient itself, which no Fisher preconditions."""


@without_autocast()
def compare(
    model: nn.Module,
    batch: Any,
    *,
    kinds: Sequence[str | OutputRule] = ("sgd", "ef", "ief", "sf", "exact"),
    structures: Sequence[str] = ("full",),
    gram_dampings: Sequence[float] = (1e-7, 1e-5, 1e-3, 1e-1),
    likelihood: str | Likelihood | nn.Module = "categorical",
    params: Selection = None,
    example: str = "sequence",
    shift_labels: bool | None = None,
    drop_duplicates: float | None = None,
    seed: int = 0,
) -> QualityTable:
    """γ and γ/γ_SGD of the update of every kind, in every structure, at every damping.

    All in the paper's sum normalization, ∇L = Σ_n ∇ℓ_n and F = Σ_n (no 1/N). With J the rows ∇ℓ_n (unscaled),
    s_n = ‖∂ℓ_n/∂z_n‖^(2·power) and Ĵ the rows of a Fisher F = ĴᵀĴ, the updates of the full structure are the paper's
    (arXiv 2406.06420, eq. 5, 8, 49):

    - "sgd": ∇L
    - "ef": Jᵀ(JJᵀ + λI)⁻¹1
    - "ief": Jᵀ(JJᵀ + λI)⁻¹s
    - "sf", "truncated", "exact": (F + λI)⁻¹∇L = (1/λ)[I − Ĵᵀ(ĴĴᵀ + λI)⁻¹Ĵ]∇L, computed so that small λ does not cancel

    "block" is the same module by module; "diagonal", "kfac" and "ekfac" are (F + λI)⁻¹∇L with that structure of the
    kind, which for "ief" is the paper's ieKFAC.

    Args:
        model: any module; read, never changed.
        batch: one batch with targets, (inputs, targets) or a mapping with "labels".
        kinds: "sgd", "ef", "ief", "sf", "truncated" and "exact", with a setting after a colon: "ief:0.5" (power),
            "sf:4" (draws; 1 if none), "truncated:3" (rank; 2 if none), "truncated:0.01" (tolerance, with a point);
            or an `OutputRule` of your own.
        structures: of "full", "block", "diagonal", "kfac" and "ekfac".
        gram_dampings: λ > 0, each for every kind and structure but "sgd".
        likelihood: the loss module that you train with, as ``nn.CrossEntropyLoss(...)``, or a name, "categorical",
            "gaussian", "bernoulli" or "poisson", or an object of `fisherkit.likelihoods`.
        params: which parameters: None for all that require grad, names, or a predicate ``(name, parameter) -> bool``.
        example: "sequence": one example a batch element; "token": one an unmasked position.
        shift_labels: labels belong to the outputs one position before them; None: as the model says of itself.
        drop_duplicates: None to keep every example. Else a cosine in (0, 1): an example whose gradient has a larger
            absolute cosine with that of an earlier kept one is left out of the updates of all kinds but "sgd" and
            "exact", as if the batch did not have it. γ is judged on the whole batch all the same. γ of ill-conditioned
            kinds depends on it, so the table says how many were dropped. Of tokens only "ef" and "ief" in "full" and
            "block" can leave some out.
        seed: of sampled labels.

    Returns:
        A table: the gradient's row first, if asked for, then one for each structure, kind and damping, nested in that
        order.

    Raises:
        InvalidTypeError: an argument of the wrong type.
        InvalidArgumentError: an unknown kind or structure, a damping that is not positive, a cosine outside (0, 1).
        DataError: no example, no targets, or targets that do not fit.
        ModelError: dropout or batch statistics in train mode.
        MemoryBudgetError: gradients of single examples that do not fit in memory, or a structure that does not.

    Cost: one Fisher of each kind, whose rows "full" and "block" share; for each of these two a Gram matrix of its R
    rows and O(R³) a damping; another Fisher for each other structure. Where "exact" is not among the full or block
    kinds, γ is measured by passes over the batch, a few for each update, and the exact Fisher's rows are not made.
    """
    check_type(CALL, "model", model, nn.Module, "a torch.nn.Module")
    check_number(CALL, "seed", seed, least=-math.inf, integer=True)
    near = "0.99 for near-duplicates alone"
    check_number(CALL, "drop_duplicates", drop_duplicates, most=1, above=True, below=True, optional=True, try_=near)
    others = [kind for kind in _listed("kinds", kinds) if kind != SGD]
    found = [rule_of(kind, call=CALL, also=(SGD,)) for kind in others]
    texts = [
        k if isinstance(k, str) else rule.spelled(rule.kind_options()) for k, rule in zip(others, found, strict=True)
    ]
    rules = {text: rule.with_seed(seed) for text, rule in zip(texts, found, strict=True)}
    why, listed = "a Fisher with fewer rows than parameters is singular", _listed("gram_dampings", gram_dampings)
    dampings = tuple(check_number(CALL, "gram damping", value, above=True, why=why) for value in listed)
    for structure in _listed("structures", structures):
        structure_named(structure, CALL)
    if isinstance(batch, list) and batch and not isinstance(batch[0], Tensor):
        raise InvalidTypeError(
            CALL, f"a list of {len(batch)} batches", "one batch, (inputs, targets) or a mapping",
            try_="[compare(model, batch) for batch in batches], and fk.evaluation.average",
        )  # fmt: skip
    start = time.perf_counter()
    options = {
        "likelihood": likelihood, "params": params, "example": example, "shift_labels": shift_labels,
        "group": False,  # one batch, in this process
    }  # fmt: skip
    own = Batch.of(batch, "batch", model_inputs=ModelInputs.of(model))
    comparison = _Comparison(model, own, options, drop_duplicates)
    updates = [
        comparison.update(text, rule, structure, dampings) for structure in structures for text, rule in rules.items()
    ]
    return comparison.judged(updates, start, sgd=SGD in kinds)


@dataclass(frozen=True)
class _Update:
    """Updates of one kind in one structure, a column for each damping."""

    kind: str
    structure: str
    dampings: tuple[float | None, ...]
    columns: Float[Tensor, "D K"]
    rows: int
    seconds: float


class _Gradients(EmpiricalVectors):
    """∇ℓ_n of every unit; ``seen`` has ‖∂ℓ_n/∂z_n‖ and the unit's place in the batch."""

    def __init__(self) -> None:
        self.seen: list[tuple[Tensor, Tensor]] = []

    def output_vectors(self, outputs: Outputs) -> OutputVectors:
        if int(outputs.keys[0, 0]) == 0:  # a pass begins
            self.seen.clear()
        found, counts = super().output_vectors(outputs), outputs.mask.any(1)
        norms = outputs.gradient().double().flatten(1).norm(dim=1)
        # A key is the example's place times 2²⁴ plus the position.
        self.seen.append((norms[counts], (outputs.keys[:, 0] >> 24)[counts]))
        return found


class _Comparison:
    """What all updates on a batch share: the gradient of every example, and the Fishers whose rows were made."""

    def __init__(self, model: nn.Module, batch: Batch, options: dict[str, Any], cosine: float | None) -> None:
        self.model, self.options = model, options
        self.fishers: dict[str, FisherApproximation] = {}
        kind = _Gradients()
        gradients = FisherApproximation(model, batch.raw, kind, normalization="sum", **options)
        norms, places = map(torch.cat, zip(*kind.seen, strict=True))
        rows = _rows(gradients)
        if rows is None:
            raise MemoryBudgetError(
                CALL, f"{gradients.rows:,} rows that do not fit in memory", "rows that do",
                try_="a smaller batch, or params= to choose fewer parameters",
            )  # fmt: skip
        self.gram = rows.gram()
        kept = torch.ones_like(self.gram[0], dtype=torch.bool) if cosine is None else _distinct(self.gram, cosine)
        self.dropped = int((~kept).sum())
        self.rows = rows if self.dropped == 0 else rows.reordered(kept.nonzero()[:, 0])
        self.norms = norms[kept]
        self.whole, self.gradient = _sum(rows), _sum(self.rows)
        self.dtype, self.data = gradients.dtype, batch.raw
        self.kept_data = batch.take(places[kept].cpu()).raw if self.dropped else batch.raw

    def update(self, kind: str, rule: OutputRule, structure: str, dampings: tuple[float, ...]) -> _Update:
        start = time.perf_counter()
        rows, power, chosen = None, rule.gradient_power, structure_named(structure, CALL)
        gradient = self.whole if rule.of_hessian else self.gradient
        formula = partial(any_gradient, dampings=dampings, rounding=torch.finfo(self.dtype).eps)
        if chosen.of_all_rows:
            rows = self.rows if power is not None else _rows(self._fisher(kind, rule))
        if rows is None:
            # By a solve of its own; a full Fisher's rows may not fit, and a block one is refused then.
            whole = chosen.of_all_rows and not chosen.in_parts
            fisher = self._fisher(kind, rule) if whole else self._built(kind, rule, structure)
            right = gradient.to(self.dtype)
            columns, count = torch.stack([fisher.solve(right, damping) for damping in dampings], 1), fisher.rows
        else:
            if power is not None:
                formula = partial(in_span, c=self.norms ** (2 * power), dampings=dampings)
            # By modules, those together that share a unit of rows.
            modules = rows.space.joined_blocks(slot.names for slot in rows.slots)
            columns = torch.zeros(rows.space.size, len(dampings), dtype=gradient.dtype, device=gradient.device)
            for names in modules if chosen.in_parts else [rows.space.names]:
                rows.space.put(columns, names, formula(rows.part(names), rows.space.take(gradient, names)))
            count = rows.count
        return _Update(kind, structure, dampings, columns.double(), count, time.perf_counter() - start)

    def judged(self, updates: Sequence[_Update], start: float, *, sgd: bool) -> QualityTable:
        """γ of all updates by one product with the exact Fisher, and of the gradient, which has a row if asked for."""
        listed = [_Update(SGD, "none", (None,), self.whole.unsqueeze(1), 0, 0.0), *updates]
        columns = torch.cat([update.columns for update in listed], 1)
        lengths = columns.norm(dim=0)
        # γ does not depend on the length, which could overflow the operator's dtype.
        unit = (columns / torch.where(lengths > 0, lengths, 1.0)).to(self.dtype)
        exact = self.fishers.get(EXACT) or FisherApproximation(
            self.model, self.data, EXACT, normalization="sum", storage="stream", **self.options
        )
        gamma = approximation_quality(unit, exact, self.whole.to(self.dtype))
        norms = self.gram.diagonal().clamp_min(0).sqrt()
        imbalance = float(norms.std(correction=0) / norms.mean())
        values = iter(zip(gamma.tolist(), (gamma / gamma[0]).tolist(), lengths.tolist(), strict=True))
        rows = [
            QualityRow(u.kind, u.structure, damping, *next(values), imbalance, u.rows, u.seconds)
            for u in listed
            for damping in u.dampings
        ]
        return QualityTable(tuple(rows if sgd else rows[1:]), len(norms), self.dropped, time.perf_counter() - start)

    def _fisher(self, kind: str, rule: OutputRule) -> FisherApproximation:
        if kind not in self.fishers:
            self.fishers[kind] = self._built(kind, rule, "full")
        return self.fishers[kind]

    def _built(self, kind: str, rule: OutputRule, structure: str) -> FisherApproximation:
        whole = rule.of_hessian or not self.dropped
        if not whole and self.options["example"] == "token":
            raise InvalidArgumentError(
                CALL, f'drop_duplicates with example="token", kind {kind!r}, structure {structure!r}',
                'kinds "ef" and "ief" in "full" and "block", or example="sequence"',
                why="single tokens cannot be taken out of the data that a Fisher is built from",
            )  # fmt: skip
        data = self.data if whole else self.kept_data
        try:
            return FisherApproximation(self.model, data, rule, structure=structure, normalization="sum", **self.options)
        except InvalidArgumentError as error:  # of this kind or structure: the gradients' Fisher has the same options
            raise InvalidArgumentError(
                f"{CALL}, kind {kind!r}, structure {structure!r}", error.got, error.expected, why=error.why,
                try_="kinds= or structures= without it",
            ) from error  # fmt: skip


def in_span(
    rows: Rows, gradient: Float[Tensor, "D"], *, c: Float[Tensor, "R"], dampings: Sequence[float]
) -> Float[Tensor, "D K"]:
    """Jᵀ(JJᵀ + λI)⁻¹c for every λ, by the smaller of the R × R and the D × D matrix; the gradient is not asked for."""
    if rows.space.size < rows.count:
        normal, right = rows.normal_matrix(), rows.rmatmul(c.unsqueeze(1))[:, 0]
        return torch.stack([_solve(normal, right, damping) for damping in dampings], 1)
    gram = rows.gram()
    return rows.rmatmul(torch.stack([_solve(gram, c, damping) for damping in dampings], 1))


def any_gradient(
    rows: Rows, gradient: Float[Tensor, "D"], *, dampings: Sequence[float], rounding: float
) -> Float[Tensor, "D K"]:
    """(JᵀJ + λI)⁻¹g for every λ, by g's part in the rows' span and the rest, where that is more than rounding."""
    values, vectors = torch.linalg.eigh(rows.gram())
    seen = values > len(values) * torch.finfo(torch.float64).eps * values[-1].clamp_min(0)
    inverse = torch.where(seen, 1 / torch.where(seen, values, 1.0), 0.0)
    inner = inverse * (vectors.mT @ rows.matmul(gradient.unsqueeze(1))[:, 0])
    w = [inner / (torch.where(seen, values, 0.0) + damping) for damping in dampings]
    # The last column is g's part in the span.
    found = rows.rmatmul(vectors @ torch.stack([*w, inner], 1))
    rest = gradient - found[:, -1]
    if rest.norm() <= 100 * rounding * gradient.norm():
        return found[:, :-1]
    return found[:, :-1] + rest.unsqueeze(1) / rest.new_tensor(list(dampings))


def _rows(fisher: FisherApproximation) -> Rows | None:
    """A full Fisher's rows in float64; None if they are streamed."""
    return None if fisher.stored_rows is None else fisher.stored_rows[0].double()


def _sum(rows: Rows) -> Float[Tensor, "D"]:
    return rows.rmatmul(torch.ones(rows.count, 1, dtype=torch.float64, device=rows.device))[:, 0]


def _solve(matrix: Float[Tensor, "n n"], c: Float[Tensor, "n"], damping: float) -> Float[Tensor, "n"]:
    """(A + λI)⁻¹c; through the eigenvalues where λ is below the rounding of a singular A."""
    factor, failed = damped_cholesky(matrix.clone(), damping)
    if not bool(failed):
        return torch.cholesky_solve(c.unsqueeze(1), factor)[:, 0]
    values, vectors = torch.linalg.eigh(matrix)
    return vectors @ ((vectors.mT @ c) / (values.clamp_min(0) + damping))


def _distinct(gram: Float[Tensor, "N N"], cosine: float) -> Bool[Tensor, "N"]:
    """Units whose gradient has no larger absolute cosine with an earlier one that is kept."""
    norms = gram.diagonal().clamp_min(0).sqrt()
    norms = torch.where(norms > 0, norms, 1.0)
    close = ((gram / norms / norms.unsqueeze(1)).abs() > cosine).cpu()
    kept = torch.ones(len(gram), dtype=torch.bool)
    for n in range(len(gram)):
        kept[n] = not bool((close[n, :n] & kept[:n]).any())
    return kept.to(gram.device)


def _listed(name: str, values: Sequence[Any]) -> Sequence[Any]:
    """The values, once they are known to be a list, not empty, of each once."""
    if isinstance(values, str) or not isinstance(values, Sequence):
        raise InvalidTypeError(CALL, f"{name} of type {type(values).__name__}", "a sequence", try_=f'{name}=("...",)')
    if not values:
        raise InvalidArgumentError(CALL, f"no {name}", "at least one")
    repeated = [value for value in values if values.count(value) > 1]
    if repeated:
        raise InvalidArgumentError(CALL, f"{name} with {repeated[0]!r} twice", "each once")
    return values
