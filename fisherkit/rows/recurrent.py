"""Recurrent layers step by step, so that the linear maps are seen which an LSTM's, a GRU's or an RNN's kernel hides.

The gradients of a layer's weights are Σ_t δ_t x_tᵀ and Σ_t δ_t h_{t−1}ᵀ, where δ_t are those at the sums in front of
the gates: a linear layer's, steps being positions. Owns the layers' arithmetic as torch defines it, and knows no rows.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fisherkit.rows.rules import LinearRule


class RecurrentRule(LinearRule):
    """A linear map inside of a recurrent layer's kernel; its bias is the layer's own."""


LinearMap = tuple[dict[str, Any], Tensor]
"""Arguments of the rule, and the output, of input Wᵀ + b at all steps of one layer in one direction.

The input is ``[B, T, I]``, ``[T, B, I]`` where steps come first, or ``[E, I]`` of packed sequences, without a graph.
"""

Steps = tuple[Callable[[Tensor], Sequence[Tensor]], Callable[[list[Tensor]], Tensor]]
"""A tensor to its steps and back: along an axis, or one behind the other, of as many sequences as have them."""


def drops_out(function: Callable[..., Any], args: tuple[Any, ...]) -> bool:
    """Whether a call is a recurrent layer's with active dropout between its layers."""
    if function not in RECURRENT or len(args) != 9:
        return False
    layers, dropout, training = args[5:8] if is_packed(args) else args[4:7]
    return layers > 1 and dropout > 0 and bool(training)


def can_be_unrolled(function: Callable[..., Any], args: tuple[Any, ...]) -> bool:
    """Whether a call is a recurrent layer's that draws no random numbers and casts nothing."""
    known = function in RECURRENT and len(args) == 9 and not drops_out(function, args)
    return known and not torch.is_autocast_enabled(args[0].device.type)


def unrolled(function: Callable[..., Any], args: tuple[Any, ...]) -> tuple[tuple[Tensor, ...], list[LinearMap]]:
    """What the function returns, computed step by step, and the linear maps on the way."""
    axis = 1 if args[8] else 0
    steps: Steps = functools.partial(torch.unbind, dim=axis), functools.partial(torch.stack, dim=axis)
    x, states, flat, biased, layers, _, _, both = args[:8]
    if is_packed(args):
        sizes = args[1].tolist()
        steps = (lambda x: x.split(sizes)), torch.cat
        x, _, states, flat, biased, layers, _, _, both = args
    paired = isinstance(states, (tuple, list))  # an LSTM's h and c
    starts = [tuple(pair) for pair in zip(*states, strict=True)] if paired else [(h, h) for h in states]
    name, each, maps, ends = RECURRENT[function].name, len(flat) // len(starts), [], []
    for layer in range(layers):
        outputs = []
        for i in range(layer * (1 + both), (layer + 1) * (1 + both)):
            weights, backwards = flat[i * each : (i + 1) * each], i % (1 + both) == 1
            found, end, own = _layer(name, x, starts[i], weights, steps, biased=biased, backwards=backwards)
            outputs.append(found)
            ends.append(end)
            maps += own
        x = torch.cat(outputs, -1) if both else outputs[0]
    last = [torch.stack(same) for same in zip(*ends, strict=True)]
    return (x, *(last if paired else last[:1])), maps


def is_packed(args: tuple[Any, ...]) -> bool:
    """Whether a call is of packed sequences, of which it says how many have each step."""
    return len(args) == 9 and isinstance(args[1], Tensor) and args[1].ndim == 1


def _layer(
    name: str, x: Tensor, start: tuple[Tensor, Tensor], weights: Sequence[Tensor], steps: Steps,
    *, biased: bool, backwards: bool,
) -> tuple[Tensor, tuple[Tensor, Tensor], list[LinearMap]]:  # fmt: skip
    """One layer in one direction: outputs, last h and c, linear maps."""
    (apart, joined), (w_ih, w_hh, *rest) = steps, weights
    b_ih: Any = rest[0] if biased else None
    b_hh: Any = rest[1] if biased else None
    w_hr = rest[-1] if len(rest) % 2 else None
    if name == "gru":  # its reset gate lies between the two sums, which have gradients of their own
        given, added = _with_graph(F.linear(x, w_ih, b_ih)), _repeated(b_hh, w_hh, x)
    else:
        given = added = _with_graph(F.linear(x, w_ih, None if b_ih is None else b_ih + b_hh))
    projected = None if w_hr is None else _repeated(None, w_hr, x)
    sums = list(zip(apart(given), apart(added), strict=True))
    places = [] if projected is None else apart(projected)
    turned, order = w_hh.t(), range(len(sums))[:: -1 if backwards else 1]
    h, c = (first[: len(sums[order[0]][0])] for first in start)
    over: list[tuple[Tensor, Tensor]] = []
    outputs, before, inner = [h] * len(sums), [h] * len(sums), [h] * len(sums)
    for t in order:
        count = len(sums[t][0])
        if count < len(h):  # packed sequences that are over
            over.insert(0, (h[count:], c[count:]))
            h, c = h[:count], c[:count]
        elif count > len(h):  # those that begin, backwards
            h, c = (torch.cat([one, first[len(one) : count]]) for one, first in zip((h, c), start, strict=True))
        before[t] = h.detach()
        h, c = _STEPS[name](*sums[t], h, c, turned)
        if w_hr is not None:
            inner[t] = h.detach()
            h = torch.addmm(places[t], h, w_hr.t())
        outputs[t] = h
    if over:
        h, c = (torch.cat(same) for same in zip((h, c), *over, strict=True))
    maps: list[LinearMap] = [
        ({"input": x.detach(), "weight": w_ih, "bias": b_ih}, given),
        ({"input": joined(before), "weight": w_hh, "bias": b_hh}, added),
    ]
    if projected is not None and w_hr is not None:
        maps.append(({"input": joined(inner), "weight": w_hr, "bias": None}, projected))
    return joined(outputs), (h, c), maps


def _repeated(bias: Tensor | None, weight: Tensor, x: Tensor) -> Tensor:
    """A bias, or zeros, at all steps, where a gradient can be asked for."""
    one = weight.new_zeros(len(weight)) if bias is None else bias
    return _with_graph(one).expand(*x.shape[:-1], -1)


def _with_graph(x: Tensor) -> Tensor:
    return x if x.requires_grad else x.detach().requires_grad_()


def _lstm(given: Tensor, added: Tensor, h: Tensor, c: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    i, f, n, o = torch.addmm(given, h, w).chunk(4, 1)
    c = torch.addcmul(f.sigmoid() * c, i.sigmoid(), n.tanh())
    return o.sigmoid() * c.tanh(), c


def _gru(given: Tensor, added: Tensor, h: Tensor, c: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    own, gates = torch.addmm(added, h, w), 2 * h.shape[1]
    r, z = (given[:, :gates] + own[:, :gates]).sigmoid().chunk(2, 1)
    n = torch.addcmul(given[:, gates:], r, own[:, gates:]).tanh()
    return n + z * (h - n), c


_STEPS: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]] = {
    "lstm": _lstm, "gru": _gru, "rnn_tanh": lambda given, added, h, c, w: (torch.addmm(given, h, w).tanh(), c),
    "rnn_relu": lambda given, added, h, c, w: (torch.addmm(given, h, w).relu(), c),
}  # fmt: skip
"""What the input brings, what is added to it, h, c and the turned weight of h, to the next h and c."""

RECURRENT = {getattr(torch, name): RecurrentRule(name, "input weight bias") for name in _STEPS}
"""The rule of the linear maps in each function."""
