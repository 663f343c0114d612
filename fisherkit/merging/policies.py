"""What becomes of every name of the models: merged, taken over, averaged or left out, by named policies.

Owns the plan and the refusals, each with its list and the flag that allows it. Solves nothing.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

import torch

from fisherkit.errors import InvalidArgumentError, InvalidTypeError, listed
from fisherkit.merging.checkpoints import Checkpoint

KEEPING = ("refuse", "average", "first", "center")
INTEGERS = ("refuse", "first")
MISMATCHED = ("refuse", "skip", "first")
OTHER_WEIGHTS = ("refuse", "warn")

MOST_LISTED = 20


@dataclass(frozen=True)
class Policies:
    """What is allowed where models or Fishers leave a choice; by default nothing.

    Args:
        uncovered: float parameters that differ between models and that not all Fishers cover: "refuse", "average",
            "first" (the first model's), "center" (the center's).
        buffers: float buffers that differ, such as the statistics of batch norm: likewise.
        integers: tensors that are not floating point and differ: "refuse" or "first"; ``buffers="first"`` allows them
            too.
        mismatched: names that some model lacks, and shapes that differ: "refuse", "skip" (left out of the result),
            "first" (the first model's, left out where it has none).
        dtype: of the result's floating-point tensors; None for the models' own, which must agree.
        other_weights: Fishers that were measured at other weights than their models have: "refuse" or "warn".
    """

    uncovered: str = "refuse"
    buffers: str = "refuse"
    integers: str = "refuse"
    mismatched: str = "refuse"
    dtype: torch.dtype | None = None
    other_weights: str = "refuse"

    def check(self, call: str) -> None:
        """Raise unless every policy is a known one.

        Raises:
            InvalidArgumentError: an unknown policy, or a dtype that is not floating point.
            InvalidTypeError: dtype is no torch.dtype.
        """
        allowed = {
            "uncovered": KEEPING, "buffers": KEEPING, "integers": INTEGERS, "mismatched": MISMATCHED,
            "other_weights": OTHER_WEIGHTS,
        }  # fmt: skip
        for name, values in allowed.items():
            if (got := getattr(self, name)) not in values:
                raise InvalidArgumentError(call=call, got=f"{name}={got!r}", expected=f"one of {list(values)}")
        if self.dtype is not None and not isinstance(self.dtype, torch.dtype):
            raise InvalidTypeError(call=call, got=f"dtype={self.dtype!r}", expected="a torch.dtype or None")
        if self.dtype is not None and not self.dtype.is_floating_point:
            raise InvalidArgumentError(call=call, got=f"dtype={self.dtype}", expected="a floating-point dtype")


@dataclass(frozen=True)
class Entry:
    """What becomes of one name.

    Args:
        shape: of the result.
        dtype: of the result.
        action: "merged", "averaged", "first", "center", "equal", "tied" or "skipped".
        owner: the name whose tensor a tied one shares.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    action: str
    owner: str = ""

    def __str__(self) -> str:
        return f"tied to {self.owner}" if self.action == "tied" else self.action


Plan = dict[str, Entry]
"""Every name of any model to what becomes of it, in the order of the models."""


def make_plan(
    models: Sequence[Checkpoint], covered: Collection[str], center: Checkpoint | None, policies: Policies, call: str
) -> Plan:
    """Decide on every name before anything is computed.

    Args:
        models: the models.
        covered: names that all Fishers cover.
        center: the state that the result is pulled to; None for the average.
        policies: what is allowed.
        call: the public call, for errors.

    Raises:
        InvalidArgumentError: something that no policy allows; the message has the list and the flag.
        InvalidTypeError: dtypes that differ.

    Cost: reads every tensor that no Fisher covers, of all models, one by one.
    """
    return _Planner(models, frozenset(covered), center, policies, call).plan()


@dataclass(frozen=True)
class _Planner:
    models: Sequence[Checkpoint]
    covered: frozenset[str]
    center: Checkpoint | None
    policies: Policies
    call: str

    def plan(self) -> Plan:
        names = list(dict.fromkeys(name for model in self.models for name in model.names))
        self._check_prefixes()
        self._check_covered(names)
        tied = {name: owner for name in names if (owner := self._owner(name))}
        mismatched = [name for name in names if name not in tied and self._mismatch(name)]
        self._refuse(
            [f"{name!r} ({self._mismatch(name)})" for name in mismatched],
            self.policies.mismatched,
            "mismatched",
            'mismatched="skip" to leave them out of the result, or "first" to take the first model\'s',
            "entries that the models do not share",
        )
        shared = [name for name in names if name not in tied and name not in set(mismatched)]
        self._check_dtypes(shared)
        actions = {name: self._action(name) for name in shared}
        self._refuse_rest(actions)
        plan: Plan = {}
        for name in names:
            if name in tied:
                plan[name] = Entry(*self._form(name), action="tied", owner=tied[name])
            elif name in actions:
                plan[name] = Entry(*self._form(name), action=actions[name])
            else:
                kept = self.policies.mismatched == "first" and name in self.models[0].shapes
                plan[name] = Entry(*self._form(name), action="first" if kept else "skipped")
        lost = [name for name, owner in tied.items() if plan[owner].action == "skipped"]
        return {**plan, **{name: replace(plan[name], action="skipped", owner="") for name in lost}}

    def _check_prefixes(self) -> None:
        """Likewise where the models themselves share no name, because one of them was wrapped."""
        for one, other in itertools.permutations(self.models, 2):
            if not other.names or any(name in other.shapes for name in one.names):
                continue
            prefix = next((n.removesuffix(other.names[0]) for n in one.names if n.endswith(f".{other.names[0]}")), "")
            if prefix and all(name.startswith(prefix) for name in one.names):
                raise InvalidArgumentError(
                    call=self.call, got=f"{prefix!r} before every name of {one.label} and not of {other.label}",
                    expected="models by their own names", why="wrappers put a prefix before every name",
                    try_=_without(prefix),
                )  # fmt: skip

    def _check_covered(self, names: Sequence[str]) -> None:
        """Before anything is said of policies, which would not help: the Fishers are of these models."""
        strangers = sorted(self.covered - set(names))
        if strangers:
            prefix = next((n.removesuffix(strangers[0]) for n in names if n.endswith(f".{strangers[0]}")), "")
            raise InvalidArgumentError(
                call=self.call,
                got=f"Fishers over parameters that no model has: {listed(map(repr, strangers), MOST_LISTED)}",
                expected="Fishers of these models, by the models' own names",
                why="wrappers put a prefix before every name" if prefix else "",
                try_=_without(prefix) if prefix else "the Fishers measured again, on these models",
            )  # fmt: skip

    def _owner(self, name: str) -> str | None:
        """The name whose tensor this one shares in every model that has both; None if it stands for itself."""
        owners = {model.aliases.get(name) for model in self.models if name in model.shapes}
        owner = owners.pop()
        return owner if not owners and owner is not None and name not in self.covered else None

    def _mismatch(self, name: str) -> str:
        lacking = [model.label for model in self.models if name not in model.shapes]
        if lacking:
            return f"not in {', '.join(lacking)}"
        shapes = list(dict.fromkeys(model.shapes[name] for model in self.models))
        if len(shapes) > 1:
            return "shapes " + ", ".join(str(list(shape)) for shape in shapes)
        if len({model.dtypes[name].is_floating_point for model in self.models}) > 1:
            return "floating point in some models only"
        return ""

    def _check_dtypes(self, names: Sequence[str]) -> None:
        odd = [name for name in names if len({model.dtypes[name] for model in self.models}) > 1]
        if odd and self.policies.dtype is None:
            found = sorted({str(model.dtypes[odd[0]]) for model in self.models})
            raise InvalidTypeError(
                call=self.call, got=f"models of {' and '.join(found)}: {listed(odd, MOST_LISTED)}",
                expected="one dtype", why="nothing is cast silently",
                try_="dtype=torch.float32, the dtype of the result",
            )  # fmt: skip

    def _action(self, name: str) -> str:
        """What becomes of a name that all models share; "refuse ..." where no policy allows anything."""
        model, policies = self.models[0], self.policies
        if name in self.covered:
            return "merged"
        if self._equal(name):
            return "equal"
        if not model.dtypes[name].is_floating_point:
            return "first" if "first" in (policies.integers, policies.buffers) else "refuse integers"
        kind = "buffers" if self._is_buffer(name) else "uncovered"
        chosen = getattr(policies, kind)
        if chosen == "center" and self.center is None:
            chosen = "average"
        return f"refuse {kind}" if chosen == "refuse" else "averaged" if chosen == "average" else chosen

    def _is_buffer(self, name: str) -> bool:
        return any(name in model.buffers for model in self.models)

    def _equal(self, name: str) -> bool:
        first = self.models[0].read(name)
        for model in self.models[1:]:
            other = model.read(name).to(first.device)
            if other.dtype != first.dtype or not torch.equal(first, other):
                return False
        return True

    def _refuse_rest(self, actions: dict[str, str]) -> None:
        ways = {
            "uncovered": ("parameters that differ between the models and that not every Fisher covers", "average"),
            "buffers": ("float buffers that differ between the models", "average"),
            "integers": ("tensors that are not floating point and differ between the models", "first"),
        }
        for kind, (what, most) in ways.items():
            names = [repr(name) for name, action in actions.items() if action == f"refuse {kind}"]
            others = "" if kind == "integers" else ', or "first", or "center"'
            self._refuse(names, "refuse", kind, f'{kind}="{most}"{others}', what)
        lost = [name for name, action in actions.items() if action == "center" and not self._in_center(name)]
        self._refuse([repr(name) for name in lost], "refuse", "center", "a center with them", "entries not in center=")

    def _in_center(self, name: str) -> bool:
        return self.center is not None and self.center.shapes.get(name) == self.models[0].shapes[name]

    def _refuse(self, found: Sequence[str], policy: str, kind: str, flag: str, what: str) -> None:
        if not found or policy != "refuse":
            return
        raise InvalidArgumentError(
            call=f"{self.call}({kind}=...)" if kind == "center" else f'{self.call}({kind}="refuse")',
            got=f"{what}: {listed(found, MOST_LISTED)}",
            expected="none",
            why="nothing is chosen, averaged or dropped silently",
            try_=flag,
        )

    def _form(self, name: str) -> tuple[tuple[int, ...], torch.dtype]:
        model = next(model for model in self.models if name in model.shapes)
        dtype = model.dtypes[name]
        cast = self.policies.dtype is not None and dtype.is_floating_point
        return model.shapes[name], self.policies.dtype if cast and self.policies.dtype else dtype


def _without(prefix: str) -> str:
    return f"merging {{name.removeprefix({prefix!r}): tensor for name, tensor in model.state_dict().items()}}"
