"""What a person sees of an example: label, prediction, loss, and its text or picture.

Owns how outputs become words. Knows no Fisher and no score.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fisherkit.cli.scores.pictures import data_uri, is_image
from fisherkit.cli.scores.result import Example
from fisherkit.cli.text import number
from fisherkit.data import Batch, Data, Source
from fisherkit.errors import DataError, InvalidTypeError
from fisherkit.influence.evaluation.losses import loss_of
from fisherkit.likelihoods import Bernoulli, Categorical, Likelihood, resolve
from fisherkit.model_inputs import is_causal

Show = Callable[[str, int], Any]
"""``show(split, index)``: an example of "train" or "queries" as a text, a picture, a pair of both, or None."""


@dataclass(frozen=True)
class Describer:
    """Looks at examples through their model.

    Args:
        model: in eval mode, read only.
        likelihood: by name, or itself.
        classes: names of the outputs, by number; the number itself where there is none.
        show: of the user's; None to show inputs that are images.
        place: where an example stands, in words.
        call: for errors.
    """

    model: nn.Module
    likelihood: str | Likelihood
    classes: Mapping[int, str]
    show: Show | None
    place: Callable[[str, int], str]
    call: str

    def examples(self, split: str, data: Data, wanted: Collection[int]) -> dict[int, Example]:
        """Some of the examples, by their place in the data.

        Args:
            split: "train" or "queries".
            data: one batch or a re-iterable of batches.
            wanted: places.

        Raises:
            DataError: no targets, or targets that do not fit.
            InvalidTypeError: `show` returned something that cannot be shown.
        """
        places, found = set(wanted), {}
        for start, batch in _numbered(data, self.model):
            inside = sorted(place for place in places if start <= place < start + batch.size)
            if inside:
                some = batch.take(torch.tensor(inside) - start)
                for i, (index, seen) in enumerate(zip(inside, self._seen(some), strict=True)):
                    found[index] = Example(index, self.place(split, index), *seen, *self._shown(split, index, some, i))
        return found

    def losses(self, data: Data) -> list[float]:
        """Of each example."""
        return [seen[-1] for _, batch in _numbered(data, self.model) for seen in self._seen(batch)]

    @torch.no_grad()
    def _seen(self, batch: Batch) -> Iterator[tuple[str | None, str | None, float | None, float]]:
        """Label, prediction, its probability and the loss, of each example."""
        likelihood = resolve(self.likelihood)
        batch = batch.to(next(self.model.parameters()).device)
        raw = batch.call(self.model).double()
        batch = batch.aligned(self.model, raw, shift=is_causal(self.model), ignore_index=likelihood.ignore_index)
        z, target, mask = likelihood.prepare(raw, batch.targets, self.call)
        if target is None or batch.targets is None:
            raise DataError(
                call=self.call, got="data without targets", expected="targets", why="scores are those of a loss"
            )
        losses = loss_of(likelihood, self.call)(raw, batch.targets).tolist()
        if isinstance(likelihood, Categorical):
            words = self._classes(z, target, mask)
        else:
            words = (self._switches if isinstance(likelihood, Bernoulli) else self._values)(z, target)
        return zip(*words, losses, strict=True)

    def _classes(self, z: Tensor, target: Tensor, mask: Tensor) -> tuple[list[Any], ...]:
        if z.shape[1] > 1:
            nothing = [None] * len(z)
            return nothing, nothing, nothing
        best = torch.log_softmax(z[:, 0], -1).max(-1)
        target = target.argmax(-1) if target.is_floating_point() else target
        counted = zip(target[:, 0].tolist(), mask[:, 0].tolist(), strict=True)
        return (
            [self._name(y) if counts else "ignored" for y, counts in counted],
            [self._name(y) for y in best.indices.tolist()],
            best.values.exp().tolist(),
        )

    def _values(self, z: Tensor, target: Tensor) -> tuple[list[Any], ...]:
        words = [[", ".join(number(v) for v in row) for row in t.flatten(1).tolist()] for t in (target, z)]
        return *words, [None] * len(z)

    def _switches(self, z: Tensor, target: Tensor) -> tuple[list[Any], ...]:
        on, p = (t.flatten(1).tolist() for t in (target > 0.5, z.sigmoid()))
        single = len(p[0]) == 1
        words = [[self._on(row) for row in rows] for rows in (on, [[v > 0.5 for v in row] for row in p])]
        return *words, [max(v, 1 - v) if single else None for v, *_ in p]

    def _on(self, row: list[bool]) -> str:
        """The outputs that are on."""
        if len(row) == 1 and not self.classes:
            return str(int(row[0]))
        return ", ".join(self._name(c) for c, on in enumerate(row) if on) or "none"

    def _name(self, index: int) -> str:
        return self.classes.get(index, str(index))

    def _shown(self, split: str, index: int, batch: Batch, i: int) -> tuple[str | None, str | None]:
        """Text and picture."""
        if self.show is None:
            tensors = [leaf for leaf in (*batch.args, *batch.kwargs.values()) if isinstance(leaf, Tensor)]
            if len(tensors) == 1 and tensors[0].ndim == 4 and is_image(tensors[0].shape[1:]):
                return None, data_uri(tensors[0][i], self.call)
            return None, None
        call, made = f"show({split!r}, {index})", self.show(split, index)
        picture, text = made if isinstance(made, tuple) and len(made) == 2 else (made, None)
        if text is None and (picture is None or isinstance(picture, str)):
            picture, text = None, picture
        arrays = ("__array__", "__array_interface__")  # tensors, numpy's arrays, PIL's images
        is_array = any(hasattr(picture, name) for name in arrays)
        if not (picture is None or is_array) or not (text is None or isinstance(text, str)):
            raise InvalidTypeError(
                call=call, got=f"a {type(made).__name__}",
                expected="a text, a picture as an array, a pair (picture, text), or None",
            )  # fmt: skip
        return text, None if picture is None else data_uri(picture, call)


def subset(data: Data, wanted: Collection[int], model: nn.Module) -> list[tuple[Any, Tensor | None]]:
    """Some of the examples, as batches, in the data's order."""
    places = set(wanted)
    found = []
    for start, batch in _numbered(data, model):
        inside = sorted(place for place in places if start <= place < start + batch.size)
        if inside:
            found.append(batch.take(torch.tensor(inside) - start).raw)
    return found


def _numbered(data: Data, model: nn.Module) -> Iterator[tuple[int, Batch]]:
    """Batches with the place of their first example."""
    start = 0
    for batch in Source(data, model).once():
        yield start, batch
        start += batch.size
