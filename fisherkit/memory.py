"""How much memory there is."""

from __future__ import annotations

import contextlib
import functools
import os
import re
import time

import torch

RECENT = 0.05
"""Seconds within which what the system says of a processor's memory is asked once."""


def readable(number: float) -> str:
    """Bytes with the unit that fits."""
    units = ["B", "kB", "MB", "GB"]
    while number >= 1000 and len(units) > 1:
        number /= 1000
        del units[0]
    return f"{number:.3g} {units[0]}"


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
