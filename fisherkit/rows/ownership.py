"""Whose each entry of a layer's tensors is, and how entries are brought to ``[B, T, …]``.

Most layers have a batch axis, first, second or flattened with the positions: `Regular`. Layers that see some examples'
positions only (tokens packed without their padding, mixtures of experts), or see examples in another order, have an
owner for each entry instead: `Owned`. Owners are read off two backward passes, one for the output vectors and one for
the same with every example's vector times a number of its own: an entry's gradient is then multiplied by the number of
the example that owns it, and by no example's number if several depend on it. Knows no layer.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

LEVELS = {torch.float64: 512, torch.float32: 512}
"""Different sizes of the numbers that tell examples apart, times 2 for the sign; 8 in half precision."""

RATIO = {torch.float64: 1e-6, torch.float32: 1e-4}
"""How far, relatively, rounding moves a gradient's multiple; 5e-2 in half precision. Models in float64 may well compute
norms in float32 inside."""

FLOOR = {torch.float64: 1e-9, torch.float32: 1e-6}
"""Gradients below this share of a layer's largest are made of rounding; 1e-2 in half precision."""

SPREAD = 4
"""The numbers lie between 2⁻⁴ and 2⁴."""


@dataclass(frozen=True)
class Regular:
    """Entries that lie as ``outer × batch × inner``: so many neighbouring ones of an example.

    Outputs depend on those that are ``alive``, where that was looked at; None where the forward pass says whose they
    are.
    """

    batch: int
    inner: int
    alive: Bool[Tensor, "E"] | None = field(default=None, compare=False)

    def arranged(self, x: Shaped[Tensor, "k E t c"]) -> Shaped[Tensor, "k B T c"]:
        """By example, in the entries' order; without a copy where examples come first."""
        k, entries, t, c = x.shape
        if entries == self.batch and self.inner == 1:
            return x
        if entries == self.batch * self.inner:
            if t > 1 and x.stride(2) == 1:  # channels before positions in memory, where they stay
                return x.mT.unflatten(1, (self.batch, self.inner)).transpose(2, 3).flatten(3).mT
            return x.reshape(k, self.batch, self.inner * t, c)
        whole = x.reshape(k, entries // (self.batch * self.inner), self.batch, self.inner, t, c)
        return whole.transpose(1, 2).reshape(k, self.batch, entries // self.batch * t, c)

    def owners(self, entries: int) -> Int[Tensor, "E"]:
        """The example of each of so many entries."""
        return torch.arange(entries) // self.inner % self.batch

    def exists(self, positions: int, each: int) -> Bool[Tensor, "B T"]:
        """Which of so many positions of each example outputs depend on, where entries have ``each`` of them."""
        if self.alive is None:
            return torch.ones(self.batch, positions, dtype=torch.bool)
        return self.arranged(self.alive[None, :, None, None].expand(-1, -1, each, -1))[0, :, :, 0]

    def described(self, lead: torch.Size) -> str:
        """Where the batch lies, for `coverage`."""
        if len(lead) == 1:
            major = "batch" if self.inner == lead[0] // self.batch else "position"
            return "batch first" if lead[0] == self.batch else f"flattened, {major} major"
        places = [i for i, size in enumerate(lead) if size == self.batch and lead[i + 1 :].numel() == self.inner]
        names = ("batch first", "batch second")
        return next((names[i] for i in places if i < len(names)), "batch inside")


@dataclass(frozen=True, eq=False)
class Owned:
    """Entries with an owner each: an example, or -1 where nothing depends on an entry."""

    owner: Int[Tensor, "E"]
    batch: int

    @cached_property
    def table(self) -> Int[Tensor, "B V"]:
        """The entries of each example; their number stands for none."""
        owner, entries = self.owner, len(self.owner)
        order = torch.argsort(owner, stable=True)
        counts = torch.bincount(owner.clamp_min(-1) + 1, minlength=self.batch + 1)
        order, counts = order[counts[0] :], counts[1:]
        most = max(1, int(counts.max()))
        place = torch.arange(len(order), device=owner.device) - (counts.cumsum(0) - counts)[owner[order]]
        table = torch.full((self.batch, most), entries, device=owner.device)
        table[owner[order], place] = order
        return table

    def arranged(self, x: Shaped[Tensor, "k E t c"]) -> Shaped[Tensor, "k B T c"]:
        """By example; zeros where an example has fewer entries than another."""
        k, _, t, c = x.shape
        whole = torch.cat([x, x.new_zeros(k, 1, t, c)], 1)[:, self.table]
        return whole.reshape(k, self.batch, self.table.shape[1] * t, c)

    def owners(self, entries: int) -> Int[Tensor, "E"]:
        """The example of each entry."""
        return self.owner

    def exists(self, positions: int, each: int) -> Bool[Tensor, "B T"]:
        """Which positions of each example there are, where entries have ``each`` of them."""
        return (self.table < len(self.owner)).repeat_interleave(each, 1)

    def described(self, lead: torch.Size) -> str:
        """What `coverage` says of entries with an owner each."""
        return "by owner"


Arrangement = Regular | Owned


def codes(batch: int, like: Tensor) -> Float[Tensor, "q B"]:
    """Numbers that tell examples apart: one each in float32 and float64, several where the dtype has few.

    Sizes are far enough apart for rounding, and in no order, so that a mean of two is hardly a third example's.
    """
    base = 2 * LEVELS.get(like.dtype, 8)
    digits = max(1, math.ceil(math.log(batch, base))) if batch > 1 else 1
    generator = torch.Generator().manual_seed(0)
    names = torch.randperm(base**digits if base**digits <= 1 << 16 else batch, generator=generator)[:batch]
    digit = torch.stack([names // base**q % base for q in range(digits)])
    size = 2.0 ** (digit // 2 * (4 * SPREAD / base) - SPREAD)  # powers of two, exact, where the dtype has few digits
    return torch.where(digit % 2 == 0, size, -size).to(like)


def coarser(one: torch.dtype, other: torch.dtype) -> torch.dtype:
    """The floating dtype that rounds more."""
    return max(one, other, key=lambda dtype: torch.finfo(dtype).eps)


def owners(
    gradient: Float[Tensor, "E c"], multiplied: Sequence[Float[Tensor, "E c"]], numbers: Float[Tensor, "q B"],
    coarsest: torch.dtype = torch.float64,
) -> Int[Tensor, "E"] | None:  # fmt: skip
    """The example that each entry belongs to, -1 for entries without a gradient; None if one belongs to several.

    By gradients of some vectors, and of these times each row of ``numbers`` (`codes`); ``coarsest`` is a dtype that
    they went through, if it rounds more than their own.
    """
    dtype = coarser(gradient.dtype, coarsest)
    tolerance, floor = RATIO.get(dtype, 5e-2), FLOOR.get(dtype, 1e-2)
    g, others = gradient.double(), [m.double() for m in multiplied]
    squares, numbers = g.square().sum(1), numbers.double()
    nothing = (squares == 0) & torch.stack([m.square().sum(1) == 0 for m in others]).all(0)
    # Ratios are read in log scale, where all numbers of a sign are equally far apart.
    ratios = torch.stack([(m * g).sum(1) for m in others]) / squares.clamp_min(torch.finfo(torch.float64).tiny)
    keys = torch.sign(numbers) * (numbers.abs().log2() + 2 * SPREAD)
    found = torch.sign(ratios) * (ratios.abs().clamp_min(2.0 ** -(2 * SPREAD)).log2() + 2 * SPREAD)
    owner = _nearest(keys, found)
    expected = numbers[:, owner].unsqueeze(2) * g
    errors = torch.stack([(m - e).norm(dim=1) for m, e in zip(others, expected, strict=True)])
    allowed = numbers[:, owner].abs() * (tolerance * squares.sqrt() + floor * squares.max().sqrt())
    if not bool(((errors <= allowed).all(0) | nothing).all()):
        return None
    return torch.where(nothing, -1, owner)


def _nearest(keys: Float[Tensor, "q B"], found: Float[Tensor, "q E"]) -> Int[Tensor, "E"]:
    """The example whose keys are nearest."""
    # Each digit is rounded to the nearest that there is, then all are looked up together.
    names, index = torch.zeros_like(keys[0]), torch.zeros_like(found[0])
    for key, value in zip(keys, found, strict=True):
        level = torch.unique(key)
        names = names * len(level) + torch.searchsorted(level, key)
        index = index * len(level) + _rounded(level, value)
    order = torch.argsort(names)
    return order[_rounded(names[order], index)]


def _rounded(level: Float[Tensor, "L"], values: Float[Tensor, "E"]) -> Int[Tensor, "E"]:
    return torch.bucketize(values, (level[1:] + level[:-1]) / 2)


def arrangement(owner: Int[Tensor, "E"], lead: torch.Size, batch: int) -> Arrangement:
    """How entries lie: regularly if their owners say so, else one by one."""
    entries = len(owner)
    if entries % batch == 0:
        inner = [entries // batch, *(lead[i + 1 :].numel() for i, size in enumerate(lead) if size == batch), 1]
        place = torch.arange(entries, device=owner.device)
        for one in dict.fromkeys(inner):
            expected = place // max(1, one) % batch
            if entries % (batch * max(1, one)) == 0 and bool(((owner == expected) | (owner < 0)).all()):
                return Regular(batch, max(1, one), owner >= 0)
    return Owned(owner, batch)
