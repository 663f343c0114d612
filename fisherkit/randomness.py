"""Randomness that leaves no trace and does not depend on how data is cut.

`keyed_uniform` gives each example its own numbers, whatever batch it arrives in; `untouched_rng` lets foreign code
(data loaders, models) draw what it likes and puts the global generators back. Nothing here knows what the numbers are
for.
"""

from __future__ import annotations

import ctypes
import functools
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor


def _signed(value: int) -> int:
    return value - (1 << 64) if value >= 1 << 63 else value


# The multipliers and increment of SplitMix64 (Steele, Lea, Flood, 2014), as signed 64-bit integers that wrap around.
_GAMMA, _MIX_1, _MIX_2 = (_signed(c) for c in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


def _mix(x: Int[Tensor, "..."]) -> Int[Tensor, "..."]:
    x = x + _GAMMA
    x = (x ^ _shift(x, 30)) * _MIX_1
    x = (x ^ _shift(x, 27)) * _MIX_2
    return x ^ _shift(x, 31)


def _shift(x: Int[Tensor, "..."], bits: int) -> Int[Tensor, "..."]:
    # torch shifts signed integers arithmetically; the mask makes it the logical shift that the mixer needs.
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def keyed_uniform(
    seed: int, keys: Int[Tensor, "n P"], *, draws: int, channels: int
) -> Float[Tensor, "n draws P channels"]:
    """Uniform numbers in (0, 1) that are a pure function of (seed, key, draw, channel); float64."""
    device = keys.device
    state = _mix(keys + _signed((seed * 0x9E3779B97F4A7C15) % (1 << 64)))
    draw = torch.arange(draws, device=device).view(1, -1, 1, 1)
    channel = torch.arange(channels, device=device)
    state = _mix(_mix(state[:, None, :, None] + draw) + channel)
    # 53 bits, moved half a step off zero so that inverse distribution functions stay finite.
    return (_shift(state, 11).double() + 0.5) * 2.0**-53


RngState = tuple[Any, ...]
"""States of the global CPU generators of torch, Python and NumPy, then of others."""


def rng_state(others: Sequence[torch.Generator] = ()) -> RngState:
    """Where the global generators of the CPU stand, and some others."""
    users = np.random.get_state(legacy=False)  # noqa: NPY002  (users' code draws from it)
    return torch.get_rng_state(), random.getstate(), users, *(generator.get_state() for generator in others)


def device_generators(device: torch.device) -> list[torch.Generator]:
    """The global generator of a device beside the CPU's, if it is a GPU."""
    if device.type != "cuda":
        return []
    return [torch.cuda.default_generators[torch.cuda.current_device() if device.index is None else device.index]]


def rng_places(device: torch.device) -> tuple[Any, ...]:
    """What moves when numbers are drawn from a global generator, the device's own included; to be compared."""
    own, of_python, of_numpy = rng_state()
    cuda = torch.cuda.get_rng_state(device).numpy().tobytes() if device.type == "cuda" else b""
    return own.numpy().tobytes(), cuda, of_python, _comparable(of_numpy)


def _comparable(state: Any) -> Any:
    """A state of NumPy's, of whatever generator, with arrays as bytes."""
    if isinstance(state, dict):
        return {name: _comparable(value) for name, value in state.items()}
    return state.tobytes() if isinstance(state, np.ndarray) else state


def _set_rng_state(state: RngState, others: Sequence[torch.Generator]) -> None:
    torch.set_rng_state(state[0])
    random.setstate(state[1])
    np.random.set_state(state[2])  # noqa: NPY002
    for generator, own in zip(others, state[3:], strict=True):
        generator.set_state(own)


def _place_of_numpy() -> bytes | None:
    """What drawing from NumPy's global generator moves, but for a kept normal number; None where it is another kind.

    Read where it lies: NumPy takes ten times as long to write a state out as all others together.
    """
    address = _twister(np.random.get_bit_generator())  # type: ignore[attr-defined]
    return None if address is None else ctypes.string_at(address, 4 * 625)  # the twister's 624 words and a position


@functools.lru_cache(1)
def _twister(generator: Any) -> int | None:
    """Where the state of a generator lies, if it is NumPy's usual one."""
    return generator.ctypes.state_address if type(generator) is np.random.MT19937 else None


def _unmoved(before: RngState, place: bytes | None, others: Sequence[torch.Generator]) -> bool:
    """Whether generators stand where they stood; what moves most often is looked at first."""
    states = torch.get_rng_state(), *(generator.get_state() for generator in others)
    pairs = zip((before[0], *before[3:]), states, strict=True)
    if not all(a.numpy().tobytes() == b.numpy().tobytes() for a, b in pairs) or before[1] != random.getstate():
        return False
    if place is not None and not before[2]["has_gauss"]:  # no kept normal, which the next draw would take
        return place == _place_of_numpy()
    return bool(_comparable(before[2]) == _comparable(np.random.get_state(legacy=False)))  # noqa: NPY002


@dataclass
class Draws:
    """Whether numbers were drawn, known when it is over."""

    happened: bool = False


@contextmanager
def untouched_rng(
    devices: list[torch.device], state: RngState | None = None, others: Sequence[torch.Generator] = ()
) -> Iterator[Draws]:
    """Run foreign code and restore the global random generators and ``others`` afterwards, also after an exception.

    ``state`` is one of `rng_state` to start from, so that a shuffling loader gives the same order in every pass.
    """
    cuda = [device for device in devices if device.type == "cuda"]
    before, place, draws = rng_state(others), _place_of_numpy(), Draws()
    with torch.random.fork_rng(devices=cuda) if cuda else nullcontext():
        places = [torch.cuda.get_rng_state(device) for device in cuda]
        try:
            if state is not None:
                _set_rng_state(state, others)
            yield draws
        finally:
            after = [torch.cuda.get_rng_state(device) for device in cuda]
            draws.happened = not (_unmoved(before, place, others) and all(map(torch.equal, places, after)))
            if draws.happened:
                _set_rng_state(before, others)
