"""Training steps of a model that `fully_shard` has sharded: passes are made again on a copy with all weights.

What the sharded model is called with, and the gradient that reaches its outputs, are kept. When a step asks for rows,
the copy is filled with the weights, which no step has changed since, and does what the model did, watched as any other
model is. Between steps the copy has no weights.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Variable
from torch.autograd.graph import get_gradient_edge

from fisherkit.data import Batch, outputs_of
from fisherkit.errors import ModelError
from fisherkit.optim.capture import OPEN, Capture, runs, used_again, versions, zeroed
from fisherkit.optim.passes import SAME, Captured
from fisherkit.optim.watch import Watch
from fisherkit.processes import Processes
from fisherkit.randomness import RngState, device_generators, rng_state, untouched_rng
from fisherkit.rows.differentiable import kept_whole
from fisherkit.rows.record import Recorder
from fisherkit.rows.verified import fingerprint
from fisherkit.wrappers import full, in_its_precision, reshard


@dataclass(eq=False)
class Call:
    """A forward pass of the sharded model.

    Args:
        batch: what the model was given.
        rng: where the random generators were.
        autocast: as it was.
        z: the outputs.
        gradient: of the user's loss there, once a backward pass has reached them.
    """

    batch: Batch
    rng: RngState
    autocast: torch.autocast
    z: Tensor | None = None
    gradient: Tensor | None = None


class Replay(Capture):
    """A `Capture` of the copy, for the parameters of the sharded model. Every process makes one.

    Args:
        model: the sharded model.
        args: further ones of a `Capture`.
        options: likewise.
    """

    def __init__(self, model: nn.Module, *args: Any, **options: Any) -> None:
        super().__init__(in_its_precision(model), *args, **options)
        self.owner = model
        device = next(model.parameters()).device
        self._device = device.type
        self._generators = device_generators(device)
        self._done: list[Call] = []
        self._call: Call | None = None
        self._held = self.parameters()
        self._outer = Watch(model, self.called, self.answered)
        self._made_of = fingerprint(model)
        self._empty()

    def parameters(self) -> dict[str, nn.Parameter]:
        """The sharded model's, of those that may take part: the shards, and not what they were gathered to."""
        reshard(self.owner)
        self._held = super().parameters()
        return self._held

    def take(self) -> list[Captured]:
        """As of a `Capture`."""
        self._outer.tidy()
        return super().take()

    def forget(self) -> None:
        """As of a `Capture`."""
        self._outer.tidy()
        self._done.clear()
        super().forget()

    def paused(self) -> AbstractContextManager[None]:
        """As of a `Capture`."""
        return self._outer.paused()

    def close(self) -> None:
        """As of a `Capture`."""
        self._outer.close()
        self._done.clear()
        super().close()

    # -- the sharded model's own passes --------------------------------------------------------------------------------

    def called(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Recorder | None:
        """A call of the sharded model begins."""
        if not self.wanted:
            return None
        device = self._device
        autocast = torch.autocast(
            device, dtype=torch.get_autocast_dtype(device), enabled=torch.is_autocast_enabled(device)
        )  # fmt: skip
        batch = Batch.of_call(args, kwargs).detached()
        self._call = Call(batch, rng_state(self._generators), autocast)
        recorder = Recorder({}, batch.size)
        recorder.muted = 1
        return recorder

    def answered(self, output: Any) -> None:
        """It has ended; None if it raised."""
        call, self._call = self._call, None
        z = None if call is None or output is None else outputs_of(output)
        if call is None or z is None or not z.requires_grad:
            return
        call.z = z.detach()
        self._open = [*self._open, call][-OPEN:]
        edge = get_gradient_edge(z)
        place, leaf, known, owner = edge.output_nr, _leaf(edge.node), weakref.ref(call), weakref.ref(self)

        def reached(gradients: Sequence[Tensor | None]) -> None:
            replay = owner()
            if replay is not None and leaf is not None and runs((leaf,)):
                replay._kept(known(), gradients[place])

        edge.node.register_prehook(reached)

    def _kept(self, call: Call | None, gradient: Tensor | None) -> None:
        """A backward pass is at the outputs of a call."""
        if self.closed or gradient is None or self._outer.silent:
            return
        if call is None or call.gradient is not None:
            raise used_again(self.call)
        if (self._done or self.finished) and zeroed(self._held, self._gradients):
            self._done.clear()
            self.finished.clear()
        call.gradient = gradient.detach()
        Variable._execution_engine.queue_callback(lambda: self._over(call))

    def _over(self, call: Call) -> None:
        """The backward pass is over; gradients are where `fully_shard` puts them."""
        if call in self._open:
            self._open.remove(call)
            self._done.append(call)
        self._gradients = versions(self._held)

    # -- the same passes on the copy -----------------------------------------------------------------------------------

    def catch_up(self, processes: Processes) -> None:
        """Make the passes again that a step is made of.

        Raises:
            ModelError: the copy does something else than the model did.

        Cost: each pass once more, with all weights in every process and their gradients.
        """
        calls, self._done = self._done, []
        own = bool(calls), fingerprint(self.owner) != self._made_of
        answers = processes.gathered(own)
        if not any(some for some, _ in answers):
            return
        if any(changed for _, changed in answers):
            self._renew()
        gradients, self._gradients = self._gradients, {}  # of the sharded model, not of the copy
        try:
            with self._filled():
                processes.each(f"{self.call}.step", lambda: self._again_on_copy(calls))
        except BaseException:
            self.finished.clear()  # in no process a part of another step
            raise
        finally:
            self._gradients = gradients

    def _renew(self) -> None:
        """Another copy, of the model as it is now: in another mode, or with other settings or hooks."""
        self._watch.close()
        self.model, self._made_of = in_its_precision(self.owner), fingerprint(self.owner)
        self._watch = Watch(self.model, self.begin, self.end)
        for known in (self._plans, self._through, self._chosen, self._seen):
            known.clear()

    @contextmanager
    def _filled(self) -> Iterator[None]:
        """The copy has the model's weights and buffers in here."""
        reshard(self.owner)
        with torch.no_grad():
            for p, one in zip(self.owner.parameters(), self.model.parameters(), strict=True):
                one.requires_grad_(p.requires_grad)
                one.untyped_storage().resize_(one.nbytes)
                one.copy_(full(p.detach()))
        for module, other in zip(self.owner.modules(), self.model.modules(), strict=True):
            other._buffers.update(module._buffers)
        try:
            yield
        finally:
            self._empty()

    def _empty(self) -> None:
        """Free the copy's weights."""
        for one in self.model.parameters():
            one.grad = None
            one.untyped_storage().resize_(0)

    def _again_on_copy(self, calls: Sequence[Call]) -> None:
        for call in calls:
            with untouched_rng([], call.rng, self._generators), kept_whole(self.model), torch.enable_grad():
                with call.autocast:
                    z = call.batch.handed(self.model)
                self._require_same(z.detach(), call.z)
                z.backward(None if call.gradient is None else call.gradient.to(z.dtype))

    def _require_same(self, found: Tensor, expected: Tensor | None) -> None:
        if expected is not None and found.shape == expected.shape:
            allowed = SAME.get(found.dtype, 1e-2) * expected.norm()
            if not bool((found - expected).norm() > allowed):  # nor where the loss has diverged
                return
        raise ModelError(
            f"{self.call}.step", "outputs of the sharded model that a copy with all weights does not have", "the same",
            why="rows of a sharded model are made by one more pass, of a copy",
            try_="a forward pass that gives the same again, outputs that are not changed in place, and weights that "
            "change in step() alone",
        )  # fmt: skip


def _leaf(node: Any) -> Any:
    """A node that adds to the ``.grad`` of a parameter; `fully_shard` has parameters in graphs that no module has."""
    pending, seen = [node], {node}
    while pending:
        one = pending.pop()
        if isinstance(getattr(one, "variable", None), nn.Parameter):
            return one
        new = {other for other, _ in one.next_functions if other is not None} - seen
        seen |= new
        pending += new
    return None
