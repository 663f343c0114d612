"""The parameter space: which parameters, in which order, and how vectors over them are written.

Owns the flat order (that of ``model.named_parameters()`` restricted to the chosen ones, each flattened row-major, a
tied parameter once), the blocks (one a module, its own parameters together) and the conversion between flat tensors
``[D]``, ``[D, K]`` and dicts of named tensors. Knows nothing of Fisher matrices.
"""

from __future__ import annotations

import fnmatch
import itertools
import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from fisherkit.arguments import check_type
from fisherkit.arithmetic import HALF, all_finite
from fisherkit.errors import (
    InvalidArgumentError,
    InvalidTypeError,
    ModelError,
    NonFiniteError,
    UnknownParameterError,
    listed,
)  # fmt: skip
from fisherkit.wrappers import matching

Vector = TypeVar("Vector", Tensor, Mapping[str, Tensor])
"""A vector over parameters: ``[D]``, ``[D, K]`` with columns last, or a dict name -> tensor; results have its form."""
Selection = str | Iterable[str] | Callable[[str, nn.Parameter], bool] | None


@dataclass(frozen=True)
class ParameterSpace:
    """Names and shapes of the chosen parameters in flat order.

    Args:
        names: parameter names as in ``model.named_parameters()``.
        shapes: their shapes, in the same order.
    """

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, model: nn.Module, params: Selection = None) -> ParameterSpace:
        """The space of a model's chosen parameters.

        Args:
            model: any module.
            params: None for all that require grad; or names, or patterns of names as "head.*"; or a predicate
                ``(name, parameter) -> bool``.

        Raises:
            UnknownParameterError: a name that the model does not have, or a pattern that none matches.
            InvalidArgumentError: nothing was chosen, or a chosen parameter is not a floating-point tensor.
            InvalidTypeError: neither names nor a predicate.
            ModelError: parameters that have no values yet.
        """
        check_type("ParameterSpace.of", "model", model, nn.Module, "a torch.nn.Module")
        return cls.among(dict(model.named_parameters()), params)

    @classmethod
    def among(cls, available: Mapping[str, nn.Parameter], params: Selection = None) -> ParameterSpace:
        """As `of`, of all parameters of a model by name."""
        if params is None:
            chosen = [name for name, parameter in available.items() if parameter.requires_grad]
        elif callable(params) and not isinstance(params, nn.Module):
            chosen = [name for name, parameter in available.items() if params(name, parameter)]
        else:
            wanted: list[Any] = [params]
            if isinstance(params, Iterable) and not isinstance(params, str):
                wanted = list(params)
            odd = sorted({type(name).__name__ for name in wanted if not isinstance(name, str)})
            if odd:
                raise InvalidTypeError(
                    "params", f"params of type {odd[0]}", "names, or a predicate (name, parameter) -> bool",
                    try_="[name for name, _ in model.named_parameters() if ...]",
                )  # fmt: skip
            wanted = [name for one in wanted for name in _matching(one, available)]
            unknown = sorted(set(wanted) - set(available))
            if unknown:
                inside = next((n for n in unknown if any(other.startswith(f"{n}.") for other in available)), None)
                raise UnknownParameterError(
                    "params", f"unknown parameter names {unknown}",
                    f"some of {list(available)[:8]}{' …' if len(available) > 8 else ''}",
                    why="a tied parameter has only the name of the first module that holds it",
                    try_=(f'"{inside}.*" for all of that module; ' if inside else "")
                    + "dict(model.named_parameters()) lists the names",
                )  # fmt: skip
            chosen = [name for name in available if name in set(wanted)]
        if not chosen:
            raise InvalidArgumentError(
                "params", "no parameter" + (" that requires grad" if params is None else ""), "at least one",
                why=f"the model has {len(available)} parameters and none was chosen",
                try_='params="*" for all, or requires_grad_(True) of what you want'
                if available
                else "",
            )  # fmt: skip
        lazy = [name for name in chosen if is_lazy(available[name])]
        if lazy:
            raise ModelError(
                "params", f"parameters that have no values yet: {lazy[:4]}", "a model that has been called",
                why="lazy modules make their parameters in their first forward pass",
                try_="model(x) once, under torch.no_grad(), before",
            )  # fmt: skip
        odd = [name for name in chosen if not available[name].is_floating_point()]
        if odd:
            raise InvalidArgumentError(
                "params", f"parameters {odd} that are not floating point", "real floating-point parameters",
                try_="leave them out with params=",
            )  # fmt: skip
        return cls(tuple(chosen), tuple(tuple(available[name].shape) for name in chosen))

    @cached_property
    def _order(self) -> dict[str, int]:
        return {name: i for i, name in enumerate(self.names)}

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        """Number of entries of each parameter."""
        return tuple(math.prod(shape) for shape in self.shapes)

    @cached_property
    def size(self) -> int:
        """D, the number of entries in all."""
        return sum(self.sizes)

    @cached_property
    def slices(self) -> dict[str, slice]:
        """Where each parameter lies in a flat vector."""
        slices, start = {}, 0
        for name, size in zip(self.names, self.sizes, strict=True):
            slices[name] = slice(start, start + size)
            start += size
        return slices

    @cached_property
    def blocks(self) -> dict[str, tuple[str, ...]]:
        """Module name to the names of its own parameters; a tied one belongs to the first module that holds it."""
        blocks: dict[str, list[str]] = {}
        for name in self.names:
            blocks.setdefault(name.rpartition(".")[0], []).append(name)
        return {module: tuple(names) for module, names in blocks.items()}

    def joined_blocks(self, units: Iterable[Iterable[str]]) -> list[tuple[str, ...]]:
        """The blocks, joined where a unit spans two of them (a weight of one module used with a bias of another)."""
        order, blocks = self._order, self.blocks
        own = [tuple(n for n in unit if n in order) for unit in units]
        whole = list(blocks.values())
        if own == whole or set(map(frozenset, whole)).issuperset(map(frozenset, own)):
            return whole
        groups = finest_partition([*blocks.values(), *own])
        joined = [tuple(sorted(group, key=order.__getitem__)) for group in groups]
        return sorted(joined, key=lambda names: order[names[0]])

    def span(self, names: Iterable[str]) -> slice | None:
        """Where some parameters lie one after the other in a flat vector; None if not in one piece."""
        slices = [self.slices[name] for name in names]
        whole = all(left.stop == right.start for left, right in itertools.pairwise(slices))
        return slice(slices[0].start, slices[-1].stop) if whole else None

    def take(self, flat: Tensor, names: Iterable[str]) -> Tensor:
        """The entries of some parameters, one after the other in the names' order; a view where they lie like that.

        Args:
            flat: ``[D]`` or ``[D, K]``.
            names: some of the space's.
        """
        names = tuple(names)
        span = self.span(names)
        return torch.cat([flat[self.slices[name]] for name in names]) if span is None else flat[span]

    def put(self, flat: Tensor, names: Iterable[str], part: Tensor) -> None:
        """Write what `take` gave, or as much, back in place.

        Args:
            flat: ``[D]`` or ``[D, K]``; changed.
            names: some of the space's.
            part: their entries.
        """
        names = tuple(names)
        span = self.span(names)
        if span is not None:
            flat[span] = part
            return
        start = 0
        for name in names:
            place = self.slices[name]
            stop = start + place.stop - place.start
            flat[place], start = part[start:stop], stop

    def join(self, parts: Sequence[tuple[Sequence[str], Tensor]]) -> Tensor:
        """One flat tensor, ``[D]`` or ``[D, K]``, of parts as `take` gives them, each with its names, which are all."""
        if tuple(itertools.chain.from_iterable(names for names, _ in parts)) == self.names:
            return torch.cat([part for _, part in parts])
        whole = parts[0][1].new_empty(self.size, *parts[0][1].shape[1:])
        for names, part in parts:
            self.put(whole, names, part)
        return whole

    def restrict(self, names: Iterable[str]) -> ParameterSpace:
        """The subspace of some of the names, in this space's order."""
        order = self._order
        places = sorted({order[name] for name in names if name in order})
        return ParameterSpace(tuple(self.names[i] for i in places), tuple(self.shapes[i] for i in places))

    def flatten(self, tensors: Mapping[str, Tensor]) -> Float[Tensor, "D"] | Float[Tensor, "D K"]:
        """Dict of named tensors to one flat tensor.

        Args:
            tensors: name to a tensor of the parameter's shape, or of that shape with one more, last, axis K; the names
                of a compiled or wrapped model will do.

        Raises:
            InvalidTypeError: not a dict.
            UnknownParameterError: names missing or unknown.
            InvalidArgumentError: a wrong shape, or axes K that differ.
        """
        check_type("space.flatten", "", tensors, Mapping, "a dict name -> tensor")
        short = matching(tensors, self.names)
        tensors = {short[name]: tensor for name, tensor in tensors.items()}
        missing, extra = set(self.names) - set(tensors), set(tensors) - set(self.names)
        if missing or extra:
            raise UnknownParameterError(
                "space.flatten", f"a dict with missing names {sorted(missing)} and unknown names {sorted(extra)}",
                f"exactly the {len(self.names)} names of space.names",
                try_="{name: ... for name in fisher.space.names}",
            )  # fmt: skip
        self._check_alike(tensors)
        columns = {tensors[n].shape[len(s) :] for n, s in zip(self.names, self.shapes, strict=True)}
        for name, shape in zip(self.names, self.shapes, strict=True):
            got = tuple(tensors[name].shape)
            if got[: len(shape)] != shape or len(got) > len(shape) + 1 or len(columns) > 1:
                raise InvalidArgumentError(
                    "space.flatten", f"shape {list(got)} for {name!r}",
                    f"{list(shape)}, or {[*shape, 'K']} with one K for all names",
                )  # fmt: skip
        tail = next(iter(columns))
        return torch.cat(
            [tensors[name].reshape(size, *tail) for name, size in zip(self.names, self.sizes, strict=True)]
        )

    def unflatten(self, vector: Tensor) -> dict[str, Tensor]:
        """Flat ``[D]`` or ``[D, K]`` to name -> tensor of the parameter's shape (with a last axis K).

        Raises:
            InvalidArgumentError: the first axis is not D, or there are more than two axes.
        """
        self._check_flat(vector, "space.unflatten")
        tail = vector.shape[1:]
        parts = zip(self.names, self.shapes, vector.split_with_sizes(self.sizes), strict=True)
        return {name: part.reshape((*shape, *tail)) for name, shape, part in parts}

    def to_columns(
        self, vector: Vector, call: str, *, dtype: torch.dtype, device: torch.device
    ) -> tuple[Float[Tensor, "D K"], Callable[[Tensor], Vector]]:
        """Any accepted form of a vector as columns ``[D, K]``, and the function that gives a result the same form.

        Args:
            vector: ``[D]``, ``[D, K]`` or a dict.
            call: the public call, for error messages.
            dtype: the dtype that the vector must have; one in half precision is widened to float32.
            device: the device that the vector must be on.

        Raises:
            InvalidTypeError: not a tensor nor a dict of tensors, or another dtype.
            InvalidArgumentError: a wrong shape or device.
            NonFiniteError: NaN or infinity.
        """
        if isinstance(vector, Mapping):
            flat = self.flatten(vector)
        elif isinstance(vector, Tensor):
            self._check_flat(vector, call)
            flat = vector
        else:
            raise InvalidTypeError(
                call, f"a {type(vector).__name__}", "a tensor [D] or [D, K], or a dict",
                try_="torch.as_tensor, or fisher.space.flatten(dict)",
            )  # fmt: skip
        if flat.dtype in HALF and dtype == torch.float32:
            flat = flat.to(dtype)  # exact; the Fisher of a model in half precision is in float32
        if flat.dtype != dtype:
            raise InvalidTypeError(
                call, f"a vector of {flat.dtype}", f"{dtype}, the operator's", why="nothing is cast silently",
                try_=f"v.to({dtype})",
            )  # fmt: skip
        if flat.device != device:
            raise InvalidArgumentError(
                call, f"a vector on {flat.device}", f"{device}, the operator's", try_=f'v.to("{device}")'
            )
        if not all_finite(flat):
            raise NonFiniteError(
                call, "a vector with NaN or infinite entries", "finite numbers",
                try_="torch.isfinite(v).all() before the call",
            )  # fmt: skip
        is_dict, is_single = isinstance(vector, Mapping), flat.ndim == 1

        def restore(columns: Tensor) -> Any:
            result = columns.squeeze(-1) if is_single else columns
            return self.unflatten(result) if is_dict else result

        return (flat.unsqueeze(-1) if is_single else flat), restore

    def _check_alike(self, tensors: Mapping[str, Tensor]) -> None:
        call = "space.flatten"
        for name in self.names:
            if not isinstance(tensors[name], Tensor):
                got = f"a {type(tensors[name]).__name__} for {name!r}"
                raise InvalidTypeError(call, got, "a tensor", try_="torch.as_tensor")
        dtypes = sorted({str(tensors[name].dtype) for name in self.names})
        if len(dtypes) > 1:
            why = "nothing is cast silently"
            raise InvalidTypeError(call, f"tensors of {dtypes}", "one dtype", why=why)
        devices = sorted({str(tensors[name].device) for name in self.names})
        if len(devices) > 1:
            why = "nothing is moved silently"
            raise InvalidArgumentError(call, f"tensors of {devices}", "one device", why=why)

    def _check_flat(self, vector: Tensor, call: str) -> None:
        check_type(call, "", vector, Tensor, "a tensor [D] or [D, K]", try_="torch.as_tensor")
        if vector.ndim not in (1, 2) or vector.shape[0] != self.size:
            raise InvalidArgumentError(
                call, f"shape {list(vector.shape)}", f"[D] or [D, K] with D = {self.size:,}",
                why="vectors over parameters are flat, columns last",
                try_="fisher.space.flatten(dict of named tensors)",
            )  # fmt: skip


def finest_partition(units: Iterable[Iterable[str]]) -> list[set[str]]:
    """The finest partition of which every unit lies in one part."""
    group_of: dict[str, set[str]] = {}
    for unit in units:
        own = set(unit)
        merged = own.union(*(group_of[name] for name in own if name in group_of))
        group_of.update(dict.fromkeys(merged, merged))
    return list({id(group): group for group in group_of.values()}.values())


def _matching(name: str, available: Collection[str]) -> list[str]:
    """The names that a pattern of the shell's kind matches; itself where it is a name, or matches none."""
    found = [] if name in available else [other for other in available if fnmatch.fnmatchcase(other, name)]
    return found or [name]


def infinite(space: ParameterSpace, vector: Float[Tensor, "D"]) -> str:
    """The parameters that NaN or infinite entries belong to, for an error."""
    return listed((repr(name) for name, part in space.unflatten(vector).items() if not all_finite(part)), 4)
