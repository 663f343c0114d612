"""Fishers as blocks that are read one by one, from memory or from files, and the partition that all of them share.

The merging problem falls apart where every Fisher does. Owns the joined partition, and what can be told of the weights
that a Fisher was measured at; solves nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeAlias

import torch

from fisherkit.errors import InvalidArgumentError, InvalidTypeError, listed, warn
from fisherkit.merging.models import ModelSource
from fisherkit.model_state import tensors_hash
from fisherkit.operators import FisherOperator, KroneckerOperator, open_file, split
from fisherkit.operators.composite import join
from fisherkit.operators.persistence import renamed
from fisherkit.space import ParameterSpace, finest_partition
from fisherkit.wrappers import matching

Fisher: TypeAlias = FisherOperator | str | Path
"""An operator, or the path of a Fisher file."""

Names: TypeAlias = tuple[str, ...]


@dataclass(frozen=True)
class FisherSource:
    """Independent diagonal blocks of one Fisher; ``recorded`` are the names at its measurement, where they differ."""

    space: ParameterSpace
    metadata: Mapping[str, str]
    blocks: tuple[Names, ...]
    device: torch.device
    read: Callable[[Names], FisherOperator]
    recorded: Mapping[str, str] = field(default_factory=dict)


def open_fishers(fishers: Sequence[Fisher], models: Sequence[ModelSource], call: str) -> list[FisherSource]:
    """One source of blocks for each model, by the model's names."""
    if isinstance(fishers, (str, Path)) or not isinstance(fishers, Sequence):
        raise InvalidTypeError(
            call, f"fishers of type {type(fishers).__name__}", "a list of Fishers, one for each model"
        )
    if len(fishers) != len(models):
        raise InvalidArgumentError(
            call, f"{len(models)} models and {len(fishers)} Fishers", "one Fisher for each model"
        )
    pairs = zip(fishers, models, strict=True)
    return [
        _named_as(_opened(fisher, f"{call}, Fisher {number}"), model.shapes)
        for number, (fisher, model) in enumerate(pairs, 1)
    ]


def _opened(fisher: Fisher, call: str) -> FisherSource:
    if isinstance(fisher, FisherOperator):
        parts = {part.space.names: part for part in split(fisher)}
        if any(part.is_sharded for part in parts.values()):
            raise InvalidArgumentError(
                call, "a Fisher of which each process has some blocks", "one with all blocks",
                why="models are merged block by block", try_="fisher.save(path) in all processes and the path; or "
                "shard=False",
            )  # fmt: skip
        space = fisher.space

        def chosen(names: Names) -> FisherOperator:
            return join(space.restrict(names), [part for own, part in parts.items() if own[0] in names])

        return FisherSource(space, fisher.metadata, tuple(parts), fisher.device, chosen)
    if isinstance(fisher, (str, Path)):
        file = open_file(Path(fisher))

        def read(names: Names) -> FisherOperator:
            return join(file.space.restrict(names), split(file.read(names)))

        return FisherSource(file.space, file.metadata, file.blocks, file.device, read)
    raise InvalidTypeError(
        call, f"a {type(fisher).__name__}", "a FisherOperator, or the path of a Fisher file",
        try_="fk.EmpiricalFisher(model, data)",
    )  # fmt: skip


def _named_as(source: FisherSource, known: Collection[str]) -> FisherSource:
    """The Fisher by a model's own names, if it was measured on the model within a wrapper, and else as it is."""
    new = matching(source.space.names, known)
    old = {name: before for before, name in new.items()}
    if len(old) < len(new) or all(before == name for before, name in new.items()):
        return source

    def read(names: Names) -> FisherOperator:
        operator = source.read(tuple(old[name] for name in names))
        return renamed(operator, {name: new[name] for name in operator.space.names})

    return replace(
        source,
        space=ParameterSpace(tuple(new[name] for name in source.space.names), source.space.shapes),
        blocks=tuple(tuple(new[name] for name in block) for block in source.blocks),
        read=read,
        recorded=old,
    )


def activations(source: FisherSource, shrink: float) -> FisherSource:
    """I ⊗ A of each of a Fisher's Kronecker products; of A's entries off the diagonal only the share is kept."""
    blocks = tuple(names for names in source.blocks if source.read(names).factors is not None)
    if not blocks:
        raise InvalidArgumentError(
            "regmean", "a Fisher without a Kronecker product", "activation factors",
            why="RegMean merges linear layers by the second moments of their inputs", try_='structure="kfac"',
        )  # fmt: skip

    def read(names: Names) -> FisherOperator:
        layer = source.read(names)
        if layer.factors is None or layer.layout is None:
            raise InvalidArgumentError(
                "regmean", f"layers joined into {list(names)}", "Fishers of one structure",
                try_='structure="kfac" for all',
            )  # fmt: skip
        activation, layout = layer.factors[0], layer.layout
        kept = torch.lerp(activation.diagonal().diag(), activation, shrink)
        identity = torch.eye(layout.outputs, dtype=layer.dtype, device=layer.device)
        return KroneckerOperator(layer.space, kept, identity, layout.transposed, symmetric=True)

    space = source.space.restrict(name for block in blocks for name in block)
    return replace(source, space=space, blocks=blocks, read=read)


def joined_blocks(sources: Sequence[FisherSource], names: Iterable[str], call: str) -> list[Names]:
    """The finest partition of some names in which no block of any source is torn apart, in the names' order."""
    order = {name: place for place, name in enumerate(names)}
    units: list[Names] = [(name,) for name in order]
    for number, source in enumerate(sources, 1):
        for block in source.blocks:
            outside = [repr(name) for name in block if name not in order]
            if outside and len(outside) < len(block):
                raise InvalidArgumentError(
                    f"{call}, Fisher {number}",
                    f"a block over {listed(map(repr, block))}, of which {listed(outside)} cannot be merged",
                    "blocks whose parameters all models and Fishers have, in the same shapes",
                    why="parameters of one block interact, and a part of them cannot be solved for alone",
                    try_="Fishers built with the same params=, without the parameters that differ",
                )  # fmt: skip
            units += [] if outside else [block]
    groups = [tuple(sorted(group, key=order.__getitem__)) for group in finest_partition(units)]
    blocks = sorted(groups, key=lambda group: order[group[0]])
    for number, source in enumerate(sources, 1):
        for block in blocks:
            if (own := source.space.restrict(block).names) != block:
                raise InvalidArgumentError(
                    f"{call}, Fisher {number}",
                    f"the parameters {listed(map(repr, own))} in another order than the first Fisher's",
                    "one order of parameters", try_="Fishers built from models of one class",
                )  # fmt: skip
    return blocks


def check_fits(source: FisherSource, model: ModelSource, label: str, call: str) -> None:
    """Refuse a Fisher over what its model lacks or has in another shape."""
    odd = [
        f"{name!r} ({list(shape)} and {list(model.shapes[name])})" if name in model.shapes else repr(name)
        for name, shape in zip(source.space.names, source.space.shapes, strict=True) if model.shapes.get(name) != shape
    ]  # fmt: skip
    if odd:
        raise InvalidArgumentError(
            call, f"{label} over parameters that {model.label} lacks or has in another shape: {listed(odd)}",
            "the Fisher of this model", why="a tied parameter has only the name of the first module that holds it",
            try_="another model, another order of fishers, or the Fisher measured again",
        )  # fmt: skip


def check_measured(
    models: Sequence[ModelSource], sources: Sequence[FisherSource], other_weights: str, call: str
) -> tuple[int, ...]:
    """Numbers of the models, from 1, that cannot be told to be those that were measured."""
    same = [_measured_at(model, source) for model, source in zip(models, sources, strict=True)]
    others = []
    for number, source in enumerate(sources, 1):
        if same[number - 1] is False:
            right = [i for i, model in enumerate(models, 1) if i != number and _measured_at(model, source)]
            others.append(
                f"Fisher {number} was measured at other parameters than those of model {number}"
                + (f" (at those of model {right[0]})" if right else "")
            )
    products = any(".base_layer." in name for source in sources for name in source.space.names)
    advice = "fk.adapters.merged_weights(model) in the place of each model, of whose adapters' products its Fisher is"
    if others and other_weights == "refuse":
        raise InvalidArgumentError(
            f'{call}(other_weights="refuse")', "Fishers of other weights: " + "; ".join(others),
            "the Fisher of each very model", why="a Fisher says what matters near the weights that it was measured at",
            try_=advice if products else "another order of fishers, the Fisher measured again, or "
            'policy=MergePolicy(other_weights="warn"), which merges them',
        )  # fmt: skip
    for text in others:
        warn(
            f"{call}: {text}. Expected: the Fisher of this very model. Try: measure it again, or another order of "
            f"fishers."
        )  # fmt: skip
    return tuple(number for number, found in enumerate(same, 1) if found is None)


def _measured_at(model: ModelSource, source: FisherSource) -> bool | None:
    """Whether a model has the parameters that a Fisher was measured at; None where that cannot be told."""
    names, (dtype, _, known) = source.space.names, source.metadata.get("covered_hash", "").partition(":")
    if any(str(model.dtypes.get(name)).removeprefix("torch.") != dtype for name in names):
        return None
    then = {source.recorded.get(name, name): name for name in names}  # the hash is of the names of its time, too
    forms = {old: torch.empty(model.shapes[new], dtype=model.dtypes[new], device="meta") for old, new in then.items()}
    return tensors_hash(forms, lambda old: model.read(then[old])) == known
