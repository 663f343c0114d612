"""Copies of a module with parameters of their own, trained as one: seeds times strengths of one method.

Owns the vectorized forward pass, the penalty of all of them, and what is measured. fisherkit builds a Fisher for each
copy, and the operators' factors are stacked. Avalanche's and mammoth's squares are written from their documentation.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call, grad, vmap

from examples.continual.methods import KINDS, MAMMOTH, SQUARED, Method
from examples.continual.modules import Heads, ModuleBench, Pair, Task, learned
from examples.continual.training import Outcome
from fisherkit.adapters import products
from fisherkit.operators import FisherOperator, KroneckerOperator
from fisherkit.operators.kronecker import EigenKroneckerOperator
from fisherkit.operators.normalization import normalization_factor
from fisherkit.operators.quadratic import atoms

Columns = Callable[[Tensor], Tensor]
"""F times a vector of each member, ``[S, d]`` to ``[S, d]``."""


@dataclass(frozen=True)
class Part:
    """A quadratic form of each member over some parameters: their names, F, and the centre ``[S, d]``."""

    names: tuple[str, ...]
    product: Columns
    centre: Tensor


class Members:
    """S = E·K models, K of each seed; member k of seed e is number e·K + k. K is 1 at first.

    Args:
        models: one a seed.
    """

    def __init__(self, models: Sequence[Heads]) -> None:
        self.model, self.each = copy.deepcopy(models[0]), 1
        self.parameters: dict[str, Tensor] = {
            name: torch.stack([model.get_parameter(name).detach() for model in models]).requires_grad_(p.requires_grad)
            for name, p in self.model.named_parameters()
        }
        names = {id(p): name for name, p in self.model.named_parameters()}
        self.products = {
            name: [(scale, [names[id(p)] for p in factors]) for scale, factors in product.terms]
            for name, product in products(self.model, learned(self.model)).items()
        }

    def repeat(self, each: int) -> None:
        """Every member so many times."""
        self.each *= each
        for name, own in self.parameters.items():
            self.parameters[name] = own.detach().repeat_interleave(each, 0).requires_grad_(own.requires_grad)

    @property
    def trained(self) -> list[str]:
        """The names of what the optimizer changes."""
        return [name for name, own in self.parameters.items() if own.requires_grad]

    def logits(self, x: Tensor) -> Tensor:
        """``[S, B, C]`` of the seeds' inputs ``[E, B, …]``, from the current head."""

        def one(parameters: dict[str, Tensor], own: Tensor) -> Tensor:
            return functional_call(self.model, parameters, (own,))

        result: Tensor = vmap(one)(self.parameters, x.repeat_interleave(self.each, 0))
        return result

    def losses(self, x: Tensor, y: Tensor) -> Tensor:
        """Mean cross-entropies ``[S]``."""
        z, labels = self.logits(x), y.repeat_interleave(self.each, 0)
        return F.cross_entropy(z.mT, labels, reduction="none").mean(1)

    def values(self, names: Sequence[str]) -> Tensor:
        """Some parameters, ``[S, d]``; of a weight under LoRA, W + s·BA. Autograd follows it."""
        found = []
        for name in names:
            total = self.parameters[name]
            for scale, (a, b) in self.products.get(name, ()):
                total = total + scale * self.parameters[b] @ self.parameters[a]
            found.append(total.flatten(1))
        return torch.cat(found, 1)

    @torch.no_grad()
    def flat(self, names: Sequence[str]) -> Tensor:
        """The same without a graph."""
        return self.values(names)

    def load(self, number: int) -> Heads:
        """The module with a member's parameters."""
        with torch.no_grad():
            for name, own in self.model.named_parameters():
                own.copy_(self.parameters[name][number])
        return self.model

    def learn(self, batches: Sequence[tuple[int, Pair]], rate: float, parts: Sequence[Part] = ()) -> None:
        """Adam on loss plus penalty, its step falling linearly to zero; batches with their heads."""
        optimizer = torch.optim.Adam([self.parameters[name] for name in self.trained], lr=rate)
        for number, (head, (x, y)) in enumerate(batches):
            self.model.head = head
            optimizer.zero_grad()
            torch.autograd.backward(self.losses(x, y).sum())
            self._penalize(parts)
            optimizer.param_groups[0]["lr"] = rate * (1 - number / len(batches))
            optimizer.step()

    def _penalize(self, parts: Sequence[Part]) -> None:
        """Add the penalty's gradient."""
        for part in parts:
            values = self.values(part.names)
            torch.autograd.backward(values, part.product(values.detach() - part.centre))


class Keeper:
    """The parts of the penalty, one task after the other.

    Args:
        method: kind and structure.
        strengths: ``[S]``, of ½ · strength · (θ − θ*)ᵀ F (θ − θ*).
        normalize: as in `fisherkit.continual.EWC`.
        batch: examples whose mean gradient is squared, where that is the method.
    """

    def __init__(self, method: Method, strengths: Tensor, normalize: str | None, batch: int) -> None:
        self.method, self.strengths, self.normalize, self.batch = method, strengths, normalize, batch
        self.parts: list[Part] = []
        self.seconds, self.eigenvalues = 0.0, list[float]()
        self._sum: Tensor | None = None

    def consolidate(self, members: Members, tasks: Sequence[Task], number: int) -> None:
        """Keep the task that all have just learned, one for each seed."""
        start, own = time.process_time(), tuple(members.model.own())
        if self.method.structure and self.method.kind in KINDS:
            self._fishers(members, tasks, own, number)
        else:
            # Of LoRA A and B, as other libraries do.
            used = [name for name in members.trained if name in own or not name.startswith("heads.")]
            names = tuple(members.trained if self.method.kind == MAMMOTH else used)
            diagonal = self._importances(members, tasks, names)
            if self.method.kind == MAMMOTH:  # one sum, around the newest centre
                self._sum = diagonal if self._sum is None else self._sum + diagonal
                diagonal, self.parts = self._sum, []
            self._add(members, names, _diagonal(diagonal))
        self.seconds += time.process_time() - start

    def _add(self, members: Members, names: Sequence[str], product: Columns) -> None:
        weights = self.strengths.unsqueeze(1)
        self.parts.append(Part(tuple(names), lambda delta: weights * product(delta), members.flat(names).clone()))

    def _fishers(self, members: Members, tasks: Sequence[Task], own: Sequence[str], number: int) -> None:
        _, kind, options = KINDS[self.method.kind]
        options = {"seed": number} if self.method.kind == "sf" else options
        found: list[list[FisherOperator]] = []
        means = []
        for member in range(len(self.strengths)):
            data = tasks[member // members.each].train
            model = members.load(member).eval()
            fisher = 1.0 * kind(model, data, structure=self.method.structure, params=list(own), **options)
            means.append(float(fisher.trace()) / fisher.size)
            factor = normalization_factor(fisher, self.normalize, "normalize")
            found.append(list(atoms(factor * fisher)))
        self.eigenvalues.append(float(torch.tensor(means).log().mean().exp()))
        for blocks in zip(*found, strict=True):
            self._add(members, blocks[0].space.names, _product(blocks))

    def _importances(self, members: Members, tasks: Sequence[Task], names: Sequence[str]) -> Tensor:
        """Avalanche: the mean over batches of squares of the batch's mean gradient. Mammoth: over examples, times p."""
        if self.method.kind == "l2":
            return torch.ones_like(members.flat(names))
        size = self.batch if self.method.kind == SQUARED else 1
        rows = []
        for member in range(len(self.strengths)):
            x, y = (
                part[: len(part) // size * size].unflatten(0, (-1, size))
                for part in tasks[member // members.each].train
            )
            model = members.load(member)
            held = {name: p.detach() for name, p in model.named_parameters()}

            def loss(chosen: dict[str, Tensor], x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
                value = F.cross_entropy(functional_call(model, held | chosen, (x,)), y)  # noqa: B023 - called at once
                return value, value

            each = vmap(grad(loss, has_aux=True), (None, 0, 0), chunk_size=300)
            gradients, values = each({name: held[name] for name in names}, x, y)
            weights = (-values).exp() if self.method.kind == MAMMOTH else torch.ones_like(values)
            squares = [torch.einsum("n,nd->d", weights, gradients[name].flatten(1).square()) for name in names]
            rows.append(torch.cat(squares) / len(values))
        return torch.stack(rows)


def _diagonal(diagonal: Tensor) -> Columns:
    return lambda delta: diagonal * delta


def _product(blocks: Sequence[FisherOperator]) -> Columns:
    """Members' blocks over the same parameters as one product."""
    first = blocks[0]
    if first.is_diagonal:
        return _diagonal(torch.stack([block.diagonal() for block in blocks]))
    if first.is_dense:
        dense = torch.stack([block.to_dense() for block in blocks])
        return lambda delta: (dense @ delta.unsqueeze(2)).squeeze(2)
    layout = first.layout
    if layout is not None and isinstance(first, KroneckerOperator):
        pairs = [block.factors or () for block in blocks]
        activation, gradient = (torch.stack([pair[place] for pair in pairs]) for place in (0, 1))
        return lambda delta: layout.to_flat(gradient @ layout.to_grid(delta.mT) @ activation).mT
    if layout is not None and isinstance(first, EigenKroneckerOperator):
        eigen = [block for block in blocks if isinstance(block, EigenKroneckerOperator)]
        u, v = (torch.stack([getattr(e, name) for e in eigen]) for name in ("gradient_basis", "activation_basis"))
        values = torch.stack([e.eigenvalue_grid for e in eigen]).to(u.dtype)
        return lambda delta: layout.to_flat(u @ (values * (u.mT @ layout.to_grid(delta.mT) @ v)) @ v.mT).mT
    raise TypeError(f"no way to stack a {type(first).__name__}")


# -- a cell ------------------------------------------------------------------------------------------------------------


def steps(tasks: Sequence[Task], bench: ModuleBench, epochs: int, number: int) -> Iterator[tuple[int, Pair]]:
    """The batches of a task of every seed, with its head; what is left of an epoch is left out."""
    generators = [torch.Generator().manual_seed(1_000_003 * number + seed) for seed in range(len(tasks))]
    for _ in range(epochs):
        orders = [torch.randperm(len(t.train[1]), generator=g) for t, g in zip(tasks, generators, strict=True)]
        for batch in torch.stack(orders).split(bench.batch, 1):
            if batch.shape[1] == bench.batch:
                x, y = (
                    torch.stack([t.train[place][own] for t, own in zip(tasks, batch, strict=True)]) for place in (0, 1)
                )
                yield tasks[0].head, (x, y)


def measure(
    bench: ModuleBench, made: list[tuple[Heads, list[Task]]], method: Method, normalize: str | None,
    strengths: tuple[float, ...], epochs: int,
) -> tuple[Outcome, Keeper | None]:  # fmt: skip
    """What the sequence came to, and what kept the past."""
    seeds = len(made)
    tasks = [list(own) for own in zip(*(tasks for _, tasks in made), strict=True)]
    members = Members([model for model, _ in made])
    batches = [list(steps(own, bench, epochs, number)) for number, own in enumerate(tasks)]
    keeper = Keeper(method, torch.tensor(strengths).repeat(seeds), normalize, bench.batch) if strengths else None
    learned, losses = [], []
    if method.kind == "joint":
        joined = [step for own in batches for step in own]
        order = torch.randperm(len(joined), generator=torch.Generator().manual_seed(0)).tolist()
        members.learn([joined[place] for place in order], bench.rate)
        learned = [_accuracy(members, own) for own in tasks]
        losses = [_loss(members, own) for own in tasks]
    else:
        for number, own in enumerate(tasks):
            members.learn(batches[number], bench.rate, keeper.parts if keeper else ())
            if number == 0:  # which no method changes
                members.repeat(max(1, len(strengths)))
            learned.append(_accuracy(members, own))
            losses.append(_loss(members, own))
            if keeper is not None and number + 1 < len(tasks):
                keeper.consolidate(members, own, number)
    final = torch.stack([_accuracy(members, own) for own in tasks])
    return Outcome(torch.stack(losses), torch.stack(learned), final), keeper


@torch.no_grad()
def _accuracy(members: Members, tasks: Sequence[Task]) -> Tensor:
    """On held-out examples, ``[S]``."""
    members.model.head = tasks[0].head
    x, y = (torch.stack([task.test[place] for task in tasks]) for place in (0, 1))
    return (members.logits(x).argmax(2) == y.repeat_interleave(members.each, 0)).float().mean(1)


@torch.no_grad()
def _loss(members: Members, tasks: Sequence[Task]) -> Tensor:
    """On the training examples, ``[S]``."""
    members.model.head = tasks[0].head
    return members.losses(*(torch.stack([task.train[place] for task in tasks]) for place in (0, 1)))
