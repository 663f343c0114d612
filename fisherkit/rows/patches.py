"""A convolution's input as the inputs of a linear layer, made when asked for, and activations in either form.

Patches hold every pixel as many times as the kernel has entries. Only a few examples' patches exist at a time, small
enough to stay in the processor's cache; what is kept is the input itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.grad import conv1d_weight, conv2d_weight, conv3d_weight


@dataclass(frozen=True, eq=False)
class Patches:
    """The windows of a padded input, ``[N, T, I]``: T output positions, I = channels × kernel, channels first.

    ``padding`` is zeros before and after each axis, negative to crop. Of ``x`` ``[N · group, channels, *sizes]``, as
    many neighbours as ``group`` says are one example, as views of an image are; their windows follow one another.
    """

    x: Float[Tensor, "N c ..."]
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    group: int = 1

    @property
    def positions(self) -> tuple[int, ...]:
        """How many windows an input has along each axis."""
        axes = zip(self.x.shape[2:], self.padding, self.kernel, self.stride, self.dilation, strict=True)
        return tuple((size + sum(pads) - d * (k - 1) - 1) // s + 1 for size, pads, k, s, d in axes)

    @property
    def shape(self) -> torch.Size:
        """``[N, T, I]``."""
        windows, entries = torch.Size(self.positions).numel(), torch.Size(self.kernel).numel()
        return torch.Size((len(self.x) // self.group, self.group * windows, self.x.shape[1] * entries))

    @property
    def device(self) -> torch.device:
        """The device of the input."""
        return self.x.device

    def __getitem__(self, index: slice | Int[Tensor, "n"]) -> Float[Tensor, "n T I"]:
        """Some examples' patches."""
        return self.take(index, constant=False)

    def take(self, index: slice | Int[Tensor, "n"], *, constant: bool) -> Float[Tensor, "n T I1"]:
        """The same, with a bias's constant input of 1 appended if asked; windows lie along the last axis of memory."""
        x = self.x[index] if self.group == 1 else self.x.unflatten(0, (-1, self.group))[index].flatten(0, 1)
        if any(pair != (0, 0) for pair in self.padding):
            x = F.pad(x, [amount for pair in reversed(self.padding) for amount in pair])
        inner = x.stride()[2:]
        size = (*x.shape[:2], *self.kernel, *self.positions)
        windows = [step * s for step, s in zip(inner, self.dilation, strict=True)]
        moves = [step * s for step, s in zip(inner, self.stride, strict=True)]
        every = x.as_strided(size, (*x.stride()[:2], *windows, *moves), x.storage_offset())
        channels, i = size[1 : 2 + len(inner)], self.shape[2]
        result = x.new_empty(x.shape[0] // self.group, i + constant, self.group, *self.positions)
        result[:, :i].movedim(2, 1).unflatten(2, channels).copy_(every.unflatten(0, (-1, self.group)))
        result[:, i:] = 1.0
        return result.flatten(2).mT

    @property
    def has_kernel(self) -> bool:
        """Whether products with all of an example's windows are faster by a convolution's own weight gradient.

        In float32 on a processor, where windows have many entries, which it does not write out.
        """
        return self.x.dtype == torch.float32 and self.x.device.type == "cpu" and self.shape[1:].numel() >= 1 << 17

    def rows(self, gradient: Float[Tensor, "E t O"], *, bias: bool) -> Float[Tensor, "N d"]:
        """Rows of weight and bias, written out, by gradients at the windows of each input, of which no copy is made."""
        own = gradient.unflatten(0, (-1, self.group))
        found = torch.stack([self.product(n, g) for n, g in enumerate(own)]).flatten(1)
        return torch.cat([found, own.sum((1, 2))], 1) if bias else found

    def product(self, n: int, gradient: Float[Tensor, "group t O"]) -> Float[Tensor, "O I"]:
        """Σ_t g_t x_tᵀ over an example's windows."""
        x = self.x[n * self.group : (n + 1) * self.group]
        same = all(before == after >= 0 for before, after in self.padding)
        if not same:
            x = F.pad(x, [amount for pair in reversed(self.padding) for amount in pair])
        padding = [before if same else 0 for before, _ in self.padding]
        kernel = (conv1d_weight, conv2d_weight, conv3d_weight)[len(self.kernel) - 1]
        outputs = gradient.mT.unflatten(2, self.positions)
        shape = (gradient.shape[2], self.x.shape[1], *self.kernel)
        found: Tensor = kernel(x, shape, outputs, self.stride, padding, self.dilation)  # type: ignore[no-untyped-call]
        return found.flatten(1)

    def grouped(self, group: int) -> Patches:
        """So many neighbours as one example."""
        return replace(self, group=self.group * group)

    def examples(self, index: Int[Tensor, "n"]) -> Patches:
        """Some examples' patches, still to be made."""
        return replace(self, x=self.x.unflatten(0, (-1, self.group))[index].flatten(0, 1))

    def double(self) -> Patches:
        """The same patches in float64."""
        return replace(self, x=self.x.double())

    def stacks_with(self, other: Patches) -> bool:
        """Whether `cat` can put the two on top of each other."""
        mine, theirs = ((p.x.shape[1:], p.kernel, p.stride, p.dilation, p.padding, p.group) for p in (self, other))
        return mine == theirs

    @staticmethod
    def cat(parts: Sequence[Patches]) -> Patches:
        """All examples of the parts, which are alike but for their number."""
        return replace(parts[0], x=torch.cat([part.x for part in parts]))


Activations: TypeAlias = Tensor | Patches
"""``[N, T, I]``, in memory or made when asked for."""


def stacked(parts: Sequence[Activations], positions: int) -> Activations:
    """One after the other, all with so many positions."""
    if len(parts) == 1:
        return parts[0]
    patches = [part for part in parts if isinstance(part, Patches)]
    if len(patches) == len(parts) and all(patches[0].stacks_with(part) for part in patches):
        return Patches.cat(patches)
    return torch.cat([padded(part[:], positions) for part in parts])


def padded(x: Float[Tensor, "n T c"], positions: int) -> Float[Tensor, "n P c"]:
    """With so many positions."""
    # Zero gradients at the positions that a shorter batch does not have leave every sum as it was.
    return torch.nn.functional.pad(x, (0, 0, 0, positions - x.shape[1])) if x.shape[1] < positions else x
