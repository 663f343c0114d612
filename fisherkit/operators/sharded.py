"""A block-diagonal Fisher matrix whose blocks lie in several processes, each in one of them.

Every process answers for its own blocks and the answers are put together, so that all processes must ask the same
questions in the same order; a question that is asked otherwise is an error in all of them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import ClassVar, Literal, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from fisherkit import io
from fisherkit.arguments import check_count
from fisherkit.errors import FisherkitError
from fisherkit.io.fisher_file import pack
from fisherkit.model_state import tensors_hash
from fisherkit.operators.base import FisherOperator
from fisherkit.operators.composite import BlockDiagonalOperator, join, own_leading, owners_of_leading
from fisherkit.operators.factorization import Factorization
from fisherkit.operators.outputs_average import average_over_outputs
from fisherkit.processes import Processes
from fisherkit.solvers import SolveInfo, relative_residual
from fisherkit.space import ParameterSpace

P = TypeVar("P")
T = TypeVar("T")

Names = tuple[str, ...]


class ShardedOperator(FisherOperator):
    """F = blockdiag of what each process has, over parameters of its own.

    Args:
        space: all parameters.
        own: what this process has, over a part of the space; None for nothing.
        processes: the group.
        dtype: of the vectors.
        device: of the vectors.
    """

    tag: ClassVar[str] = ""

    def __init__(
        self, space: ParameterSpace, own: FisherOperator | None, processes: Processes, *, dtype: torch.dtype,
        device: torch.device,
    ) -> None:  # fmt: skip
        super().__init__(space, dtype=dtype, device=device)
        self.own, self.processes = own, processes
        names = () if own is None else own.space.names
        facts = None if own is None else (own.is_diagonal, own.inversion, own.decomposed_side)
        everyones = processes.gathered((names, facts))
        self._names, self._facts = [own for own, _ in everyones], [facts for _, facts in everyones if facts is not None]

    @classmethod
    def of(
        cls, space: ParameterSpace, blocks: Mapping[Names, FisherOperator], processes: Processes, *, dtype: torch.dtype,
        device: torch.device,
    ) -> ShardedOperator:  # fmt: skip
        """Of this process's blocks."""
        own = join(space.restrict(n for names in blocks for n in names), list(blocks.values())) if blocks else None
        return cls(space, own, processes, dtype=dtype, device=device)

    def _of(
        self, own: FisherOperator | None, dtype: torch.dtype | None = None, device: torch.device | None = None
    ) -> ShardedOperator:
        return ShardedOperator(self.space, own, self.processes, dtype=dtype or self.dtype, device=device or self.device)

    # -- putting answers together --------------------------------------------------------------------------------------

    def _product(
        self, what: str, own: P | None, ask: Callable[[P, Tensor], Tensor], columns: Float[Tensor, "D K"]
    ) -> Float[Tensor, "D K"]:  # fmt: skip
        """All processes' parts of a product: ``ask`` of what each has, and of its part of the columns."""
        self.processes.require_alike(what, columns)
        return self._joined(own, lambda one: ask(one, self.space.take(columns, self._mine)), columns.shape[1])

    def _joined(self, own: P | None, ask: Callable[[P], Tensor], width: int) -> Float[Tensor, "D K"]:
        whole = torch.zeros(self.size, width, dtype=self.dtype, device=self.device)
        if own is not None:
            self.space.put(whole, self._mine, ask(own))
        return self.processes.total(whole)

    def _each(self, what: str, own: P | None, ask: Callable[[P], T]) -> T | None:
        """What each process's own says, None where there is none; an error of one is the same error in all."""

        def tried() -> tuple[T | None, FisherkitError | None]:
            try:
                return (None if own is None else ask(own)), None
            except FisherkitError as error:
                return None, error

        self._require_same_call(what)
        found, error = self.processes.each(what, tried)
        for one in self.processes.gathered(error):
            if one is not None:
                raise one
        return found

    def _total(self, what: str, own: P | None, ask: Callable[[P], Tensor]) -> Float[Tensor, ""]:
        found = self._each(what, own, ask)
        zero = torch.zeros((), dtype=torch.float64, device=self.device)
        return self.processes.total(zero if found is None else found.to(zero))

    def _require_same_call(self, what: str) -> None:
        """Refuse to go on if other processes are asked something else."""
        self.processes.require_alike(what, torch.zeros(0, device=self.device))

    @property
    def _mine(self) -> Names:
        return () if self.own is None else self.own.space.names

    # -- the contract --------------------------------------------------------------------------------------------------

    def _matmat(self, columns: Float[Tensor, "D K"]) -> Float[Tensor, "D K"]:
        return self._product("matvec", self.own, lambda own, part: own._matmat(part), columns)

    def _diagonal(self) -> Float[Tensor, "D"]:
        self._require_same_call("diagonal")
        return self._joined(self.own, lambda own: own._diagonal().unsqueeze(1), 1).squeeze(1)

    def _draw(self, generator: torch.Generator | None, count: int) -> Float[Tensor, "D n"]:
        # A generator of each process's own, as those of all processes are alike and blocks must be independent.
        seeds = torch.randint(1 << 53, (self.processes.size,), generator=generator, device=self.device)
        self.processes.require_alike(f"sample({count})", seeds)
        own = torch.Generator(self.device).manual_seed(int(seeds[self.processes.rank]))
        return self._joined(self.own, lambda operator: operator._draw(own, count), count)

    def _factorize(self, damping: float, tolerance: float, max_steps: int | None) -> Factorization:
        inverse = self._each(
            f"factorize(damping={damping:g})", self.own, lambda own: own._factorize(damping, tolerance, max_steps)
        )
        return _ShardedFactorization(self, inverse, damping)

    def _trace(self) -> Float[Tensor, ""]:
        return self._total("trace", self.own, lambda own: own._trace())

    def _frobenius(self) -> Float[Tensor, ""]:
        return self._total("norm", self.own, lambda own: own._frobenius().square()).sqrt()

    def _effective_dimension(self, damping: float) -> Float[Tensor, ""]:
        return self._total("effective_dimension", self.own, lambda own: own._effective_dimension(damping))

    def _leading(self, k: int) -> list[Float[Tensor, "_"]]:
        """Every process's largest eigenvalues, among which the k largest of all lie."""
        own = self._each(f"eigenvalues({k})", self.own, lambda own: own._eigenvalues(min(k, own.size)))
        none = torch.zeros(0, dtype=torch.float64, device=self.device)
        return self.processes.gathered(none if own is None else own)

    def _eigenvalues(self, k: int) -> Float[Tensor, "k"]:
        return torch.cat(self._leading(k)).topk(k).values

    def _eigenvectors(self, k: int) -> Float[Tensor, "D k"]:
        mine = owners_of_leading(self._leading(k), k) == self.processes.rank
        return self._joined(self.own, lambda own: own_leading(own, mine), k)

    def _to_dense(self) -> Float[Tensor, "D D"]:
        self._require_same_call("to_dense")
        whole = torch.zeros(self.shape, dtype=self.dtype, device=self.device)
        if self.own is not None:
            place = self.space.take(torch.arange(self.size, device=self.device), self._mine)
            whole[place.unsqueeze(1), place] = self.own._to_dense()
        return self.processes.total(whole)

    def _scaled(self, scale: float) -> FisherOperator:
        self._require_same_call(f"{scale} * F")
        return self._of(self.own and self.own._scaled(scale))

    def _converted(self, dtype: torch.dtype, device: torch.device) -> FisherOperator:
        return self._of(
            self._each(f"convert({dtype})", self.own, lambda own: own._converted(dtype, device)), dtype, device
        )

    def _plus(self, other: FisherOperator) -> FisherOperator | None:
        # Of the same parts: each process adds its own, and what does not fold stays a sum there.
        if not isinstance(other, ShardedOperator) or self._names != other._names:
            return None
        return self._of(None if self.own is None or other.own is None else self.own + other.own)

    @property
    def is_sharded(self) -> bool:
        return True

    def _average(self) -> FisherOperator:
        return self._of(self._each("average_over_outputs", self.own, average_over_outputs))

    def _state(self) -> io.State:
        raise self._no_closed_form(
            "state", "its blocks lie in several processes, and no process has all of them",
            "fisher.save(path) in all processes, and fk.load(path), which has all blocks; or shard=False",
        )  # fmt: skip

    def _write(self, path: str | Path, metadata: dict[str, str], max_shard_size: int | None) -> None:
        """One file of all blocks, which the first process gets one after the other and writes."""
        call = f"save({str(path)!r})"
        states = self._each(call, self.own, lambda own: {block.space.names: block._state() for block in own._blocks()})
        digests = {names: tensors_hash(pack(state, None)[1]) for names, state in (states or {}).items()}
        everyones = self.processes.gathered(digests)
        owner = {names: rank for rank, one in enumerate(everyones) for names in one}
        order = sorted(owner, key=lambda names: self.space.names.index(names[0]))
        settings = {"tensors": str([everyones[owner[names]][names] for names in order]), "metadata": str(metadata)}

        def begun() -> io.PartsFile | None:
            check_count(call, "max_shard_size", max_shard_size, optional=True)
            if self.processes.rank > 0:
                return None
            file = io.as_path(path, "save(path)")
            io.check_folder(file, call)
            made = io.PartsFile(file, settings, list, largest=max_shard_size, overwrite=True, call=call)
            made.begin(order, "", 0)
            return made

        def write(number: int, state: io.State) -> None:
            if file is not None and not file.finished(number):
                file.put(number, [state], {})

        file = self.processes.each(call, begun)
        for number, names in enumerate(order):
            state = self.processes.sent_by(owner[names], (states or {}).get(names))
            self.processes.each(call, functools.partial(write, number, state))

        def finish() -> None:
            if file is not None:
                file.close(BlockDiagonalOperator.tag, self.space, metadata)

        self.processes.each(call, finish)

    # -- what is known of it -------------------------------------------------------------------------------------------

    @property
    def is_diagonal(self) -> bool:
        return all(diagonal for diagonal, _, _ in self._facts)

    @property
    def inversion(self) -> Literal["cheap", "direct", "iterative"]:
        found = {inversion for _, inversion, _ in self._facts}
        return "iterative" if "iterative" in found else "direct" if "direct" in found else "cheap"

    @property
    def decomposed_side(self) -> int:
        return max(side for _, _, side in self._facts)

    @property
    def nbytes(self) -> int:
        """Bytes that this process's part takes."""
        return 0 if self.own is None else self.own.nbytes

    @property
    def together(self) -> Processes:
        return self.processes

    def _usual_damping(self) -> float:
        own = self._each("usual_damping", self.own, lambda own: (own.is_diagonal, own._usual_damping()))
        known = [one for one in self.processes.gathered(own) if one is not None]
        # As of blocks: what has correlations decides, and of that what takes least.
        return min(value for diagonal, value in known if self.is_diagonal or not diagonal)

    def _made_of(self) -> str:
        return f"{0 if self.own is None else self.own.size:,} parameters of them here, the rest in other processes"


class _ShardedFactorization(Factorization):
    """Each process's own inverse, with the one damping for all."""

    def __init__(self, operator: ShardedOperator, own: Factorization | None, damping: float) -> None:
        super().__init__(operator, damping)
        self._whole, self._own = operator, own

    def _solve(self, columns: Float[Tensor, "D K"]) -> Float[Tensor, "D K"]:
        return self._whole._product("solve", self._own, lambda own, part: own._solve(part), columns)

    def _solve_with_info(
        self, columns: Float[Tensor, "D K"], checkpoint: Path | None = None, *, progress: bool = False
    ) -> tuple[Float[Tensor, "D K"], SolveInfo]:
        whole, mine = self._whole, list[SolveInfo]()
        rank = whole.processes.rank
        file = checkpoint and checkpoint.with_suffix(f".process{rank}{checkpoint.suffix}")

        def solved(own: Factorization, part: Tensor) -> Tensor:
            solution, info = own._solve_with_info(part, file, progress=progress and rank == 0)
            mine.append(info)
            return solution

        solution = whole._product("solve", self._own, solved, columns)
        infos = [info for one in whole.processes.gathered(mine) for info in one]
        residual = relative_residual(whole._matmat, solution, columns, damping=self.damping)
        return solution, SolveInfo.of_parts(infos, residual, self.damping)

    def _logdet(self) -> Float[Tensor, ""]:
        return self._whole._total("logdet", self._own, lambda own: own._logdet())
