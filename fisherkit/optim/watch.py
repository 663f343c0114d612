"""Watching a model's own calls: when one begins, when it ends, and who must not listen."""

from __future__ import annotations

import sys
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, TypeAlias

import torch
from torch import nn
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack, _pop_mode, _push_mode

from fisherkit.rows.differentiable import COMPILER, HOOKS_FIRE, OWN_PASS, Uncompiled
from fisherkit.rows.record import Recorder

Begins: TypeAlias = Callable[[tuple[Any, ...], dict[str, Any]], Recorder | None]


class Watch:
    """Announces a model's outermost calls to two methods of an object, which it keeps weakly.

    Args:
        model: the model.
        begins: told of a call's arguments; gives the recorder that is to see it, or None if its end is of no interest.
        ends: told of the output of a call that has a recorder; of None if it raised.

    Attributes:
        close: takes the hooks off.
    """

    def __init__(self, model: nn.Module, begins: Begins, ends: Callable[[Any], None]) -> None:
        self.model = model
        self._begins, self._ends = weakref.WeakMethod(begins), weakref.WeakMethod(ends)
        self._paused = self._quiet = self._depth = 0
        self._frame: FrameType | None = None
        self._active: list[Recorder] = []
        handles = [
            model.register_forward_pre_hook(_Hook(self, True), with_kwargs=True),
            model.register_forward_hook(_Hook(self, False), with_kwargs=True, always_call=True),
        ]
        self.close = weakref.finalize(self, _remove, handles, self._active)
        _LIVE.add(self)

    @property
    def silent(self) -> bool:
        """Whether nothing is announced now."""
        return self._paused > 0 or self._quiet > 0

    @contextmanager
    def paused(self) -> Iterator[None]:
        """The user's wish: nothing in here is announced."""
        self._paused += 1
        try:
            yield
        finally:
            self._paused -= 1

    @contextmanager
    def quiet(self) -> Iterator[None]:
        """While a pass of our own runs, nobody who watches the same parameters takes notice."""
        kin, others = [self], [one for one in list(_LIVE) if one is not self]
        if others:
            own = {id(p) for p in self.model.parameters()}
            kin += [one for one in others if any(id(p) in own for p in one.model.parameters())]
        recorders = [recorder for one in kin for recorder in one._active]
        for one in kin:
            one._quiet += 1
        for recorder in recorders:
            recorder.muted += 1
        warnings.filters.insert(0, HOOKS_FIRE)  # type: ignore[attr-defined]
        try:
            yield
        finally:
            if HOOKS_FIRE in warnings.filters:
                warnings.filters.remove(HOOKS_FIRE)  # type: ignore[attr-defined]
            for one in kin:
                one._quiet -= 1
            for recorder in recorders:
                recorder.muted -= 1

    def tidy(self) -> None:
        """Forget a call that was interrupted so that its end was never announced."""
        if self._frame is None or _is_running(self._frame):
            return
        self._frame, self._depth = None, 0
        while self._active:
            leave(self._active.pop())

    def _begin(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.tidy()
        self._depth += 1
        if self._depth > 1:
            return
        self._frame = sys._getframe(2)
        begins = self._begins()
        if begins is None or self.silent or OWN_PASS.get() or not torch.is_grad_enabled():
            return
        recorder = begins(args, kwargs)
        if recorder is not None:
            if COMPILER in sys.modules:
                Uncompiled.begin()
                recorder.uncompiled = True
            self._active.append(recorder)
            recorder.__enter__()  # type: ignore[no-untyped-call]

    def _end(self, output: Any) -> None:
        self._depth = max(self._depth - 1, 0)
        if self._depth > 0:
            return
        self._frame, ends = None, self._ends()
        if not self._active:
            return
        leave(self._active.pop())
        if ends is not None:
            ends(output)


_LIVE: weakref.WeakSet[Watch] = weakref.WeakSet()


class _Hook:
    """A hook on the model that keeps neither its owner alive nor copies of the model watched."""

    def __init__(self, owner: Watch | None, before: bool) -> None:
        self._owner, self._before = (None if owner is None else weakref.ref(owner)), before

    def __call__(self, module: nn.Module, *given: Any) -> None:
        if torch.compiler.is_compiling():
            return
        owner = None if self._owner is None else self._owner()
        # Taken off in the middle of a call, as by the garbage collector, torch calls it once more without its keywords.
        if owner is None or owner.model is not module or not owner.close.alive:
            return
        args, kwargs, *output = given
        if self._before:
            owner._begin(args, kwargs)
        else:
            owner._end(output[0] if output else None)

    def __reduce__(self) -> tuple[Any, ...]:
        return _Hook, (None, self._before)  # a copy or a file of the model has hooks that do nothing


def leave(mode: Recorder) -> None:
    """Take a mode off the stack, wherever in it: modes are not always left in the order in which they were entered."""
    if mode.uncompiled:
        Uncompiled.end()
    above: list[TorchFunctionMode] = []
    for _ in _get_current_function_mode_stack():
        top = _pop_mode()
        if top is mode:
            break
        above.append(top)
    for other in reversed(above):
        _push_mode(other)


def _is_running(frame: FrameType) -> bool:
    """Whether a function has not returned. The identity of its frame would not tell: the next one may get the same."""
    try:
        frame.clear()
    except RuntimeError:  # it is executing
        return True
    return False


def _remove(handles: list[Any], active: list[Recorder]) -> None:
    for handle in handles:
        handle.remove()
    while active:
        leave(active.pop())
