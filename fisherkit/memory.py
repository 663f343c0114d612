"""How much memory there is, and how much of it tensors take."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import re
import sys
import time
import weakref
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

RECENT = 0.05
"""Seconds within which what the system says of a processor's memory is asked once."""


def available_memory(device: torch.device) -> int:
    """Bytes that can be allocated on a device now, as far as the system tells."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return _available(int(time.monotonic() / RECENT))


@functools.lru_cache(1)
def _available(_moment: int) -> int:
    """Of a processor, read once a moment."""
    with contextlib.suppress(OSError):
        report = os.open("/proc/meminfo", os.O_RDONLY)
        try:
            known = re.search(rb"MemAvailable: +(\d+)", os.read(report, 1024))  # a line near the top
        finally:
            os.close(report)
        if known is not None:
            return int(known[1]) * 1024
    if "SC_PHYS_PAGES" in os.sysconf_names:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    return 4 << 30  # a small laptop's share, where the system does not tell


def give_back(device: torch.device) -> None:
    """Give a processor's freed blocks back to the system, where glibc keeps them, before something large is made."""
    if device.type == "cpu" and sys.platform == "linux":
        with contextlib.suppress(AttributeError):
            ctypes.CDLL(None).malloc_trim(0)


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all tensors made while it is on: those there ``now``, and the ``most`` at once.

    What a kernel takes and gives back within itself is not seen, as a decomposition's work space.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch's
        self.now = self.most = 0
        self._known: set[int] = set()

    def restart(self) -> None:
        """Begin anew with ``most``."""
        self.most = self.now

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {storage.data_ptr() for storage in _storages((args, kwargs))}
        found = func(*args, **(kwargs or {}))
        for storage in _storages(found):
            if storage.data_ptr() not in self._known and storage.data_ptr() not in given:
                self._known.add(storage.data_ptr())
                self.now += storage.nbytes()
                weakref.finalize(storage, self._freed, storage.data_ptr(), storage.nbytes())
        self.most = max(self.most, self.now)
        return found

    def _freed(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


def _storages(tree: Any) -> list[torch.UntypedStorage]:
    """Of all tensors that have one; not of sparse ones."""
    return [t.untyped_storage() for t in tree_leaves(tree) if isinstance(t, Tensor) and t.layout == torch.strided]
