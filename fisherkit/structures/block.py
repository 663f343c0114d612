"""One exact block a module, by its rows or by its dense matrix."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from jaxtyping import Float
from torch import Tensor

from fisherkit.operators import BlockDiagonalOperator, DenseOperator, FisherOperator
from fisherkit.processes import Processes
from fisherkit.rows.base import UnitRows
from fisherkit.rows.chunks import Chunk
from fisherkit.rows.collection import Rows
from fisherkit.rows.problem import Problem
from fisherkit.rows.shared import SharedRows, shared
from fisherkit.space import ParameterSpace
from fisherkit.structures.base import Names, Part, Parts, Sums, UnitSums, everywhere
from fisherkit.structures.full import RowStructure


@dataclass(frozen=True)
class NormalMatrix(UnitSums):
    """Σ_r row_r row_rᵀ, a dense block."""

    label = "exact block"

    matrix: Float[Tensor, "d d"]

    @classmethod
    def of(cls, rows: UnitRows | Rows) -> NormalMatrix:
        """The matrix of some rows."""
        dense = rows.dense()
        return cls(dense.mT @ dense)

    def operator(self, space: ParameterSpace, scale: float) -> FisherOperator:
        return DenseOperator(space, scale * self.matrix)


@dataclass(frozen=True)
class BlockSums(Sums):
    """Matrices of the modules in ``spaces``, and the rows of the ``others``: this process's and all processes'."""

    constant = ("spaces", "others", "everyones")

    spaces: Mapping[Names, ParameterSpace]
    others: ParameterSpace
    matrices: Mapping[Names, NormalMatrix] = field(default_factory=dict)
    rows: Rows | None = None
    everyones: SharedRows | None = None

    def added(self, chunks: Iterable[Chunk]) -> BlockSums:
        matrices, rows = dict(self.matrices), [] if self.rows is None else [self.rows]
        for chunk in chunks:
            for names, space in self.spaces.items():
                new = NormalMatrix.of(chunk.rows.restrict(space))
                matrices[names] = matrices[names].merge(new) if names in matrices else new
            if self.others.names:
                rows.append(chunk.rows.restrict(self.others))
            del chunk
        return replace(self, matrices=matrices, rows=Rows.taken_from(rows) if rows else None)

    def all_reduced(self, processes: Processes) -> BlockSums:
        """Of what all processes have added up; their rows, each where it is."""
        return replace(self, matrices=everywhere(self.matrices, processes), everyones=shared(self.rows, processes))

    @property
    def whole(self) -> Rows | SharedRows | None:
        """The rows that were kept, of all processes where there are several."""
        return self.everyones or self.rows


class Block(RowStructure):
    """F between the parameters of one module, and 0 between modules."""

    name = "block"
    meaning = "one exact block a module, nothing between modules"
    instead = 'structure="kfac" or "diagonal"'
    in_parts = of_all_rows = True

    @property
    def groups(self) -> tuple[Names, ...]:
        return self.modules

    def bytes(self, problem: Problem) -> int:
        """Of each module, its rows or its matrix."""
        return sum(size for size, _ in self._sizes(problem).values())

    def peak(self, problem: Problem) -> int:
        """Of batches' rows one module's exist twice, a matrix as the sum and as the operator's."""
        sizes = self._sizes(problem).values()
        twice = max((size for size, dense in sizes if not dense), default=0)
        several = problem.first_size < problem.examples
        return sum((1 + dense) * size for size, dense in sizes) + several * twice

    def summed(self, problem: Problem) -> int:
        """Rows of batches before, and a matrix as the sum."""
        return self.bytes(problem)

    def _sizes(self, problem: Problem) -> dict[Names, tuple[int, bool]]:
        """Bytes of each module here, and whether they are its matrix's, which has fewer numbers than all rows."""
        found = {}
        for names in self.modules:
            row, matrix = problem.row_bytes(names), self.item * self.space.restrict(names).size ** 2
            dense = matrix < row * sum(problem.shares)
            found[names] = (matrix if dense else row * problem.examples), dense
        return found

    def empty(self, problem: Problem | None = None) -> BlockSums:
        """Nothing yet; rows of one step are kept as they are."""
        sizes = {} if problem is None else self._sizes(problem)
        dense = [names for names, (_, by_matrix) in sizes.items() if by_matrix]
        others = self.space.restrict(n for names in self.modules if names not in dense for n in names)
        return BlockSums({names: self.space.restrict(names) for names in dense}, others)

    def operator(self, sums: BlockSums, scale: float) -> FisherOperator:
        blocks: list[FisherOperator] = []
        for names in self.modules:
            if names in sums.matrices:
                blocks.append(sums.matrices[names].operator(self.space.restrict(names), scale))
            elif sums.whole is not None:
                blocks.append(self.by_rows(sums.whole.part(names), scale))
        return BlockDiagonalOperator(self.space, blocks)

    def parts(self, sums: BlockSums, operator: BlockDiagonalOperator) -> Parts:
        rows = "block, rows", "its rows are fewer numbers than d²"
        dense = "block, dense", "d² numbers are fewer than its rows'"
        modules = zip(self.modules, operator.blocks, strict=True)
        return {names: Part.of(block, *(dense if names in sums.matrices else rows)) for names, block in modules}
