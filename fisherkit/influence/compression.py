"""Rows in the leading eigenvectors of each layer's Kronecker factors: fewer numbers, and how far scores are off then.

In its eigenvectors a layer's F is a diagonal, so compressed rows meet an operator over the numbers that are kept, as
whole rows meet F. Layers without factors keep their rows and their part of F. Owns the choice of eigenvectors, the file
that holds them and the measured error; knows no data.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fisherkit import io
from fisherkit.arguments import check_count, check_number, is_integer
from fisherkit.errors import FileFormatError, InvalidArgumentError, warn
from fisherkit.model_state import tensors_hash
from fisherkit.operators import BlockDiagonalOperator, DiagonalOperator, FisherOperator
from fisherkit.operators.composite import join
from fisherkit.operators.factorization import Factorization
from fisherkit.operators.layer_layout import LayerLayout
from fisherkit.rows.base import StoredRows, UnitRows, spans
from fisherkit.rows.collection import Rows, UnitSlot
from fisherkit.rows.factored import FactoredRows
from fisherkit.space import ParameterSpace

CALL = "prepare(compress)"
FILE = "basis.safetensors"
ALIKE = 1e-3
"""How far, relative to its size, a matrix may be from what a file says of it on the file's eigenvectors."""


@dataclass(frozen=True)
class Compression:
    """How rows are compressed, and how far scores of them are off, measured on whole rows of some examples.

    Args:
        compress: as `InfluenceScores.prepare` was given it.
        bytes: that one example's rows take.
        whole_bytes: that they would take whole.
        whole: parameters whose rows are whole: those of layers without Kronecker factors.
        captured: Σ_n ‖compressed row‖² / Σ_n ‖row‖² in (F + λI)⁻¹.
        error: ‖compressed − whole‖ / ‖whole‖ of a query's scores, the median over the queries.
        worst: the largest of these.
        rank_correlation: Spearman's, of a query's scores by compressed and by whole rows, the median.
        checked: how many training examples these were measured on, spread evenly.
    """

    compress: int | float
    bytes: int
    whole_bytes: int
    whole: tuple[str, ...]
    captured: float
    error: float
    worst: float
    rank_correlation: float
    checked: int

    def __str__(self) -> str:
        whole = f"; whole in {len(self.whole):,} parameters without factors" if self.whole else ""
        return (
            f"{self.bytes:,} bytes an example and not {self.whole_bytes:,}; {100 * self.captured:.3g}% of their "
            f"square in (F + λI)⁻¹; scores off by {self.error:.2g} (median; largest {self.worst:.2g}), rank "
            f"correlation {self.rank_correlation:.3g}, on {self.checked:,} examples{whole}"
        )


@dataclass(frozen=True)
class LayerBasis:
    """Leading eigenvectors of one layer.

    Args:
        names: the layer's parameters.
        layout: where they lie on the grid [outputs, inputs].
        tensors: "inputs" ``[J, r]`` and "outputs" ``[O, s]``, eigenvectors in columns; "values", F's eigenvalues at
            the k entries of the grid [s, r] that are kept; "places" ``[k]``, which these are, if they are not all.
    """

    names: tuple[str, ...]
    layout: LayerLayout
    tensors: dict[str, Tensor]

    @classmethod
    def of(
        cls, block: FisherOperator, bases: tuple[Tensor, Tensor, Tensor], damping: float, compress: int | float,
        positions: int,
    ) -> LayerBasis:  # fmt: skip
        """Of so many eigenvectors a side, or of the fewest pairs with this share of the layer's effective dimension.

        Where so many positions' two factors are fewer numbers, all pairs of the eigenvectors that are chosen are kept.
        """
        on_inputs, on_outputs, values = bases[0], bases[1], bases[2].double()
        if isinstance(compress, int):
            rows = values.sum(1).topk(min(compress, len(values))).indices
            columns = values.sum(0).topk(min(compress, values.shape[1])).indices
            kept = torch.zeros_like(values, dtype=torch.bool)
            kept[rows.unsqueeze(1), columns] = True
        else:
            counts = torch.where(values > 0, values / (values + damping), 0).flatten()
            largest = counts.sort(descending=True, stable=True)
            number = 1 + int((largest.values.cumsum(0) < compress * counts.sum()).sum())
            kept = torch.zeros_like(counts, dtype=torch.bool)
            kept[largest.indices[:number]] = True
            kept = kept.unflatten(0, values.shape)
        rows, columns = kept.any(1), kept.any(0)
        kept = kept[rows][:, columns]
        found = {"inputs": on_inputs[:, columns].contiguous(), "outputs": on_outputs[:, rows].contiguous()}
        values = values[rows][:, columns]
        if not bool(kept.all()) and int(kept.sum()) < positions * sum(kept.shape):
            found["places"] = kept.flatten().nonzero().squeeze(1)
            values = values[kept]
        return cls(block.space.names, _layout(block), {**found, "values": values.flatten()})

    def turned(self, rows: Rows) -> UnitRows:
        """The layer's rows over the eigenvectors."""
        on_inputs, on_outputs, places = self.tensors["inputs"], self.tensors["outputs"], self.tensors.get("places")
        found = rows.slots[0].rows
        if len(rows.slots) == 1 and isinstance(found, FactoredRows):
            parts = list(found.rotated(on_inputs, on_outputs))
            if places is None and parts[0].row_numbers < len(self.tensors["values"]):
                return FactoredRows.cat(parts)
            grids = (part.dense() for part in parts)
        else:
            grids = (
                (on_outputs.mT @ self.layout.to_grid(rows.some(span).dense().mT) @ on_inputs).flatten(1)
                for span in spans(rows.count, 2 * rows.space.size)
            )
        return StoredRows(torch.cat([grid if places is None else grid[:, places] for grid in grids]))

    def check(self, block: FisherOperator) -> None:
        """ValueError unless F is on the eigenvectors what the values say."""
        on_inputs, on_outputs, values = (self.tensors[name] for name in ("inputs", "outputs", "values"))
        grid = on_inputs.new_zeros(on_outputs.shape[1] * on_inputs.shape[1])
        places = self.tensors.get("places", torch.arange(len(grid), device=grid.device))
        grid[places] = torch.randn(len(places), generator=torch.Generator().manual_seed(0)).to(grid)
        expected = values.to(grid) * grid[places]
        product = block._matmat(self.layout.to_flat((on_outputs @ grid.view(1, -1, on_inputs.shape[1])) @ on_inputs.mT))
        found = (on_outputs.mT @ self.layout.to_grid(product) @ on_inputs).flatten()[places]
        if bool((found - expected).norm() > ALIKE * expected.norm()):
            raise ValueError(f"eigenvectors of another Fisher in {', '.join(self.names)}")


class Basis:
    """The leading eigenvectors of all layers that have Kronecker factors, and F on what is kept of rows.

    Args:
        fisher: F.
        damping: λ.
        compress: as `InfluenceScores.prepare` was given it.
        layers: their eigenvectors.
        chosen_at: the λ that they were chosen at; None for ``damping``.
        on_disk: whether a file has them.

    Attributes:
        space: a layer's numbers under its first name, then what is whole.
        inverse: of F + λI, over that.
        whole: the parameters whose rows are whole.
    """

    def __init__(
        self, fisher: FisherOperator, damping: float, compress: int | float, layers: Sequence[LayerBasis],
        chosen_at: float | None = None, on_disk: bool = False,
    ) -> None:  # fmt: skip
        self.fisher, self.damping, self.compress, self.layers = fisher, damping, compress, tuple(layers)
        self.chosen_at, self.on_disk = damping if chosen_at is None else chosen_at, on_disk
        taken = {name for layer in layers for name in layer.names}
        self.whole = tuple(name for name in fisher.space.names if name not in taken)
        rest = fisher.space.restrict(self.whole) if self.whole else ParameterSpace((), ())
        shapes = tuple((len(layer.tensors["values"]),) for layer in layers)
        self.space = ParameterSpace(tuple(layer.names[0] for layer in layers) + rest.names, shapes + rest.shapes)
        blocks: list[FisherOperator] = [
            DiagonalOperator(self.space.restrict(layer.names[:1]), layer.tensors["values"].to(fisher.dtype))
            for layer in layers
        ]
        if self.whole:
            blocks.append(join(rest, [block for block in fisher._blocks() if block.space.names[0] not in taken]))
        self.inverse: Factorization = BlockDiagonalOperator(self.space, blocks).factorize(damping)

    @classmethod
    def of(cls, fisher: FisherOperator, damping: float, compress: int | float, probe: Rows) -> Basis:
        """Chosen anew; the probe is some rows as they are made."""
        found = [(block, bases) for block in fisher._blocks() if (bases := block.eigenbases) is not None]
        home = {name: block for block, _ in found for name in block.space.names}
        if not found or any(len({home.get(name) for name in slot.names}) > 1 for slot in probe.slots):
            raise InvalidArgumentError(
                CALL, "a Fisher without Kronecker factors" if not found else "layers that share parameters",
                "one of layers with eigenvectors of their own, that rows are taken into",
                try_=f'structure="kfac" or "ekfac"; {"shard=False; " * fisher.is_sharded}or whole rows, no compress=',
            )  # fmt: skip
        positions = {s.names[0]: s.rows.positions for s in probe.slots if isinstance(s.rows, FactoredRows)}
        layers = [LayerBasis.of(b, own, damping, compress, positions.get(b.space.names[0], b.size)) for b, own in found]
        return cls(fisher, damping, compress, layers)

    def check(self) -> None:
        """ValueError unless the eigenvectors are those of F."""
        blocks = {block.space.names: block for block in self.fisher._blocks()}
        for layer in self.layers:
            layer.check(blocks[layer.names])

    def refuse_other(self) -> None:
        """Refuse eigenvectors that the first process has chosen for another Fisher, or at another λ."""
        try:
            if not math.isclose(self.damping, self.chosen_at, rel_tol=ALIKE):
                raise ValueError(f"λ = {self.damping:g} and not {self.chosen_at:g}")
            self.check()
        except (LookupError, ValueError) as error:
            raise InvalidArgumentError(
                CALL, f"another Fisher or damping than in the first process ({error})", "the same in all of them",
                why="they compress rows alike",
                try_="a Fisher that all build together, or load from one file, or group=False",
            ) from error  # fmt: skip

    def turned(self, rows: Rows) -> Rows:
        """Rows over `space`."""
        taken = {name for layer in self.layers for name in layer.names}
        slots = [UnitSlot(layer.names[:1], layer.turned(rows.part(layer.names))) for layer in self.layers]
        return Rows(self.space, [*slots, *(slot for slot in rows.slots if slot.names[0] not in taken)])

    # -- in a file -----------------------------------------------------------------------------------------------------

    @property
    def tensors(self) -> dict[str, Tensor]:
        """All of the layers' tensors."""
        return {f"{i}.{name}": t for i, layer in enumerate(self.layers) for name, t in layer.tensors.items()}

    @property
    def settings(self) -> dict[str, Any]:
        """What compressed rows depend on, as JSON has it."""
        return {"compress": self.compress, "basis": tensors_hash(self.tensors)}

    def write(self, path: Path) -> None:
        """Write it, whole or not at all."""
        names = [layer.names for layer in self.layers]
        header = {
            "format": f"{io.FORMAT}-basis", "compress": json.dumps(self.compress), "names": json.dumps(names),
            "damping": json.dumps(self.chosen_at),
        }  # fmt: skip
        io.replace_checked_file(path, self.tensors, header)

    @classmethod
    def read_whole(cls, path: Path, fisher: FisherOperator, damping: float) -> Basis | None:
        """As `read`; None where no file is there as it was written."""
        try:
            found = io.read_tensors(path, fisher.device, CALL, "prepare")
        except FileFormatError:
            return None
        return cls._of_file(path, found, fisher, damping)

    @classmethod
    def read(cls, path: Path, fisher: FisherOperator, damping: float) -> Basis:
        """One that was written for this Fisher."""
        try:
            found = io.read_tensors(path, fisher.device, CALL, "prepare")
        except FileFormatError as error:
            raise damaged(path, error.got) from error
        return cls._of_file(path, found, fisher, damping)

    @classmethod
    def _of_file(
        cls, path: Path, found: tuple[Mapping[str, str], Mapping[str, Tensor]], fisher: FisherOperator, damping: float
    ) -> Basis:
        header, tensors = found
        try:
            blocks = {block.space.names: block for block in fisher._blocks()}
            layers = []
            for i, names in enumerate(map(tuple, io.parse(header["names"]))):
                # Copied: where numbers lie in memory may change the last bits of products with them.
                own = {
                    key.partition(".")[2]: t.clone() for key, t in tensors.items() if key.partition(".")[0] == str(i)
                }
                layers.append(LayerBasis(names, _layout(blocks[names]), own))
            basis = cls(fisher, damping, io.parse(header["compress"]), layers, io.parse(header["damping"]), True)
            basis.check()
            return basis
        except (LookupError, ValueError, TypeError, RuntimeError) as error:
            raise FileFormatError(
                CALL, f"{path}, which does not fit this Fisher ({error})", "the eigenvectors that prepare wrote for it",
                try_="the Fisher that the rows were prepared with; another folder, or delete this one",
            ) from error  # fmt: skip


def damaged(path: Path, reason: str) -> FileFormatError:
    """Of a file of eigenvectors that is not what `prepare` wrote."""
    return FileFormatError(
        CALL, f"{path.name}, which is missing or damaged ({reason})", "the eigenvectors as prepare wrote them",
        try_=f"delete {path}, and prepare(train, folder={str(path.parent)!r}, compress=...) as before, which makes it "
        "anew and keeps the rows",
    )  # fmt: skip


def _layout(block: FisherOperator) -> LayerLayout:
    if block.layout is None:
        raise LookupError(f"no layer's grid for {', '.join(block.space.names)}")
    return block.layout


def check_compress(compress: object, *, token: bool) -> None:
    """A count from 1 on, or a share up to 1; not of rows by token."""
    if token:
        raise InvalidArgumentError(
            CALL, 'by="token" with compress=', "either of them",
            why="a position's row is two vectors of a layer, which is little already",
        )  # fmt: skip
    if is_integer(compress):
        check_count(CALL, "compress", compress)
    elif check_number(CALL, "compress", compress, most=1) == 0:
        raise InvalidArgumentError(CALL, "compress=0.0", "a share above 0, or a count from 1 on")


# -- the error ---------------------------------------------------------------------------------------------------------


def measured(inverse: Factorization, basis: Basis, sample: Rows, queries: Rows | None, most: int) -> Compression:
    """On a sample of whole rows and on queries, so many at a time; None for the sample, without their own rows.

    Warns of rows that take more bytes than whole ones.

    Raises:
        InvalidArgumentError: too few examples with a label that counts.
    """
    asked, pairs = sample if queries is None else queries, []
    if sample.count < 2 or not asked.count:
        raise InvalidArgumentError(
            CALL, "fewer than two examples with a label that counts", "some, on which the error is measured",
            try_="more training examples with labels, queries= of another set, or whole rows",
        )  # fmt: skip
    short = basis.turned(sample)
    captured = float(basis.inverse._row_squares(short).sum()) / float(inverse._row_squares(sample).sum())
    for start in range(0, asked.count, most):
        some = asked.some(slice(start, min(start + most, asked.count)))
        pairs.append([
            of._row_products(other, some.count, other.count).solve(own).products(other).double()
            for of, own, other in ((inverse, some, sample), (basis.inverse, basis.turned(some), short))
        ])  # fmt: skip
    whole, found = (torch.cat(parts, 1).mT for parts in zip(*pairs, strict=True))
    if queries is None:
        others = ~torch.eye(len(whole), dtype=torch.bool, device=whole.device)
        whole, found = (scores[others].unflatten(0, (len(whole), -1)) for scores in (whole, found))
    errors = ((found - whole).norm(dim=1) / whole.norm(dim=1)).nan_to_num(0.0)
    ranks = [scores.argsort(1).argsort(1).double() for scores in (whole, found)]
    centred = [one - one.mean(1, keepdim=True) for one in ranks]
    correlations = (centred[0] * centred[1]).sum(1) / (centred[0].norm(dim=1) * centred[1].norm(dim=1))
    # Rounded, so that the same rows are told by the same text.
    share, error, worst, rank = (
        float(f"{float(value):.6g}")
        for value in (captured, errors.median(), errors.max(), correlations.nan_to_num(1.0).median())
    )
    size, whole_size = (round(_bytes(rows) / sample.count) for rows in (short, sample))
    if size > whole_size:
        warn(
            f"{CALL}: compressed rows take {size:,} bytes an example and {whole_size:,} whole. Try: a smaller share or "
            "rank, or whole rows, without compress=."
        )
    return Compression(basis.compress, size, whole_size, basis.whole, share, error, worst, rank, sample.count)


def _bytes(rows: Rows) -> int:
    return sum(tensor.nbytes for slot in rows.slots for tensor in slot.rows.tensors().values())


def refuse_error(found: Compression, most: float | None) -> None:
    """Raise where scores are farther off than they may be."""
    if most is not None and found.error > most:
        raise InvalidArgumentError(
            CALL, f"scores off by {found.error:.3g} with compress={found.compress!r}", f"at most most_error={most:g}",
            why=f"{100 * found.captured:.3g}% of the rows' square in (F + λI)⁻¹ is kept, "
            f"{found.bytes:,} of {found.whole_bytes:,} bytes an example",
            try_="a larger share or rank, a larger damping, or whole rows, without compress=",
        )  # fmt: skip
