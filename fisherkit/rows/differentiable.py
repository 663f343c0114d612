"""The package's own calls of a model: differentiable, told apart from the user's, and the model whole afterwards.

Owns flags and state that are put back, where other values of parameters go meanwhile, and powers of two that keep
gradients in half precision away from underflow and overflow. Knows no rows.
"""

from __future__ import annotations

import re
import sys
import warnings
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from operator import is_
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointFunction

from fisherkit.arithmetic import at_least_single

OWN_PASS: ContextVar[bool] = ContextVar("OWN_PASS", default=False)
"""Whether the package itself is calling the model, so that who watches the user's calls can tell."""

COMPILER = "torch._dynamo"
"""The module that has been imported where anything was compiled."""

TARGETS = (8, 0, -8)
"""Binary exponents of the largest entry that a vector goes with, in the order in which they are tried."""

HOOKS_FIRE = ("ignore", re.compile("Full backward hook is firing when gradients"), UserWarning, None, 0)
"""The filter, in passes of the package's own, of what torch says of users' hooks in users' own passes, too."""

_PLAIN = {bool, int, float, str, type(None), tuple}
_HOOKS = {name for name in vars(nn.Module()) if "_hooks" in name}
_CONTAINERS = {dict, OrderedDict, defaultdict, list, set, deque}
_LONGEST = 1 << 16
"""Containers with more entries are data and not state; they are not looked into."""

_SMALL = 1 << 20
"""Entries up to which integers may be counters or caches; more are quantized weights, which are only read."""


class Uncompiled:
    """`torch.compile` does nothing between `begin` and `end`: what a pass is watched by would be compiled, in seconds.

    Passes end in any order; the last one puts the user's stance back.
    """

    _passes: ClassVar[list[Any]] = []

    @classmethod
    def begin(cls) -> None:
        """Begin a pass; not worth a call where nothing was ever compiled, and `COMPILER` is not imported."""
        cls._passes.append(None if cls._passes else torch.compiler.set_stance("force_eager"))

    @classmethod
    def end(cls) -> None:
        """End a pass that `begin` began."""
        stance = cls._passes.pop()
        if stance is not None:
            stance.__exit__(None, None, None)


@contextmanager
def differentiable(model: nn.Module, parameters: Sequence[Tensor]) -> Iterator[None]:
    """Gradients on, frozen parameters differentiable, attention's fused inference kernel off; all put back after.

    Reentrant checkpoints run plainly: their graph hides the parameters inside. Compiled parts run uncompiled.
    """
    eager = COMPILER in sys.modules
    if eager:
        Uncompiled.begin()  # before all that must be put back: it may raise
    token = OWN_PASS.set(True)
    flags = [p.requires_grad for p in parameters]
    fast = torch.backends.mha.get_fastpath_enabled()
    inference = torch.inference_mode(False) if torch.is_inference_mode_enabled() else nullcontext()
    checkpoints = vars(CheckpointFunction).get("apply")
    warnings.filters.insert(0, HOOKS_FIRE)  # type: ignore[attr-defined]  # catch_warnings would show others anew
    try:
        torch.backends.mha.set_fastpath_enabled(False)
        CheckpointFunction.apply = _APPLIED  # type: ignore[method-assign]
        for p, flag in zip(parameters, flags, strict=True):
            if not flag:
                p.requires_grad_(True)
        with inference, torch.enable_grad(), kept_whole(model):
            yield
    finally:
        if HOOKS_FIRE in warnings.filters:  # which a model may have reset
            warnings.filters.remove(HOOKS_FIRE)  # type: ignore[attr-defined]
        OWN_PASS.reset(token)
        if eager:
            Uncompiled.end()
        torch.backends.mha.set_fastpath_enabled(fast)
        if checkpoints is None:
            del CheckpointFunction.apply
        else:
            CheckpointFunction.apply = checkpoints  # type: ignore[method-assign]
        for p, flag in zip(parameters, flags, strict=True):
            if p.requires_grad != flag:
                p.requires_grad_(flag)


def _apply(function: Callable[..., Any], preserve_rng_state: bool, *args: Any) -> Any:
    """A checkpoint with use_reentrant=True as a call, on the class itself, whoever imported it from where."""
    return function(*args)


_APPLIED = staticmethod(_apply)


def pulled_back(z: Tensor, inputs: Sequence[Any], v: Tensor, *, keep: bool = True) -> tuple[Tensor | None, ...]:
    """Gradients of Σ v · z; None for inputs that z does not depend on. The graph stays if it is to be kept.

    Of a number and not of z itself, which would import a computer algebra system to compare two shapes.
    """
    v = v.clone() if v.is_inference() else v  # what inference mode made, a graph does not take
    with torch.enable_grad():  # hooks of a backward pass run without
        total = (z * v.to(z.dtype)).sum()
    return torch.autograd.grad(total, inputs, retain_graph=keep, allow_unused=True)


def scales(v: Float[Tensor, "k B ..."]) -> Iterator[Float[Tensor, "k B"]]:
    """What to divide each example's vectors by, powers of two in float32 at least, for one try after the other.

    A float16 gradient below 6e-8 is 0, and one above 65,504 infinite. A backward pass is linear and examples do not
    influence each other, so each example's output vector may go through it times a power of two, which changes no
    digit, and its row be divided by that (loss scaling, Micikevicius et al., arXiv 1710.03740, one factor an example).
    """
    largest = v.reshape(*v.shape[:2], -1).abs().amax(2).to(at_least_single(v.dtype))
    exponent = torch.frexp(largest).exponent.clamp(-100, 100)
    for target in TARGETS:
        yield torch.ldexp(torch.ones_like(largest), exponent - target)


# -- the model whole -------------------------------------------------------------------------------------------------


@contextmanager
def kept_whole(model: nn.Module) -> Iterator[None]:
    """Put back what passes of a model write on its modules: attributes, buffers, and the contents of containers.

    Old weight norm recomputes ``weight``, caches keep tensors of a graph or of a transform that is over, moving
    averages move. In here buffers, and plain tensors without gradient, are copies, so that the model's own are never
    written to. Hooks are left to those who register them.

    Cost: a copy of all buffers, and a look at every attribute of every module.
    """
    seen: set[int] = set()
    kept = [_Kept(module, seen) for module in model.modules()]
    copies: dict[int, Tensor] = {}
    try:
        for one in kept:
            one.put_copies(copies)
        yield
    finally:
        for one in kept:
            one.put_back()


def with_values(model: nn.Module, values: Mapping[str, Tensor]) -> Callable[..., Any]:
    """A model as a function, with other values of some parameters or buffers in every place that has them.

    As `torch.func.functional_call` calls it, which loses a module's parameters where the module goes by two names.

    Raises:
        RuntimeError: a scripted module, whose parameters cannot be replaced.
    """
    modules = list(model.modules())
    if any(isinstance(module, torch.jit.ScriptModule) for module in modules):
        raise RuntimeError("the parameters of a scripted module cannot be replaced")
    own = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    new = {id(tensor): values[name] for name, tensor in own if name in values}
    # A dict of a module occurs once among distinct modules, whatever the module is called.
    places = [
        (held, name, tensor)
        for module in modules
        for held in (module._parameters, module._buffers)
        for name, tensor in held.items()
        if id(tensor) in new
    ]

    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            for held, name, tensor in places:
                held[name] = new[id(tensor)]  # type: ignore[assignment]  # a plain tensor in a parameter's place
            return model(*args, **kwargs)
        finally:
            for held, name, tensor in places:
                held[name] = tensor  # type: ignore[assignment]

    return call


class _Kept:
    """One module's attributes and the containers among them, each with a shallow copy; and where its tensors are."""

    def __init__(self, module: nn.Module, seen: set[int]) -> None:
        self.attributes = module.__dict__
        self.before = self.attributes.copy()
        self.containers: list[tuple[Any, Any]] = []
        self.places: list[tuple[Any, str, Tensor]] = []
        self.copies: list[tuple[Any, str, Tensor, int | None]] = []
        pending: list[Any] = []
        for name, value in self.before.items():
            cls = type(value)
            if cls in _PLAIN or name in _HOOKS:
                continue
            if cls in _CONTAINERS:
                if name == "_buffers":
                    self.places += [(value, key, t) for key, t in value.items() if t is not None]
                pending.append(value)
            elif isinstance(value, Tensor):
                self.places.append((self.attributes, name, value))
        while pending:
            container = pending.pop()
            if id(container) in seen or len(container) > _LONGEST:
                continue
            seen.add(id(container))
            self.containers.append((container, container.copy()))
            if container:
                pending += [value for value in _values(container) if type(value) in _CONTAINERS]

    def put_copies(self, copies: dict[int, Tensor]) -> None:
        """Copies in the place of buffers and of plain tensors that passes may write to."""
        for held, name, tensor in self.places:
            if _writable(tensor):
                if id(tensor) not in copies:
                    with torch.no_grad():
                        copies[id(tensor)] = tensor.clone()
                own = held[name] = copies[id(tensor)]
                self.copies.append((held, name, own, version_of(own)))

    def put_back(self) -> None:
        """As it was where tensors were written; a module's own counts of its calls are its own business."""
        copied = {(id(held), name) for held, name, _, _ in self.copies}
        written = any(held.get(name) is not own or version_of(own) != known for held, name, own, known in self.copies)
        written = written or any(h.get(n) is not t for h, n, t in self.places if (id(h), n) not in copied)
        for held, name, tensor in self.places:
            if written or held.get(name) is not tensor:
                held[name] = tensor
        changed = [pair for pair in self.containers if (pair[0] or pair[1]) and _differ(*pair)]
        if not written and not changed and not _differ(self.attributes, self.before):
            return
        pairs = [(self.attributes, self.before), *changed]
        if written or any(_tensors_differ(container, content) for container, content in pairs):
            for container, content in pairs:
                if _differ(container, content):
                    container.clear()
                    getattr(container, "extend" if isinstance(container, (list, deque)) else "update")(content)


def version_of(tensor: Tensor) -> int | None:
    """What in-place changes count up; an inference tensor has none."""
    return None if tensor.is_inference() else tensor._version


def _values(container: Any) -> Any:
    return container.values() if isinstance(container, dict) else container


def _differ(container: Any, content: Any) -> bool:
    """Whether a container has other things in it, or in another order, than its copy."""
    if isinstance(container, set):
        return bool(container != content)
    if len(container) != len(content):
        return True
    if isinstance(container, dict):
        return not all(map(is_, container.values(), content.values())) or list(container) != list(content)
    return not all(map(is_, container, content))


def _tensors_differ(container: Any, content: Any) -> bool:
    """Whether something that holds tensors came or went."""
    now, before = ({id(value): value for value in _values(one)} for one in (container, content))
    return any(_holds_tensor(one[key]) for one in (now, before) for key in now.keys() ^ before.keys() if key in one)


def _holds_tensor(value: Any) -> bool:
    if isinstance(value, (Tensor, nn.Module)):
        return True
    return type(value) in _CONTAINERS | {tuple} and any(map(_holds_tensor, _values(value)))


def _writable(tensor: Tensor) -> bool:
    """Whether a forward pass can write to a tensor and it is no weight."""
    if tensor.requires_grad or tensor.layout != torch.strided:
        return False
    if not tensor.is_floating_point() and tensor.numel() > _SMALL:
        return False
    return 0 not in tensor.stride() or tensor.numel() <= 1  # torch refuses to write to what is expanded
