"""What a timed thing is, and the case it is timed on. Owns agreement; knows no library."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import fisherkit as fk
from examples.benchmarks.workloads import Workload
from fisherkit.vectors import SampledVectors

Values = Mapping[str, Tensor]
DAMPING = 1e-2
"""λ of solves with Kronecker factors."""


@dataclass(frozen=True)
class Contestant:
    """One way to an operation.

    Args:
        name: of the library.
        how: the call that is timed, for readers.
        prepare: untimed; returns what is timed, and is called anew for every cell.
        values: untimed; from what the timed call returned to named tensors in fisherkit's conventions.
        bounds: relative errors allowed beside the operation's own, with `why`.
        why: why a bound is what it is.
    """

    name: str
    how: str
    prepare: Callable[[], Callable[[], Any]]
    values: Callable[[Any], Values]
    bounds: Mapping[str, float] = field(default_factory=dict)
    why: str = ""


@dataclass(frozen=True)
class Case:
    """A workload restricted to some parameters, with the vectors that operations are applied to.

    Args:
        workload: the workload.
        scope: "all" parameters, or those of "linear" layers: what a peer that goes by layers can do.
    """

    workload: Workload
    scope: str = "all"

    @property
    def names(self) -> tuple[str, ...]:
        """The parameters of the scope."""
        return self.workload.names if self.scope == "all" else self.workload.layered

    @property
    def whole(self) -> bool:
        """Whether these are all parameters."""
        return self.names == self.workload.names

    @property
    def layered(self) -> bool:
        """Whether a peer that knows linear and convolution layers alone can do it."""
        return set(self.names) <= set(self.workload.layered)

    @cached_property
    def vector(self) -> Tensor:
        """A random vector ``[D]``."""
        generator = torch.Generator().manual_seed(1)
        size = sum(p.numel() for n, p in self.workload.model.named_parameters() if n in self.names)
        return torch.randn(size, generator=generator).to(self.workload.inputs.device)

    @cached_property
    def gradient(self) -> Tensor:
        """The mean loss's gradient ``[D]``: in the span of the rows, so that a wrong inverse cannot hide."""
        own = dict(self.workload.model.named_parameters())
        found = torch.autograd.grad(self.workload.loss(self.workload.model), [own[name] for name in self.names])
        return torch.cat([g.flatten() for g in found]).detach()

    @cached_property
    def damping(self) -> float:
        """λ of solves by rows: a tenth of the improved empirical Fisher's mean non-zero eigenvalue.

        A much smaller one would leave float32 too few digits of (v − Jᵀw)/λ to tell right from wrong.
        """
        workload = self.workload
        params = None if self.whole else self.names
        fisher = fk.ImprovedEmpiricalFisher(workload.model, workload.data, structure="diagonal", params=params)
        return 0.1 * float(fisher.trace()) / workload.examples

    @cached_property
    def output_gradient(self) -> Tensor:
        """∂ℓ/∂z at the labels, ``[B, C]`` or ``[B, T, C]``."""
        with torch.no_grad():
            z = self.workload.model(self.workload.inputs)
        return z.softmax(-1) - F.one_hot(self.workload.targets, z.shape[-1]).to(z)

    @cached_property
    def drawn_gradient(self) -> Tensor:
        """The same at the labels that `fisherkit.SampledFisher` drew, so that a peer can be given the same draw."""
        kept: list[Tensor] = []

        class Listening(SampledVectors):
            def output_vectors(self, outputs: Any) -> Any:
                found = super().output_vectors(outputs)
                if isinstance(found.v, Tensor):
                    kept.append(found.v[:, 0])
                return found

        fk.FisherApproximation(
            self.workload.model, self.workload.data, Listening(), structure="diagonal", chunk_size=1 << 40
        )
        return kept[-1].reshape(self.output_gradient.shape)

    def unflatten(self, flat: Tensor) -> dict[str, Tensor]:
        """A flat vector as tensors by name."""
        own = dict(self.workload.model.named_parameters())
        parts = flat.split([own[name].numel() for name in self.names])
        return {name: part.view_as(own[name]) for name, part in zip(self.names, parts, strict=True)}

    def flatten(self, parts: Mapping[str, Tensor]) -> Tensor:
        """And back, in fisherkit's order."""
        return torch.cat([parts[name].detach().flatten() for name in self.names])


@contextlib.contextmanager
def plain_attention(workload: Workload) -> Iterator[None]:
    """Attention by matmuls where the workload attends: the fused kernels have no forward-mode derivative."""
    fast = torch.backends.mha.get_fastpath_enabled()
    try:
        torch.backends.mha.set_fastpath_enabled(fast and not workload.attention)
        with sdpa_kernel(SDPBackend.MATH) if workload.attention else contextlib.nullcontext():
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


class DisagreementError(RuntimeError):
    """A peer's result is not ours: nothing is timed."""


def check_agreement(where: str, ours: Values, theirs: Values, bounds: Mapping[str, float]) -> dict[str, float]:
    """Relative errors of a peer's values against ours.

    Args:
        where: workload, operation and peer.
        ours: by name.
        theirs: some of the same names.
        bounds: by name.

    Returns:
        ‖theirs − ours‖ / ‖ours‖ by name.

    Raises:
        DisagreementError: one is above its bound, or there is nothing to compare.
    """
    errors: dict[str, float] = {}
    for name, found in theirs.items():
        expected = ours[name].double()
        if found.shape != expected.shape:
            raise DisagreementError(f"{where}: {name} of shape {list(found.shape)}, ours {list(expected.shape)}")
        errors[name] = float((found.double() - expected).norm() / expected.norm())
        if not errors[name] <= bounds[name]:  # a NaN does not agree
            raise DisagreementError(
                f"{where}: {name} differs by {errors[name]:.2e} of its norm; expected at most {bounds[name]:.0e}. "
                "A result that is wrong is not timed: look for a change of conventions in the peer or an error in ours."
            )
    if not errors:
        raise DisagreementError(f"{where}: nothing to compare")
    return errors
