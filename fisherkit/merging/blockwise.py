"""The minimiser of Σ_t c_t (θ − θ_t)ᵀF_t(θ − θ_t) + λ‖θ − θ_c‖², block by block.

θ = θ_c + δ with (Σ c_t F_t + λI) δ = Σ c_t F_t (θ_t − θ_c), so that damping pulls to the center and rounding cancels
where models agree. Owns the loop: of every model and every Fisher one block is read, added up in float64 and let go.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from fisherkit.errors import NotConvergedWarning, SingularMatrixError, listed
from fisherkit.merging.assembly import read_double, weighted_average
from fisherkit.merging.checkpoints import Checkpoint
from fisherkit.merging.info import BlockInfo
from fisherkit.merging.scales import Scales
from fisherkit.merging.sources import FisherSource, Names
from fisherkit.merging.systems import Solver, singular_block
from fisherkit.operators import FisherOperator
from fisherkit.operators.base import convert

MOST_LISTED = 5


@dataclass(frozen=True)
class BlockwiseMerge:
    """The problem, ready to be solved block by block.

    Args:
        models: θ_t.
        sources: F_t.
        weights: of the average that is the center if there is no other.
        center: θ_c; None for the average.
        scales: c_t of each block, and λ.
        transform: what becomes of each Fisher's block before it is added.
        solver: how blocks are solved.
        device: where; None for where the first Fisher lies.
        infos: filled while `solutions` runs.
    """

    models: Sequence[Checkpoint]
    sources: Sequence[FisherSource]
    weights: Sequence[float]
    center: Checkpoint | None
    scales: Scales
    transform: Callable[[FisherOperator], FisherOperator]
    solver: Solver
    device: torch.device | None = None
    infos: list[BlockInfo] = field(default_factory=list)

    def solutions(self) -> Iterator[tuple[str, Tensor]]:
        """Every covered name and its merged values, flat, in float64.

        Raises:
            SingularMatrixError: there is no damping and a block needs some.
        """
        for names in self.scales.factors:
            yield from self._solve(names)
        self._warn()

    def work(self) -> dict[str, float]:
        """About how many operations each name costs, for a bar: its part of its block's."""
        found = {}
        for names in self.scales.factors:
            sizes = {name: math.prod(self.models[0].shapes[name]) for name in names}
            whole = self.scales.work.get(names, float(sum(sizes.values())))
            found.update({name: whole * size / max(1, sum(sizes.values())) for name, size in sizes.items()})
        return found

    def _solve(self, names: Names) -> Iterator[tuple[str, Tensor]]:
        factors = self.scales.factors[names]
        device = self.device or self.sources[0].device
        center = torch.cat([self._center(name, device).reshape(-1) for name in names])
        try:
            delta, found = self.solver.solve(self._terms(names, center, device), self.scales.damping)
        except SingularMatrixError as error:
            raise singular_block(error, names) from error
        info = BlockInfo(
            names, len(center), found.method, found.steps, float(found.residual.max()), found.converged, factors
        )
        self.infos.append(info)
        merged, start = delta.add_(center), 0
        for name in names:
            size = math.prod(self.models[0].shapes[name])
            yield name, merged[start : start + size]
            start += size

    def _terms(
        self, names: Names, center: Float[Tensor, "d"], device: torch.device
    ) -> Iterator[tuple[FisherOperator, Float[Tensor, "d"]]]:
        """c_t F_t and θ_t − θ_c of every model that counts, made when they are asked for."""
        for model, source, factor in zip(self.models, self.sources, self.scales.factors[names], strict=True):
            if factor == 0:
                continue
            theta = torch.cat([read_double(model, name, device).reshape(-1) for name in names])
            yield factor * self.transform(convert(source.read(names), torch.float64, device)), theta.sub_(center)
            del theta  # before the next is made

    def _center(self, name: str, device: torch.device) -> Tensor:
        if self.center is not None:
            return read_double(self.center, name, device)
        return weighted_average(self.models, self.weights, name).to(device)

    def _warn(self) -> None:
        missed = [info for info in self.infos if not info.converged]
        if not missed:
            return
        worst = (
            f"{listed(info.names, 2)} (residual {info.residual:.1e} after {info.steps} steps)"
            for info in sorted(missed, key=lambda info: -info.residual)
        )
        warnings.warn(
            f"merge: {len(missed)} of {len(self.infos)} blocks missed tolerance={self.solver.tolerance:g}: "
            f"{listed(worst, MOST_LISTED, '; ')}. Try: a larger damping, more max_steps, or a larger tolerance.",
            NotConvergedWarning,
            stacklevel=2,
        )
