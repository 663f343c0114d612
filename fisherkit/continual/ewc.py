"""`EWC`: elastic weight consolidation, a quadratic penalty that keeps what earlier tasks need.

Owns the terms, their decay and their state, and what must hold between a model, a Fisher and what was consolidated
before; the algebra of quadratic forms is `operators.quadratic`'s. One product with each operator gives the penalty's
value and its whole gradient. Asks a Fisher for neither kind nor structure.
"""

from __future__ import annotations

import copy
import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from fisherkit import io
from fisherkit.adapters import products, values
from fisherkit.arguments import check_choice, check_number, check_type
from fisherkit.arithmetic import all_finite, without_autocast
from fisherkit.errors import (
    InvalidArgumentError,
    InvalidTypeError,
    ModelError,
    NoClosedFormError,
    NonFiniteError,
    UnknownParameterError,
    listed,
    warn,
)
from fisherkit.model_state import check_checksum, measured_at, with_checksum
from fisherkit.operators import FisherOperator, Quadratic, normalize, state_of
from fisherkit.operators.normalization import check_normalize
from fisherkit.operators.persistence import renamed, restore
from fisherkit.operators.quadratic import atoms, join
from fisherkit.space import ParameterSpace, Selection
from fisherkit.wrappers import full, matching, unwrapped

CALL = "EWC.consolidate"

WATCHED_FROM, GROWTH, LARGE = 16, 1e3, 1e2
"""A penalty that grew so many times between two calls whose numbers double, the first of them this one or later, to a
value that no loss competes with, runs away: drifting at an even speed it grows 4 times, at an accelerating one 16."""

SAME_MOMENT = "the centre θ* is taken from the model, so both must be of the same moment"


class EWC(nn.Module):
    """½ · strength · Σ_t decay^(T−t) (θ − θ_t)ᵀ F_t (θ − θ_t), over the tasks t = 1 … T consolidated so far.

        ewc = fk.continual.EWC(model)
        ...  # train on the first task
        ewc.consolidate(fk.ImprovedEmpiricalFisher(model, first_task, structure="kfac", power=0.75))
        loss = F.cross_entropy(model(x), y) + ewc.penalty()  # in training on the next one

    Source: Kirkpatrick et al., "Overcoming catastrophic forgetting in neural networks" (arXiv 1612.00796). The decay is
    that of online EWC (Schwarz et al., arXiv 1805.06370), which also moves all centres to the newest θ*; here each term
    keeps its own.

    The terms of structures that add up to one (diagonal, dense, rows) are joined, exactly: memory does not grow with
    tasks, but for rows up to the size of the D × D matrix. Kronecker products do not add up to one, and each task's are
    kept.

    Of a Fisher over the frozen weights that LoRA adapters act on (`fisherkit.adapters.merged_weights`), θ is W + s·BA,
    and the gradient reaches A and B.

    The model is no submodule: its parameters are neither in ``ewc.parameters()`` nor in ``ewc.state_dict()``. A deep
    copy of an EWC alone is bound to the same model; within a deep copy of what holds both, to the copied model.

    Args:
        model: the model that is trained; within a wrapper (DDP, compile) the one inside is taken.
        strength: factor of the penalty; may be set later. 1 is what the Laplace approximation says of a Fisher on the
            loss's scale and tasks of equal size; 3 holds better, measured with the Fisher of the lines above.
        decay: factor on older terms at each consolidation, from 0 to 1.
        normalize: None takes Fishers as they are, with what their sizes say: a task that is held by few examples or
            many, a network that is sure or not. "trace" divides each by its mean eigenvalue, "norm" by its root mean
            square eigenvalue, for matrices that are not on the loss's scale; a strength near 0.1 goes with them.
        grown: what happens if a parameter is larger than it was when consolidated: "refuse", or "leading": its first
            entries along each axis are the old ones, the others are free.
        drop_below: terms that could not be joined and whose weight, decay^age, is not above this are dropped.

    Attributes:
        model: the model, without wrappers.
        consolidations: T.

    Raises:
        InvalidTypeError, InvalidArgumentError: arguments that do not fit.
    """

    model: nn.Module

    def __init__(
        self,
        model: nn.Module,
        strength: float = 3.0,
        decay: float = 1.0,
        normalize: str | None = None,
        *,
        grown: str = "refuse",
        drop_below: float = 0.0,
    ) -> None:
        super().__init__()
        check_type("EWC", "model", model, nn.Module, "a torch.nn.Module")
        if isinstance(model, AveragedModel):
            raise InvalidTypeError(
                "EWC", "an AveragedModel", "the model that is trained",
                why="averages are a copy that no optimizer changes, so its penalty would hold nothing",
                try_="EWC(model), after the averages were copied into it if they are what is to be kept",
            )  # fmt: skip
        if next(model.parameters(), None) is None:
            raise InvalidArgumentError("EWC", "a model without parameters", "one with some to hold")
        check_normalize(normalize, "EWC")
        check_choice("EWC", "grown", grown, ("refuse", "leading"))
        self.model = unwrapped(model)
        self.strength = strength
        self.decay = check_number("EWC", "decay", decay, most=1)
        self.drop_below = check_number("EWC", "drop_below", drop_below, most=1)
        self.normalize, self.grown = normalize, grown
        self.consolidations = 0
        self._put(())

    def _put(self, terms: tuple[Term, ...]) -> None:
        """Hold these terms, and watch their penalty from the start."""
        self._terms = terms
        self._calls, self._value, self._warned = 0, math.inf, False

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "model":
            self.__dict__[name] = value  # nn.Module would register it as a submodule
        else:
            super().__setattr__(name, value)

    @property
    def strength(self) -> float:
        """The factor of the penalty."""
        return self._strength

    @strength.setter
    def strength(self, value: float) -> None:
        self._strength = check_number("EWC", "strength", value)

    @without_autocast()
    def consolidate(self, fisher: FisherOperator, *, uncovered: str = "refuse", free: Selection = None) -> None:
        """Keep the model's present parameters and this Fisher as what the task just learned needs.

        Args:
            fisher: of the model as it is now, on the task's data; of any kind and structure, a sum, or loaded.
            uncovered: what happens to trainable parameters that the Fisher leaves out: "refuse", or "free" to change.
            free: names, or a predicate ``(name, parameter) -> bool``: those that may be left out, other tasks' heads
                for instance.

        Raises:
            FisherkitError: in one of its forms: the Fisher and the model do not fit, parameters are left out, F = 0
                cannot be normalised, or its rows are streamed and would follow the model. Nothing is changed then.

        Cost: one pass over the operator; for dense matrices that are joined a Cholesky factorization.
        """
        parameters = dict(self.model.named_parameters())
        if isinstance(fisher, FisherOperator):
            fisher = renamed(fisher, matching(fisher.space.names, parameters))
        _check_fisher(fisher, self.model, uncovered, free)
        self._refuse_twice(fisher.space.names)
        try:
            state_of(fisher)
        except NoClosedFormError as error:  # rows that are streamed from the data would follow the model
            raise error.at(CALL) from error
        terms = [replace(term, weight=self.decay * term.weight) for term in self._terms]
        terms = [term for term in terms if term.weight > self.drop_below]
        now = values(self.model, fisher.space.names)
        for atom in atoms(normalize(fisher, self.normalize)):
            flat = torch.cat([full(now[name].detach()).reshape(-1) for name in atom.space.names])
            _add(terms, Quadratic.of(atom, flat.to(atom.dtype)))
        self._put(tuple(terms))
        self.consolidations += 1

    def penalty(self) -> Tensor:
        """The penalty at the model's present parameters.

        Returns:
            A scalar in the model's dtype, to be added to a loss; 0 before the first consolidation. Its gradient is
            strength · Σ_t decay^(T−t) F_t(θ − θ_t), computed with the value in one product with each F_t. Parameters
            that do not require grad add to the value and get no gradient.

        Raises:
            ModelError: the model lacks a consolidated parameter, or has it in another shape (see ``grown``).
            InvalidArgumentError: the model has moved to another device.
            NoClosedFormError: in a backward pass through its gradient.

        Warns:
            UserWarning: once for each consolidation, where the penalty runs away or is not finite: the optimizer's step
                is too long for its curvature. Looked at in calls 16, 32, 64 …, so that no other waits for the device.
        """
        parameters = dict(self.model.named_parameters())
        names = list(dict.fromkeys(name for term in self._terms for name in term.shapes)) or list(parameters)[:1]
        _check_held(self._terms, parameters, self.grown, "EWC.penalty")
        now = values(self.model, names)
        tensors = map(full, now.values())
        result: Tensor = _Penalty.apply(self._terms, self.strength, tuple(now), *tensors)  # type: ignore[no-untyped-call]
        self._watch(result.detach())
        return result

    def _watch(self, penalty: Tensor) -> None:
        """Warn once if the penalty has run away since the call of half this number."""
        self._calls += 1
        if self._warned or self._calls < WATCHED_FROM or self._calls & (self._calls - 1):
            return
        before, self._value = self._value, float(penalty)
        if self._value > max(LARGE, GROWTH * before) or not math.isfinite(self._value):
            self._warned = True
            since = "" if math.isinf(before) else f", after {before:.3g} at call {self._calls // 2:,}"
            warn(
                f"EWC.penalty: it is {self._value:.3g} at call {self._calls:,} since the last consolidation{since}. "
                f"Steps that are too long for the penalty's curvature increase it, each more than the last: with plain "
                f"gradient descent those of a learning rate above ewc.largest_stable_lr(), which strength="
                f"{self.strength:g} is part of. Try: a smaller learning rate or strength, or Adam."
            )

    def largest_stable_lr(self) -> float:
        """The learning rate up to which plain gradient descent on the penalty does not diverge.

        Returns:
            2 / (strength · λ), λ the largest eigenvalue of Σ_t decay^(T−t) F_t, or, where terms could not be joined, a
            bound on it, so that the rate is a safe one: the largest eigenvalues of the terms that a parameter is in,
            added, for the parameter with the most. Infinite where there is no penalty. With momentum m the limit is
            1 + m times that; Adam's steps do not depend on the penalty's size.

        Raises:
            NoClosedFormError: an operator of your own that does not tell its eigenvalues, or products of adapters, in
                whose factors the penalty is no quadratic.

        Cost: an eigendecomposition for each term: of the factors, for Kronecker products, of the Gram matrix for rows.
        """
        if found := products(self.model, {name for term in self._terms for name in term.shapes}):
            raise NoClosedFormError(
                "EWC.largest_stable_lr", f"the products of adapters {listed(map(repr, found))}",
                "parameters that are trained themselves", why="in the factors the penalty is no quadratic",
                try_="Adam, whose steps do not depend on the penalty's size",
            )  # fmt: skip
        largest: dict[str, float] = defaultdict(float)
        for term in self._terms:
            value = term.weight * float(term.quadratic.operator.eigenvalues(1)[0])
            for name in term.shapes:
                largest[name] += value
        curvature = self.strength * max(largest.values(), default=0.0)
        return 2 / curvature if curvature > 0 else math.inf

    def _refuse_twice(self, names: tuple[str, ...]) -> None:
        """Refuse adapters beside the weights that they act on, whose value would be another than was consolidated."""
        held = {name for term in self._terms for name in term.shapes}
        apart = {*products(self.model, held), *products(self.model, names)}
        if both := sorted(apart - set(products(self.model, {*held, *names}))):
            raise InvalidArgumentError(
                CALL, f"Fishers over {listed(map(repr, both))} and over the adapters on them",
                "Fishers over the products or over the adapters", why="both would hold one change",
                try_="params=fk.adapters.merged_weights(model) for all, or for none",
            )  # fmt: skip

    @property
    def nbytes(self) -> int:
        """Bytes that the terms take."""
        return sum(term.nbytes for term in self._terms)

    def extra_repr(self) -> str:
        """What ``repr`` shows between the brackets."""
        return (
            f"strength={self.strength}, decay={self.decay}, normalize={self.normalize!r}, "
            f"consolidations={self.consolidations}, terms={len(self._terms)}"
        )

    # -- state, copies, devices: nn.Module's own protocols -------------------------------------------------------------

    def get_extra_state(self) -> dict[str, Any]:
        """The terms as plain containers and tensors: part of ``state_dict()``, readable with ``weights_only=True``.

        Strength, decay and policies are the constructor's, as in every module.
        """
        state = {
            "version": 1,
            "normalize": self.normalize,
            "consolidations": self.consolidations,
            "terms": [term.to_plain() for term in self._terms],
        }
        return with_checksum(state)

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Put the terms of a ``state_dict()`` in place of these; see `set_extra_state`.

        Raises:
            InvalidArgumentError: a state of something else, such as the model's, or what `set_extra_state` refuses.
            ModelError: the model does not have the parameters that were consolidated.
        """
        if strict and not (isinstance(state_dict, Mapping) and "_extra_state" in state_dict):
            names = f" with {list(state_dict)[:4]}" if isinstance(state_dict, Mapping) else ""
            raise InvalidArgumentError(
                "EWC.load_state_dict", f"a {type(state_dict).__name__}{names}", "one of EWC.state_dict()",
                why="the model's parameters are no part of it, only the terms are",
                try_="saving ewc.state_dict() beside model.state_dict(), each loaded into its own",
            )  # fmt: skip
        return super().load_state_dict(state_dict, strict, assign)

    def set_extra_state(self, state: Any) -> None:
        """Put the terms of a state in place of these: what ``load_state_dict()`` calls. Needs no data and no Fishers.

        Raises:
            InvalidArgumentError: not such a state, damaged since, of a later version, or of an EWC with another
                ``normalize``. States from before there were checksums are not compared.
            ModelError: the model does not have the parameters that were consolidated.
        """
        call = "EWC.load_state_dict"
        device = next(self.model.parameters()).device
        check_checksum(state, call)
        try:
            version, how, consolidations = state["version"], state["normalize"], int(state["consolidations"])
            terms = tuple(Term.from_plain(term, device) for term in state["terms"]) if version == 1 else ()
        except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            raise InvalidArgumentError(
                call, f"a state that cannot be read ({error})", "one of EWC.state_dict()"
            ) from error
        if version != 1:
            raise InvalidArgumentError(call, f"version {version}", "version 1", try_="a newer fisherkit")
        if how != self.normalize:
            raise InvalidArgumentError(
                call, f"terms of normalize={how!r}", f"normalize={self.normalize!r}, this EWC's",
                why="one strength would mean two things", try_=f"EWC(model, normalize={how!r})",
            )  # fmt: skip
        _check_held(terms, dict(self.model.named_parameters()), self.grown, call)
        self._put(terms)
        self.consolidations = consolidations

    def __deepcopy__(self, memo: dict[int, Any]) -> EWC:
        if not memo:  # copy.deepcopy of this alone; within a container it has the container
            memo[id(self.model)] = self.model
        result = type(self).__new__(type(self))
        memo[id(self)] = result
        memo[id(self._terms)] = self._terms  # never changed in place, so both may hold them
        result.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return result

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> EWC:
        """``to``, ``cuda``, ``float`` … move the terms; their dtype stays that of the Fishers."""
        terms = []
        for term in self._terms:
            operator = term.quadratic.operator
            probe = fn(torch.empty(0, dtype=operator.dtype, device=operator.device))
            if probe.dtype != operator.dtype:
                raise InvalidTypeError(
                    "EWC.to", f"{probe.dtype}", f"{operator.dtype}, that of the Fishers",
                    why="rounding them to another dtype would be another penalty", try_="ewc.to(device)",
                )  # fmt: skip
            terms.append(replace(term, quadratic=term.quadratic.map(partial(Tensor.to, device=probe.device))))
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._terms = tuple(terms)
        return self


def _add(terms: list[Term], new: Quadratic) -> None:
    """Put a quadratic form among the terms, joined with the first that can take it."""
    for i, term in enumerate(terms):
        if term.quadratic.operator.space == new.operator.space:
            joined = join(term.quadratic.scaled(term.weight), new)
            if joined is not None:
                terms[i] = Term(1.0, joined)
                return
    terms.append(Term(1.0, new))


def check_ewc(ewc: object, call: str) -> EWC:
    """What an adapter was given, once it is known to be an EWC."""
    if not isinstance(ewc, EWC):
        raise InvalidTypeError(call, f"a {type(ewc).__name__} as ewc", "a fisherkit.continual.EWC")
    return ewc


def _check_fisher(fisher: object, model: nn.Module, uncovered: str, free: Selection) -> None:
    """Refuse a Fisher that is not of the model as it is now, or that leaves out what nobody named as free."""
    if not isinstance(fisher, FisherOperator):
        raise InvalidTypeError(
            CALL, f"a {type(fisher).__name__}", "a FisherOperator",
            try_='fk.ImprovedEmpiricalFisher(model, data, structure="kfac", power=0.75), or fk.load(path)',
        )  # fmt: skip
    _check_form(fisher, dict(model.named_parameters()))
    # A model of another dtype, which a Fisher of a wider copy may serve, cannot be compared.
    dtype = fisher.metadata.get("covered_hash", str(fisher.dtype).removeprefix("torch.")).partition(":")[0]
    comparable = all(str(parameter.dtype) == f"torch.{dtype}" for parameter in model.parameters())
    if comparable and measured_at(model, fisher.metadata) is False:
        raise ModelError(
            CALL, "a Fisher that was measured at other parameters or buffers than the model has now", "the same values",
            why=SAME_MOMENT,
            try_="consolidating before training goes on, loading those weights, or building the Fisher again",
        )  # fmt: skip
    _check_uncovered(fisher, model, uncovered, free)


def _check_form(fisher: FisherOperator, parameters: Mapping[str, nn.Parameter]) -> None:
    """The model has the Fisher's parameters, in these shapes, on this device and in a dtype that loses nothing."""
    space = fisher.space
    if unknown := [name for name in space.names if name not in parameters]:
        raise UnknownParameterError(
            CALL, f"a Fisher over {listed(map(repr, unknown))}, which the model does not have",
            f"some of {listed(map(repr, parameters))}",
            why="it may be of another model, or of a wrapped or compiled one",
            try_="EWC of the very module that the Fisher was built from",
        )  # fmt: skip
    changed = [
        f"{name!r}: {list(shape)} in the Fisher, {list(parameters[name].shape)} in the model"
        for name, shape in zip(space.names, space.shapes, strict=True) if tuple(parameters[name].shape) != shape
    ]  # fmt: skip
    if changed:
        raise InvalidArgumentError(
            CALL, "; ".join(changed), "a Fisher of the model as it is", why=SAME_MOMENT,
            try_="consolidating before a layer grows, or building the Fisher again",
        )  # fmt: skip
    for name in space.names:
        parameter = parameters[name]
        if parameter.device != fisher.device:
            raise InvalidArgumentError(
                CALL, f"a Fisher on {fisher.device} and {name!r} on {parameter.device}", "one device",
                try_=f'fk.load(path, device="{parameter.device}")',
            )  # fmt: skip
        if torch.promote_types(parameter.dtype, fisher.dtype) != fisher.dtype:
            raise InvalidTypeError(
                CALL, f"a Fisher of {fisher.dtype} and {name!r} of {parameter.dtype}", f"one of {parameter.dtype}",
                why="θ − θ* is formed in the Fisher's dtype",
            )  # fmt: skip


def _check_uncovered(fisher: FisherOperator, model: nn.Module, uncovered: str, free: Selection) -> None:
    """Every trainable parameter is in the Fisher, which is not 0 on it, or named as free to change."""
    check_choice(CALL, "uncovered", uncovered, ("refuse", "free"))
    space, allowed = fisher.space, _chosen(model, free)
    if held := [name for name in space.names if name in allowed]:
        raise InvalidArgumentError(
            CALL, f"free=[{listed(map(repr, held))}], which the Fisher covers", "names that it does not cover",
            try_='a predicate with "and name not in fisher.space.names", or uncovered="free" in place of free=; to let '
            "these change leave them out of the Fisher with params=",
        )  # fmt: skip
    if uncovered == "free":
        return
    covered = {*space.names, *allowed}
    inside = {id(p) for product in products(model, space.names).values() for p in product.parameters}
    trained = [name for name, p in model.named_parameters() if p.requires_grad and id(p) not in inside]
    if loose := [name for name in trained if name not in covered]:
        raise InvalidArgumentError(
            CALL, f"a Fisher that leaves out {listed(map(repr, loose))}, which the model trains",
            "all trainable parameters", why="nothing would keep them near their values",
            try_='free=[names] or free=lambda name, parameter: ... for other tasks\' heads, uncovered="free" for all',
        )  # fmt: skip
    diagonal = fisher.diagonal()
    if not all_finite(diagonal):
        raise NonFiniteError(
            CALL, "a Fisher with NaN or infinite entries on its diagonal", "finite numbers",
            why="the penalty would be NaN", try_="building the Fisher again, on data that are finite",
        )  # fmt: skip
    some = torch.stack([diagonal[place].any() for place in space.slices.values()]).tolist()
    unused = [name for name, used in zip(space.names, some, strict=True) if not used]
    if unused:
        whole = len(unused) == len(some)
        raise InvalidArgumentError(
            CALL, f"a Fisher that is 0 on {listed(map(repr, unused))}", "one that says something of each",
            why="empirical Fishers are 0 where the loss is exactly 0: nothing would be kept" if whole else
            "the data never reach them: nothing would keep them near their values, and they would count in D",
            try_='another kind, or uncovered="free" to keep nothing' if whole else
            'params= without them and free=[names], or uncovered="free"',
        )  # fmt: skip


def _check_held(terms: Sequence[Term], parameters: Mapping[str, nn.Parameter], grown: str, call: str) -> None:
    """The model still has what was consolidated, on the device, in the same shapes or, where allowed, larger ones."""
    held = [(name, shape, term.quadratic.operator.device) for term in terms for name, shape in term.shapes.items()]
    for name, shape, device in held:
        if name not in parameters:
            raise ModelError(
                call, f"a model without {name!r}, which was consolidated", "every consolidated name",
                try_="keeping the old module, or a new EWC",
            )  # fmt: skip
        now = tuple(parameters[name].shape)
        larger = len(now) == len(shape) and all(a >= b for a, b in zip(now, shape, strict=True))
        if now != shape and not (larger and grown == "leading"):
            raise ModelError(
                call, f"{name!r} of shape {list(now)}, consolidated as {list(shape)}",
                "the same shape" if grown == "refuse" else "that shape, or a larger one, old entries first",
                why="entries would be compared with others' values",
                try_='grown="leading" if it has grown and its old entries come first' if larger else "a new EWC",
            )  # fmt: skip
        if parameters[name].device != device:
            raise InvalidArgumentError(
                call, f"{name!r} on {parameters[name].device} and its term on {device}", "one device",
                try_=f'ewc.to("{parameters[name].device}")',
            )  # fmt: skip


def _chosen(model: nn.Module, selection: Selection) -> set[str]:
    """The names of a selection, which may be empty."""
    if callable(selection):
        return {name for name, parameter in model.named_parameters() if selection(name, parameter)}
    names: Any = [selection] if isinstance(selection, str) else selection
    return set(ParameterSpace.of(model, names).names) if names is not None and names != [] else set()


# -- terms: quadratic forms, their sum as a differentiable scalar, and their form in a state dict ----------------------


@dataclass(frozen=True)
class Term:
    """weight · q, q a quadratic form over some parameters and the weight what decay has left of 1."""

    weight: float
    quadratic: Quadratic

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name to shape of its parameters, when it was consolidated."""
        space = self.quadratic.operator.space
        return dict(zip(space.names, space.shapes, strict=True))

    @property
    def nbytes(self) -> int:
        """Bytes that its tensors take."""
        beside = sum(tensor.nbytes for tensor in self.quadratic.tensors().values())
        return beside + self.quadratic.operator.nbytes

    def to_plain(self) -> dict[str, Any]:
        """Dicts, lists, strings, numbers and tensors: what a state dict may hold without pickled classes."""
        return {
            "weight": self.weight,
            "shapes": {name: list(shape) for name, shape in self.shapes.items()},
            "quadratic": self.quadratic.tensors(),
            "operator": _plain(state_of(self.quadratic.operator)),
        }

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any], device: torch.device) -> Term:
        """The inverse of `to_plain`, on a device; any error of Python's or of the package's for something else."""

        def move(tensor: Tensor) -> Tensor:
            return tensor.detach().to(device, copy=True)

        shapes = plain["shapes"]
        space = ParameterSpace(tuple(shapes), tuple(tuple(shape) for shape in shapes.values()))
        operator = restore(space, _state(plain["operator"]).map(move))
        return cls(float(plain["weight"]), Quadratic(operator, **{n: move(t) for n, t in plain["quadratic"].items()}))


def _plain(state: io.State) -> dict[str, Any]:
    plain = {"kind": state.tag, "names": list(state.names), "tensors": state.tensors, "options": state.options}
    return {**plain, "children": [_plain(child) for child in state.children]}


def _state(plain: Mapping[str, Any]) -> io.State:
    children = tuple(_state(child) for child in plain["children"])
    return io.State(plain["kind"], tuple(plain["names"]), dict(plain["tensors"]), dict(plain["options"]), children)


def leading(tensor: Tensor, shape: Sequence[int]) -> Tensor:
    """The first ``shape[i]`` entries along each axis i; a view."""
    return tensor[tuple(slice(size) for size in shape)]


def evaluate(terms: Sequence[Term], tensors: Mapping[str, Tensor]) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
    """Σ weight · q, float64, and half its gradient by name, in the operators' dtype and the tensors' shapes.

    Tensors are at least as large as the terms' along each axis.
    """
    values: list[Tensor] = []
    gradients: dict[str, Tensor] = {}
    for term in terms:
        operator = term.quadratic.operator
        parts = [leading(tensors[name], shape).reshape(-1) for name, shape in term.shapes.items()]
        value, half = term.quadratic.evaluate(torch.cat(parts).to(operator.dtype))
        values.append(term.weight * value)
        weighted = half if term.weight == 1 else term.weight * half
        for name, part in operator.space.unflatten(weighted).items():
            if name not in gradients and part.shape == tensors[name].shape:
                gradients[name] = part
                continue
            if name not in gradients:
                gradients[name] = part.new_zeros(tensors[name].shape)
            leading(gradients[name], part.shape).add_(part)
    return torch.stack(values).sum(), gradients


class _Penalty(torch.autograd.Function):
    """½ · strength · Σ weight · q in the first tensor's dtype, with the gradient strength · Σ weight · (F d + h)."""

    @staticmethod
    def forward(ctx: Any, terms: Sequence[Term], strength: float, names: Sequence[str], *values: Tensor) -> Tensor:
        ctx.strength, ctx.values, ctx.present = strength, values, [False] * len(values)
        if not terms:
            return values[0].new_zeros(())
        # Products in half precision, as autocast would have them, are no Fisher products.
        with without_autocast():
            total, gradients = evaluate(terms, dict(zip(names, values, strict=True)))
        ctx.present = [
            needed and name in gradients for name, needed in zip(names, ctx.needs_input_grad[3:], strict=True)
        ]
        ctx.save_for_backward(*(gradients[name] for name, own in zip(names, ctx.present, strict=True) if own))
        return (0.5 * strength * total).to(values[0].dtype)

    @staticmethod
    def backward(ctx: Any, *outer: Any) -> Any:
        found: Any = ctx.saved_tensors
        if found:
            found = _Times.apply(outer[0], ctx.strength, found, *ctx.values)  # type: ignore[no-untyped-call]
        scaled, pairs = iter(found), zip(ctx.present, ctx.values, strict=True)
        return None, None, None, *(next(scaled).to(value.dtype) if present else None for present, value in pairs)


class _Times(torch.autograd.Function):
    """outer · strength · gradients. They depend on the parameters: differentiating that is refused, not left out."""

    @staticmethod
    def forward(
        ctx: Any, outer: Tensor, strength: float, gradients: Sequence[Tensor], *values: Tensor
    ) -> tuple[Tensor, ...]:
        return tuple((strength * outer.to(gradient.dtype)) * gradient for gradient in gradients)

    @staticmethod
    def backward(ctx: Any, *outer: Any) -> Any:
        raise NoClosedFormError(
            "EWC.penalty", "a second derivative", "one backward pass, without differentiating its result",
            why="the gradient is computed in closed form and has no graph",
            try_="the Hessian in θ is strength · Σ F_t: use the Fishers' matvec",
        )  # fmt: skip
