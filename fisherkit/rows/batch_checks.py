"""Whether examples have the outputs and gradients in a batch that they have in other company.

What a forward pass was seen to do says which batches are compared with parts of themselves, or with two examples alone.
Builds and training steps ask alike. Knows no rows.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fisherkit.arithmetic import HALF
from fisherkit.data import Batch
from fisherkit.rows.differentiable import pulled_back
from fisherkit.rows.generic import dense_gradient
from fisherkit.rows.plan import Plan, alone, require_alike, tolerance, two_of
from fisherkit.rows.watched import Watched


@dataclass
class BatchChecks:
    """What has been looked at of a model's batches: outputs, and whether gradients were examples' own.

    ``looked`` once outputs have been searched for probabilities in the place of logits: two examples are too few.

    In its methods, ``place`` is that of a batch in data which are read again and again; None where each is met once.
    """

    looked: bool = True
    _compared: set[Hashable] = field(default_factory=set)
    _own: dict[Hashable, bool] = field(default_factory=dict)

    def is_due(self, plan: Plan, size: int, seen: Watched) -> bool:
        """Whether a batch that is met once is to be compared, or its gradients."""
        noted, keys, _ = self._outputs(plan, size, None, seen)
        kept, key = self._gradients(size, None, seen)
        return size > 1 and (not keys <= noted or (self._asks(plan, seen) and key not in kept))

    def refuse_influence(self, plan: Plan, batch: Batch, place: int | None, seen: Watched, call: str) -> None:
        """Refuse a batch in which examples have other outputs than in other company.

        Where functions on the way may have mixed examples, all are compared with themselves in parts of the batch;
        elsewhere two with themselves in a batch of their own, since what is done to all may depend on how many they
        are.

        Raises:
            ModelError: they do.

        Cost: two forward passes of an example for each size of batches that a model has not met; one of the batch for
        each answer to what the model asks of a whole batch that is new, as whether any example is padded, and of
        each size in a build where functions do not keep examples apart. One of every batch where its numbers may decide
        what becomes of its examples, as in experts with a capacity.
        """
        noted, keys, parts = self._outputs(plan, batch.size, place, seen)
        if batch.size > 1 and not keys <= noted:
            (_require_alike_in_parts if parts else _compare_two)(plan, batch, seen, call)
            noted.update(keys)

    def has_own_gradients(self, plan: Plan, batch: Batch, place: int | None, seen: Watched) -> bool:
        """Whether gradients in a batch are its examples' own, where hooks or functions of users may make others.

        So may numbers that the model's two first examples did not bring, as those that depend on the batch's size.

        Cost: none where there are none, else a forward and two backward passes of a batch of each size; where there are
        hooks or functions of users a forward and four backward passes of every batch, of one example too. One forward
        pass more where the batch's own has led to other leaves than the parameters.
        """
        if not self._asks(plan, seen) or (batch.size == 1 and not seen.users):
            return True  # of one example, hooks may still ask for what its pass left on the model
        kept, key = self._gradients(batch.size, place, seen)
        if key not in kept:
            kept[key] = _has_own_gradients(plan, batch, seen)
        if kept[key]:
            plan.tried.seen.add(("numbers", seen.numbers))
        return kept[key]

    @staticmethod
    def _asks(plan: Plan, seen: Watched) -> bool:
        """Whether gradients in a batch may be others than its examples' own."""
        return seen.own_gradients or ("numbers", seen.numbers) not in plan.tried.seen

    def _outputs(
        self, plan: Plan, size: int, place: int | None, seen: Watched
    ) -> tuple[set[Hashable], set[Hashable], bool]:
        """Where it is noted that outputs were compared, under which keys, and whether all of a batch have to be."""
        content = seen.by_content
        if content or not seen.proven:
            return set() if content and place is None else self._compared, {(place if content else 0, size)}, True
        read, batch = ("read", seen.read), ("batch", size, seen.numbers)
        parts = bool(seen.read) and read not in plan.tried.seen
        return plan.tried.seen, {batch, read} if parts else {batch}, parts

    def _gradients(self, size: int, place: int | None, seen: Watched) -> tuple[dict[Hashable, bool], Hashable]:
        """Where it is noted that gradients were compared, and under which key."""
        content = seen.decided or seen.users
        return {} if content and place is None else self._own, (size, content and place)


def _compare_two(plan: Plan, batch: Batch, seen: Watched, call: str) -> None:
    z, probe = seen.z.detach(), plan.probe
    two = batch.take(two_of(batch))
    pairs = zip(two.inputs, probe.batch.inputs, strict=False)
    allowed = tolerance(z.dtype, plan.coarsest) * z[:2].norm().maximum(z.norm() * (2 / batch.size) ** 0.5)
    if probe.alike and all(a.shape == b.shape and torch.equal(a, b) for a, b in pairs):
        require_alike(probe.z, z[:2], allowed, call)
        return
    with plan.quiet():
        for n in range(2):
            again = alone(plan.model, two, n)
            require_alike(again, z[[n] * len(again)], allowed, call)


def _require_alike_in_parts(plan: Plan, batch: Batch, seen: Watched, call: str) -> None:
    """Refuse a batch whose examples have other outputs in parts of it, or where a statistic decides alone.

    Raises:
        ModelError: they have.
    """
    z = seen.z.detach()
    for piece in _pieces(batch.size, z.device, alone=seen.decided):
        with plan.quiet():
            torch.rand(1, device=z.device)  # else a model that draws would draw what it drew before
            if seen.decided:
                again = alone(plan.model, batch, int(piece))
            else:
                again = batch.take(piece).call(plan.model).detach()
        allowed = z[piece].norm().maximum(z.norm() * (len(piece) / batch.size) ** 0.5)
        require_alike(again, z[piece].expand_as(again), tolerance(z.dtype, plan.coarsest) * allowed, call)


def _has_own_gradients(plan: Plan, batch: Batch, seen: Watched) -> bool:
    """Whether gradients of a batch are the sum of those of its parts, or of its examples where a statistic decides.

    Where users' code has a hand in them, gradients of large vectors as well, of which it may clip a norm.
    """
    z, own = seen.z, list(plan.parameters.values())
    large = 64.0 if {plan.coarsest, z.dtype}.intersection(HALF) else 2.0**30
    scales = (1.0, large) if seen.users else (1.0,)
    v = torch.randn(z.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(z)

    def back(z: Tensor, v: Tensor) -> list[Sequence[Tensor | None]]:
        return [pulled_back(z, own, v * scale) for scale in scales]

    with plan.quiet():
        try:
            found = back(z, v)
        except Exception:  # of a hook that asks for what its forward pass left on the model, which is gone
            if not seen.users:
                raise
            return False
        if all(g is None for g in found[0]):  # a pass that leads to other leaves
            found = back(batch.call(plan.model), v)
        whole = torch.stack([_flat(own, one) for one in found])
        sums = torch.zeros_like(whole)
        for piece in _pieces(batch.size, z.device, few=1, alone=seen.decided):
            part = back(batch.take(piece).call(plan.model), v[piece])
            sums += torch.stack([_flat(own, one) for one in part])
    allowed = tolerance(plan.example_parameter.dtype, plan.coarsest) * sums.norm(dim=1)
    return bool(((whole - sums).norm(dim=1) <= allowed).all())


def _pieces(size: int, device: torch.device, *, few: int = 2, alone: bool = False) -> Sequence[Tensor]:
    """An example and halves of the others, in another order; of so ``few`` the first one, as often as there are.

    With ``alone``, each by itself.
    """
    if alone:
        return torch.arange(size, device=device).split(1)
    order = torch.randperm(size, generator=torch.Generator().manual_seed(0)).to(device)
    # Halves may have the same mean, or be told the same, as the whole; one example rarely is.
    return [order[:1], *order[1:].chunk(2)] if size > few else [torch.zeros_like(order)]


def _flat(parameters: Sequence[Tensor], found: Sequence[Tensor | None]) -> Tensor:
    """Gradients as one vector."""
    return torch.cat([dense_gradient(p, g).flatten() for p, g in zip(parameters, found, strict=True)])
