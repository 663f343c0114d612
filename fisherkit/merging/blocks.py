"""The minimiser of Σ_t c_t (θ − θ_t)ᵀF_t(θ − θ_t) + λ‖θ − θ_c‖², block by block.

θ = θ_c + δ with (Σ c_t F_t + λI) δ = Σ c_t F_t (θ_t − θ_c), so that damping pulls to the center and rounding cancels
where models agree. Owns what each Fisher is multiplied by, its weight and its normalization, since Fishers of different
kinds, tasks and fits differ in scale by orders of magnitude; the loop (of every model and every Fisher one block is
read, added up in float64 and let go); the choice of a block's solver by a written rule; and how long that will take, by
what files' headers say. The solvers are the operators' own.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Float
from torch import Tensor

from fisherkit.errors import InvalidArgumentError, NotConvergedWarning, SingularMatrixError, listed, warn
from fisherkit.io.fisher_file import FisherHeader, Node
from fisherkit.merging.assembly import BlockInfo, Job
from fisherkit.merging.fishers import FisherSource, Names
from fisherkit.merging.models import read_double, weighted_average
from fisherkit.merging.policy import MergePolicy
from fisherkit.operators import DenseOperator, Factorization, FisherOperator, RelativeDamping, SumOperator, add
from fisherkit.operators.base import convert
from fisherkit.operators.damping import check_damping
from fisherkit.operators.kronecker_sum import solve_two_products
from fisherkit.operators.normalization import check_normalize, factor_of_size
from fisherkit.operators.outputs_average import average_over_outputs, mix_with_average
from fisherkit.progress import bar
from fisherkit.solvers import SolveInfo, relative_residual

BY_BLOCK = ("block", "output")
"""Beside those of whole Fishers. "block": the mean eigenvalue of every block becomes 1; "output": that of the gradient
factor of a Kronecker product, of the block itself where it is no such product."""

DEFAULT_OUTPUT_DAMPING = 3.0
"""Of what is no Kronecker product, and of `merge_layers`: between 1 and 30 merges were equally good on small networks
(docs/results/merging.md)."""

DENSE_SIZE = 3000
"""A matrix without a direct inverse is written out and factored up to this d: d³/3 operations and 24 d² bytes, at most
a second and 216 MB; above it, conjugate gradients are cheaper."""

REFINEMENTS = 5
MOST_LISTED = 5


@dataclass(frozen=True)
class Scales:
    """c_t of each block, one for each Fisher, and λ."""

    factors: dict[Names, tuple[float, ...]]
    damping: float


def measure(job: Job, sources: Sequence[FisherSource], blocks: Sequence[Names]) -> Scales:
    """Factors of all blocks and the absolute damping; a relative one is of the mean eigenvalue of Σ c_t F_t.

    Cost: reads every block of every Fisher once, unless nothing is normalized and the damping is absolute.
    """
    damping = job.damping
    check_normalize(job.normalize, job.call, BY_BLOCK)
    if not isinstance(damping, RelativeDamping):
        damping = check_damping(damping, job.call)
        if job.normalize is None:
            return Scales(dict.fromkeys(blocks, job.weights), damping)
    size = sum(sources[0].space.restrict(names).size for names in blocks)
    rows, total = [], 0.0
    with bar(len(sources) * len(blocks), "reading Fishers", "blocks", shown=job.progress) as shown:
        for number, (source, weight) in enumerate(zip(sources, job.weights, strict=True), 1):
            found = []
            for names in blocks:
                found.append(_trace_and_scale(source.read(names), job.normalize))
                shown.update(1)
            traces, scales = torch.stack(found, 1).tolist()  # one transfer from the device for all blocks
            own = _factors(job, traces, scales, size, f"Fisher {number}")
            rows.append([weight * factor for factor in own])
            total += sum(c * trace for c, trace in zip(rows[-1], traces, strict=True))
    if isinstance(damping, RelativeDamping):
        damping = damping.scale * total / size
    return Scales(dict(zip(blocks, zip(*rows, strict=True), strict=True)), damping)


def _trace_and_scale(block: FisherOperator, normalize: str | None) -> Float[Tensor, "2"]:
    """The trace of a block, and what the block is normalized by: ‖F‖² or a mean eigenvalue."""
    trace = block.trace()
    if normalize == "norm":
        scale = block._frobenius().square()
    elif normalize == "output" and block.factors is not None:
        scale = block.factors[1].diagonal().double().mean()
    else:
        scale = trace / block.size
    return torch.stack([trace, scale])


def _factors(job: Job, traces: Sequence[float], scales: Sequence[float], size: int, label: str) -> list[float]:
    """What one Fisher's blocks are multiplied by."""
    if job.normalize is None:
        return [1.0] * len(traces)
    how = "norm" if job.normalize == "norm" else "trace"
    whole = math.sqrt(sum(scales)) if how == "norm" else sum(traces)
    factor = factor_of_size(whole, size, how, job.call, label)
    if job.normalize in BY_BLOCK:
        # A block that is 0, alone among others, says nothing at any scale.
        return [1 / scale if scale > 0 else 1.0 for scale in scales]
    return [factor] * len(traces)


@dataclass(frozen=True)
class BlockwiseMerge:
    """The problem, ready to be solved block by block; ``infos`` is filled while `solutions` runs."""

    job: Job
    sources: Sequence[FisherSource]
    scales: Scales
    infos: list[BlockInfo] = field(default_factory=list)

    def solutions(self) -> Iterator[tuple[str, Tensor]]:
        """Every covered name and its merged values in float64."""
        device = torch.device(self.job.policy.device or self.sources[0].device)
        for names in self.scales.factors:
            center = torch.cat([self._center(name, device).reshape(-1) for name in names])
            delta = self._solve(names, center, device)
            yield from self.sources[0].space.restrict(names).unflatten(delta.add_(center)).items()
        self._warn()

    def _solve(self, names: Names, center: Float[Tensor, "d"], device: torch.device) -> Float[Tensor, "d"]:
        total: FisherOperator | None = None
        right, outputs = torch.zeros_like(center), list[tuple[FisherOperator, Tensor]]()
        for block, factor, difference in self._terms(names, center, device):
            operator = factor * mix_with_average(block, self._output_damping(block))
            right += operator.matvec(difference)
            total = operator if total is None else add(total, operator)
            if self._looks_at_outputs(block):
                outputs.append((average_over_outputs(block), difference))
            del block, operator, difference  # before the next are made
        if total is None:
            raise InvalidArgumentError(self.job.call, "no Fisher with a weight", "at least one")
        try:
            delta, found = solve(total, right, self.scales.damping, self.job.policy)
        except SingularMatrixError as error:
            raise SingularMatrixError(
                f"{self.job.call}(damping=0)",
                f"a sum of Fishers that is singular in the block of {', '.join(map(repr, names[:4]))}",
                "a positive definite sum",
                why=f"without damping nothing says where unmeasured directions should lie ({error.why})",
                try_="damping=fk.RelativeDamping(1e-6), which leaves them at the center",
            ) from error  # fmt: skip
        size, residual, factors = len(center), float(found.residual.max()), self.scales.factors[names]
        against = self._against_average(delta, outputs, factors)
        self.infos.append(
            BlockInfo(names, size, found.method, found.steps, residual, found.converged, factors, against)
        )
        return delta

    def _output_damping(self, block: FisherOperator) -> float:
        """ρ; by default tr(G²)/tr(G) over tr(G)/O: a G of a few directions has a mean the smaller the wider it is."""
        if self.job.output_damping is not None:
            return self.job.output_damping
        if block.factors is None:
            return DEFAULT_OUTPUT_DAMPING
        gradient = block.factors[1]
        return len(gradient) * float((gradient / gradient.trace()).square().sum().nan_to_num())

    def _looks_at_outputs(self, block: FisherOperator) -> bool:
        """Whether R says more than I does, and costs no more than the solve."""
        lone = len(block.space.names) == 1 and len(block.space.shapes[0]) < 2
        return self.job.call == "merge" and not lone and (block.inversion == "cheap" or self.job.output_damping != 0)

    def _against_average(
        self, delta: Float[Tensor, "d"], outputs: Sequence[tuple[FisherOperator, Tensor]], factors: Sequence[float]
    ) -> tuple[float, ...]:
        """For each model that counts (θ − θ_t)ᵀR_t(θ − θ_t) over the same of the plain average; see `BlockInfo`."""
        if not outputs or len(outputs) < len(factors):
            return ()
        weights = [weight / sum(self.job.weights) for weight in self.job.weights]
        average = torch.zeros_like(delta)
        if self.job.center is not None:  # else the average is the center
            for weight, (_, difference) in zip(weights, outputs, strict=True):
                average += weight * difference
        found = []
        for metric, difference in outputs:
            away = torch.stack([delta - difference, average - difference], 1)
            found.append((away * metric.matvec(away)).sum(0))
        return tuple(one / other if other > 0 else 1.0 for one, other in torch.stack(found).tolist())

    def _terms(
        self, names: Names, center: Float[Tensor, "d"], device: torch.device
    ) -> Iterator[tuple[FisherOperator, float, Float[Tensor, "d"]]]:
        """F_t, c_t and θ_t − θ_c of every model that counts, made when they are asked for."""
        for model, source, factor in zip(self.job.models, self.sources, self.scales.factors[names], strict=True):
            if factor == 0:
                continue
            theta = torch.cat([read_double(model, name, device).reshape(-1) for name in names])
            block = convert(source.read(names), torch.float64, device)
            yield block, factor, theta.sub_(center)
            del theta, block  # before the next are made

    def _center(self, name: str, device: torch.device) -> Tensor:
        if self.job.center is not None:
            return read_double(self.job.center, name, device)
        return weighted_average(self.job.models, self.job.weights, name).to(device)

    def _warn(self) -> None:
        missed = sorted((info for info in self.infos if not info.converged), key=lambda info: -info.residual)
        worst = (f"{listed(i.names, 2)} (residual {i.residual:.1e} after {i.steps} steps)" for i in missed)
        if missed:
            warn(
                f"{self.job.call}: {len(missed)} of {len(self.infos)} blocks missed "
                f"tolerance={self.job.policy.tolerance:g}: {listed(worst, MOST_LISTED, '; ')}. "
                "Try: a larger damping, more max_steps, or a larger tolerance.",
                NotConvergedWarning,
            )


def solve(
    total: FisherOperator, right: Float[Tensor, "d"], damping: float, policy: MergePolicy
) -> tuple[Float[Tensor, "d"], SolveInfo]:
    """δ with (total + λI) δ = right, and how it was found; ``right`` may be changed."""
    if not bool(right.any()):
        return right, SolveInfo("closed_form", 0, right.new_zeros(1), True, damping)
    if total.is_diagonal and policy.method != "cg":
        shifted = total.diagonal().add_(damping)
        # Where no Fisher says anything and nothing is damped, the limit of small damping stays at the center.
        solution = right.div_(shifted).masked_fill_(shifted == 0, 0)
        rounding = right.new_full((1,), torch.finfo(right.dtype).eps / 2)
        return solution, SolveInfo("closed_form", 0, rounding, True, damping)
    small = total.inversion == "iterative" and total.size <= DENSE_SIZE
    if policy.method == "direct" or (policy.method == "auto" and small):
        matrix = total.to_dense()
        total = DenseOperator(total.space, matrix.add(matrix.mT).mul_(0.5))
    elif policy.method == "cg":
        total = SumOperator([total])  # which is always iterated
    elif (found := solve_two_products(total, right, damping, policy.tolerance, policy.max_steps)) is not None:
        return found
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NotConvergedWarning)  # said once, for all blocks, by the merge
        inverse = total.factorize(damping, tolerance=policy.tolerance, max_steps=policy.max_steps)
        solution, info = inverse.matvec(right, return_info=True)
    if info.method != "conjugate_gradient":
        solution, info = _refined(inverse, right, solution, info, policy.tolerance)
    return solution, replace(info, converged=bool((info.residual <= policy.tolerance).all()), damping=damping)


def _refined(
    inverse: Factorization, right: Float[Tensor, "d"], solution: Float[Tensor, "d"], info: SolveInfo, tolerance: float
) -> tuple[Float[Tensor, "d"], SolveInfo]:
    """Iterative refinement: Woodbury's form with little damping leaves more than rounding."""
    product, damping = inverse.operator.matvec, inverse.damping
    for _ in range(REFINEMENTS):
        if bool((info.residual <= tolerance).all()):
            break
        better = solution + inverse.matvec(right - product(solution) - damping * solution)
        residual = relative_residual(product, better.unsqueeze(1), right.unsqueeze(1), damping=damping)
        if not bool((residual < info.residual).all()):
            break
        solution, info = better, replace(info, steps=info.steps + 1, residual=residual)
    return solution, info


# -- how long it will take ---------------------------------------------------------------------------------------------


STEPS = 20
"""Of conjugate gradients, a few more than layers of MiniLM take with the default dampings."""

EIGEN = 45
"""Decompositions of a matrix of size n take about 9 n³ operations at a fifth of a matrix product's speed."""

PROBE = 512


def expected_seconds(headers: Sequence[FisherHeader]) -> float:
    """Of solving all layers that are Kronecker products, on this machine's CPU by one thread; other blocks are quick.

    Cost: some milliseconds, for three matrix products.
    """
    if not (operations := sum(map(_operations, headers))):
        return 0.0
    matrix, took = torch.ones(PROBE, PROBE, dtype=torch.float64), []
    for _ in range(3):
        begin = time.process_time()
        matrix @ matrix
        took.append(time.process_time() - begin)
    return operations / (2 * PROBE**3) * max(min(took), 1e-6)


def _operations(header: FisherHeader, node: Node | None = None) -> float:
    """Of a node, by default the whole file's."""
    node = node or header.root
    if node.children or "kronecker" not in node.tag:
        return sum(_operations(header, child) for child in node.children)
    shapes = dict(zip(header.space.names, header.space.shapes, strict=True))
    size = sum(math.prod(shapes[name]) for name in node.names)
    outputs = max(shapes[node.names[0]][:1], default=1)
    inputs = size // outputs
    iterated = EIGEN / 2 * (outputs**3 + inputs**3) + STEPS * 2 * (outputs + inputs) * size
    return size**3 / 3 if size <= DENSE_SIZE else iterated
