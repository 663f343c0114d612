"""`MergePolicy`, and the decision that it allows: what becomes of every name of the models.

Owns the decision and the refusals, each with its list of names and the setting that allows them. Solves nothing.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from fisherkit.arguments import check_choice, check_count, check_device, check_number, check_type
from fisherkit.errors import InvalidArgumentError, InvalidTypeError, listed
from fisherkit.merging.models import ModelSource

WORDS = {
    "uncovered": ("refuse", "average", "first", "center"),
    "buffers": ("refuse", "average", "first", "center"),
    "integers": ("refuse", "first"),
    "mismatched": ("refuse", "skip", "first"),
    "other_weights": ("refuse", "warn"),
    "method": ("auto", "direct", "cg"),
}
"""The settings that are one of a few words, the default first."""

MOST_LISTED = 20


@dataclass(frozen=True)
class MergePolicy:
    """What is allowed where models or Fishers leave a choice (by default nothing), and how the work is done.

        policy = fk.merging.MergePolicy(buffers="average", mismatched="skip")
        merged = fk.merging.merge(models, fishers, policy=policy)

    Args:
        uncovered: what becomes of float parameters that differ and that not every Fisher covers: "refuse", "average",
            "first" (the first model's) or "center" (the center's). None is "refuse" in `merge`, and "average" in the
            other ways to merge.
        buffers: what becomes of float buffers that differ, such as statistics of batch norm: the same words.
        integers: what becomes of other tensors that differ: "refuse" or "first"; ``buffers="first"`` allows them too.
        mismatched: what becomes of names that a model lacks, and of shapes that differ: "refuse", "skip" (left out of
            the result) or "first" (the first model's, left out where it has none).
        other_weights: what becomes of a Fisher that was measured at other weights than its model has: "refuse" or
            "warn". Fishers that do not say at which are listed in `MergeInfo.unverified`.
        dtype: of the result's floating-point tensors; None for the models' own, which must agree.
        device: where blocks are solved; None for where the first Fisher's lie.
        method: "auto" takes closed forms where the Fishers' sum has one, a Cholesky factorization for sums of up to
            3,000 parameters a block, conjugate gradients beyond; "direct" writes every block out; "cg" always iterates.
        tolerance: largest relative residual of a block that counts as converged. Far above the default, directions
            whose curvature is near λ are not solved for: at relative damping 1e-8 a residual of 1e-8 may leave them
            wrong altogether.
        max_steps: most steps of conjugate gradients in each block.
        max_shard_size: bytes of tensors in one file where the result is written; with more there is an index. None for
            a single file.

    Raises:
        InvalidArgumentError: an unknown word, a dtype that is not floating point, or a number out of range.
        InvalidTypeError: a setting of another type.
    """

    uncovered: str | None = None
    buffers: str = "refuse"
    integers: str = "refuse"
    mismatched: str = "refuse"
    other_weights: str = "refuse"
    dtype: torch.dtype | None = None
    device: torch.device | str | None = None
    method: str = "auto"
    tolerance: float = 1e-12
    max_steps: int = 2000
    max_shard_size: int | None = None

    def __post_init__(self) -> None:
        call = "MergePolicy"
        for name, words in WORDS.items():
            if (name, getattr(self, name)) != ("uncovered", None):
                check_choice(call, name, getattr(self, name), words)
        check_type(call, "dtype", self.dtype, torch.dtype | None, "a torch.dtype or None")
        if self.dtype is not None and not self.dtype.is_floating_point:
            raise InvalidArgumentError(call, f"dtype={self.dtype}", "a floating-point dtype")
        check_number(call, "tolerance", self.tolerance, most=1, above=True, below=True)
        check_count(call, "max_steps", self.max_steps)
        if self.device is not None:
            check_device(call, self.device)
        check_count(call, "max_shard_size", self.max_shard_size, optional=True)


def checked(policy: MergePolicy | None, call: str, uncovered: str) -> MergePolicy:
    """The policy, or the default one, with a word for ``uncovered``."""
    policy = MergePolicy() if policy is None else policy
    advice = 'policy=fk.merging.MergePolicy(uncovered="average")'
    check_type(call, "policy", policy, MergePolicy, "a MergePolicy", try_=advice)
    return replace(policy, uncovered=policy.uncovered or uncovered)


@dataclass(frozen=True)
class Entry:
    """What becomes of one name: ``action`` is as in `MergeInfo`; a tied one shares the tensor of ``owner``."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    action: str
    owner: str = ""

    @property
    def size(self) -> int:
        """How many numbers it has."""
        return math.prod(self.shape)

    def __str__(self) -> str:
        return f"tied to {self.owner}" if self.action == "tied" else self.action


Entries = dict[str, Entry]
"""Every name of any model to what becomes of it, in the order of the models."""


@dataclass(frozen=True)
class Decision:
    """What becomes of every name, of which Fishers cover some."""

    models: Sequence[ModelSource]
    covered: Collection[str]
    center: ModelSource | None
    policy: MergePolicy
    call: str

    def entries(self) -> Entries:
        """Decide before anything is computed, or refuse with a list and the setting that allows it.

        Cost: reads every tensor that no Fisher covers, of all models, one by one.
        """
        names = list(dict.fromkeys(name for model in self.models for name in model.shapes))
        self._check_names(names)
        tied = {name: owner for name in names if (owner := self._owner(name))}
        mismatched = {name: why for name in names if name not in tied and (why := self._mismatch(name))}
        if self.policy.mismatched == "refuse":
            self._refuse(
                [f"{name!r} ({why})" for name, why in mismatched.items()], "entries that the models do not share",
                "mismatched", '"skip") to leave them out of the result, or "first" to take the first model\'s',
            )  # fmt: skip
        shared = [name for name in names if name not in tied and name not in mismatched]
        self._check_dtypes(shared)
        actions = {name: self._action(name) for name in shared}
        self._refuse_rest(actions)
        for name in mismatched:
            kept = self.policy.mismatched == "first" and name in self.models[0].shapes
            actions[name] = "first" if kept else "skipped"
        found = {name: Entry(*self._form(name), actions.get(name, "tied"), tied.get(name, "")) for name in names}
        lost = [name for name, owner in tied.items() if found[owner].action == "skipped"]
        return {**found, **{name: replace(found[name], action="skipped", owner="") for name in lost}}

    def _check_names(self, names: Sequence[str]) -> None:
        """Before anything is said of policies, which would not help: models and Fishers go by the same names."""
        why = "wrappers put a prefix before every name"
        for one, other in itertools.permutations(self.models, 2):
            if not other.shapes or one.shapes.keys() & other.shapes.keys():
                continue
            prefix = _prefix(one.shapes, next(iter(other.shapes)))
            if prefix and all(name.startswith(prefix) for name in one.shapes):
                raise InvalidArgumentError(
                    self.call, f"{prefix!r} before every name of {one.label} and not of {other.label}",
                    "models by their own names", why=why, try_=_without(prefix),
                )  # fmt: skip
        if unknown := sorted(set(self.covered) - set(names)):
            prefix = _prefix(names, unknown[0])
            raise InvalidArgumentError(
                self.call, f"Fishers over parameters that no model has: {listed(map(repr, unknown), MOST_LISTED)}",
                "Fishers of these models, by the models' own names", why=why if prefix else "",
                try_=_without(prefix) if prefix else "the Fishers measured again, on these models",
            )  # fmt: skip

    def _owner(self, name: str) -> str | None:
        """The name whose tensor this one shares in every model that has both; None if it stands for itself."""
        owners = {model.aliases.get(name) for model in self.models if name in model.shapes}
        return owners.pop() if len(owners) == 1 and name not in self.covered else None

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
        if odd and self.policy.dtype is None:
            found = sorted({str(model.dtypes[odd[0]]) for model in self.models})
            raise InvalidTypeError(
                self.call, f"models of {' and '.join(found)}: {listed(odd, MOST_LISTED)}", "one dtype",
                why="nothing is cast silently", try_="policy=MergePolicy(dtype=torch.float32), the dtype of the result",
            )  # fmt: skip

    def _action(self, name: str) -> str:
        """What becomes of a name that all models share; "refuse ..." where no policy allows anything."""
        if name in self.covered:
            return "merged"
        first, *others = (model.read(name) for model in self.models)
        if all(other.dtype == first.dtype and torch.equal(first, other.to(first.device)) for other in others):
            return "equal"
        if not self.models[0].dtypes[name].is_floating_point:
            return "first" if "first" in (self.policy.integers, self.policy.buffers) else "refuse integers"
        setting = "buffers" if any(name in model.buffers for model in self.models) else "uncovered"
        chosen: str = getattr(self.policy, setting)
        if chosen == "average" or (chosen == "center" and self.center is None):
            return "averaged"
        return f"refuse {setting}" if chosen == "refuse" else chosen

    def _refuse_rest(self, actions: dict[str, str]) -> None:
        kept = '"average"), or "first", or "center"'
        for setting, words, what in (
            ("uncovered", kept, "parameters that differ between the models and that not every Fisher covers"),
            ("buffers", kept, "float buffers that differ between the models"),
            ("integers", '"first")', "tensors that are not floating point and differ between the models"),
        ):
            names = [repr(name) for name, action in actions.items() if action == f"refuse {setting}"]
            self._refuse(names, what, setting, words)
        if self.center is not None:
            check_center(
                self.center, {n: self._form(n)[0] for n, action in actions.items() if action == "center"}, self.call
            )

    def _refuse(self, found: Sequence[str], what: str, setting: str, words: str) -> None:
        if found:
            raise InvalidArgumentError(
                f'{self.call}({setting}="refuse")', f"{what}: {listed(found, MOST_LISTED)}", "none",
                why="nothing is chosen, averaged or dropped silently", try_=f"policy=MergePolicy({setting}={words}",
            )  # fmt: skip

    def _form(self, name: str) -> tuple[tuple[int, ...], torch.dtype]:
        model = next(model for model in self.models if name in model.shapes)
        dtype = model.dtypes[name]
        return model.shapes[name], self.policy.dtype if self.policy.dtype and dtype.is_floating_point else dtype


def check_center(center: ModelSource, shapes: Mapping[str, tuple[int, ...]], call: str) -> None:
    """Refuse a center that lacks one of these tensors, or has it in another shape."""
    lost = [name for name, shape in shapes.items() if center.shapes.get(name) != shape]
    if lost:
        raise InvalidArgumentError(
            f"{call}(center=...)", f"a center without {listed(map(repr, lost), MOST_LISTED)} in the models' shapes",
            "all that is taken from it or pulled to it", try_='a center with them, or center="average"',
        )  # fmt: skip


def _prefix(names: Collection[str], name: str) -> str:
    """What stands before a name in one of the others; nothing if it ends none of them."""
    return next((other.removesuffix(name) for other in names if other.endswith(f".{name}")), "")


def _without(prefix: str) -> str:
    return f"merging {{name.removeprefix({prefix!r}): tensor for name, tensor in model.state_dict().items()}}"
