"""Many multilayer perceptrons of one shape, trained as one: every layer's parameters of all of them in one tensor.

The stack has E seeds times K members a seed, which see the same examples in the same order. Owns the layout, the loss
with its gradient, and the way to an ordinary module. Knows nothing of Fishers.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Stack:
    """The parameters of S = E·K perceptrons, or anything of that shape.

    Args:
        widths: of the layers, inputs and outputs included.
        seeds: E.
        each: K members a seed; member k of seed e is number e·K + k.
        storage: all numbers; zeros if not given.
        dtype: of zeros.

    Attributes:
        layers: a tensor ``[S, O, I + 1]`` for each layer, views of the storage; the last column is the bias.
    """

    def __init__(
        self, widths: Sequence[int], seeds: int, each: int, storage: Tensor | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:  # fmt: skip
        self.widths, self.seeds, self.each = tuple(widths), seeds, each
        shapes = [(seeds * each, o, i + 1) for i, o in pairwise(widths)]
        sizes = [s * o * i for s, o, i in shapes]
        self.storage = torch.zeros(sum(sizes), dtype=dtype) if storage is None else storage
        self.layers = [part.view(shape) for part, shape in zip(self.storage.split(sizes), shapes, strict=True)]

    @property
    def members(self) -> int:
        """S."""
        return self.seeds * self.each

    @property
    def size(self) -> int:
        """D, parameters of a member."""
        return self.storage.numel() // self.members

    def like(self, storage: Tensor | None = None) -> Stack:
        """Another stack of this shape; zeros if no numbers are given."""
        return Stack(self.widths, self.seeds, self.each, storage, self.storage.dtype)

    def repeat(self, each: int) -> Stack:
        """Every member so many times."""
        wider = Stack(self.widths, self.seeds, self.each * each, dtype=self.storage.dtype)
        for own, new in zip(self.layers, wider.layers, strict=True):
            new.copy_(own.repeat_interleave(each, 0))
        return wider

    def flat(self) -> Tensor:
        """``[S, D]`` in the order of the module's parameters: each layer's weight and then its bias."""
        parts = [part for w in self.layers for part in (w[:, :, :-1].flatten(1), w[:, :, -1])]
        return torch.cat(parts, 1)

    def put(self, flat: Tensor) -> Stack:
        """The inverse of `flat`, in place."""
        start = 0
        for w in self.layers:
            count, outputs, width = w.shape
            middle, stop = start + outputs * (width - 1), start + outputs * width
            w[:, :, :-1] = flat[:, start:middle].view(count, outputs, width - 1)
            w[:, :, -1] = flat[:, middle:stop]
            start = stop
        return self


class Perceptron(nn.Module):
    """One member as an ordinary module.

    Args:
        widths: of the layers.
        window: the outputs that it returns.
    """

    def __init__(self, widths: Sequence[int], window: slice | None = None) -> None:
        super().__init__()
        self.linears = nn.ModuleList(nn.Linear(i, o) for i, o in pairwise(widths))
        self.window = window

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``[B, C]``."""
        for linear in list(self.linears)[:-1]:
            x = F.relu(linear(x))
        z: Tensor = self.linears[-1](x)
        return z if self.window is None else z[:, self.window]

    def load(self, flat: Tensor) -> Perceptron:
        """Take a member's parameters ``[D]``."""
        with torch.no_grad():
            nn.utils.vector_to_parameters(flat, self.parameters())
        return self


def with_ones(inputs: Tensor) -> Tensor:
    """Inputs ``[E, B, I]`` with the biases' constant input, ``[E, B, I + 1]``."""
    return F.pad(inputs, (0, 1), value=1.0)


def matmul(w: Tensor, columns: Tensor) -> Tensor:
    """``w @ columns`` of ``w [S, O, I]`` and ``columns [S, I, n]``, or ``[E, I, n]`` where a seed's share them."""
    count, outputs, width = w.shape
    return torch.bmm(w.reshape(len(columns), -1, width), columns).view(count, outputs, columns.shape[2])


def add_matmul(total: Tensor, w: Tensor, columns: Tensor) -> None:
    """Add what `matmul` returns to ``total [S, O, n]``."""
    shared, width = len(columns), w.shape[2]
    total.view(shared, -1, total.shape[2]).baddbmm_(w.reshape(shared, -1, width), columns)


class Pass:
    """Forward and backward passes of a stack, with what they need at hand.

    Args:
        stack: whose loss is wanted; read at every call.
        window: the outputs that count.
    """

    def __init__(self, stack: Stack, window: slice) -> None:
        self.stack, self.window = stack, window

    def logits(self, inputs: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Logits ``[S, C, B]`` and the hidden layers' outputs ``[S, O + 1, B]``, ones in their last row."""
        columns = inputs.mT.contiguous()
        hidden: list[Tensor] = []
        for w in self.stack.layers[:-1]:
            z = matmul(w, columns)
            columns = z.new_ones(z.shape[0], z.shape[1] + 1, z.shape[2])
            torch.clamp_min(z, 0, out=columns[:, :-1])
            hidden.append(columns)
        return matmul(self.stack.layers[-1], columns), hidden

    def gradient(self, inputs: Tensor, labels: Tensor, out: Stack) -> Tensor:
        """The mean cross-entropy of each member, and its gradient.

        Args:
            inputs: ``[E, B, I + 1]``, as `with_ones` makes them.
            labels: ``[E, B]``, counted from the window's start.
            out: takes the gradient.

        Returns:
            Losses ``[S]``.
        """
        z, hidden = self.logits(inputs)
        own = z[:, self.window]
        wanted = labels.repeat_interleave(self.stack.each, 0).unsqueeze(1)
        log_p = F.log_softmax(own, 1)
        g = torch.zeros_like(z)
        g[:, self.window] = log_p.exp().scatter_add_(1, wanted, z.new_full((), -1.0).expand(wanted.shape))
        g /= z.shape[2]
        for number in range(len(hidden), 0, -1):
            columns = hidden[number - 1]
            torch.bmm(g, columns.mT, out=out.layers[number])
            back = torch.bmm(self.stack.layers[number][:, :, :-1].mT, g)
            g = torch.ops.aten.threshold_backward(back, columns[:, :-1], 0.0)
        rows = g.reshape(self.stack.seeds, -1, g.shape[2])
        torch.bmm(rows, inputs, out=out.layers[0].view(self.stack.seeds, -1, inputs.shape[2]))
        return -log_p.gather(1, wanted).mean((1, 2))

    def measure(self, inputs: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Mean cross-entropy and share of correct predictions of each member, ``[S]``."""
        own = self.logits(inputs)[0][:, self.window]
        wanted = labels.repeat_interleave(self.stack.each, 0).unsqueeze(1)
        loss = -F.log_softmax(own, 1).gather(1, wanted).mean((1, 2))
        return loss, (own.argmax(1, keepdim=True) == wanted).to(loss.dtype).mean((1, 2))
