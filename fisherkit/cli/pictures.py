"""Pictures of examples as PNG files that stand in a page themselves, written with nothing but a standard library."""

from __future__ import annotations

import base64
import struct
import zlib
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fisherkit.errors import InvalidArgumentError

LARGEST = 320
"""Pixels of the longer side; larger pictures are averaged down."""

COLOR_TYPES = {1: 0, 3: 2, 4: 6}
"""Channels to PNG's numbers for grey, RGB and RGB with alpha."""


def is_image(shape: torch.Size) -> bool:
    """Whether an example of this shape is taken for a picture without being asked: ``[1 or 3, H, W]``."""
    return len(shape) == 3 and shape[0] in (1, 3) and min(shape[1:]) > 1


def data_uri(image: Any, call: str) -> str:
    """A picture as a URI that holds all of it.

    It is a tensor, or what numpy makes an array of: ``[H, W]``, ``[C, H, W]`` or ``[H, W, C]`` with C = 1, 3 or 4.
    Bytes are 0 to 255, booleans black and white. Other numbers are 0 to 1; where some lie outside, the least becomes
    black and the largest white.

    Raises:
        InvalidArgumentError: no such shape.
    """
    found = image.detach().cpu() if isinstance(image, Tensor) else torch.as_tensor(np.array(image))
    values = found
    if values.ndim == 2:
        values = values.unsqueeze(-1)
    elif values.ndim == 3 and values.shape[0] in COLOR_TYPES:
        values = values.movedim(0, -1)
    if values.ndim != 3 or values.shape[-1] not in COLOR_TYPES or 0 in values.shape or values.is_complex():
        raise InvalidArgumentError(
            call=call, got=f"a picture of shape {list(found.shape)} and {found.dtype}",
            expected="real numbers [H, W], [C, H, W] or [H, W, C] with C = 1, 3 or 4",
        )  # fmt: skip
    return "data:image/png;base64," + base64.b64encode(_png(_bytes(values))).decode()


def _bytes(image: Tensor) -> Tensor:
    """``[H, W, C]`` as bytes."""
    if image.dtype == torch.uint8:
        values = image.double() / 255
    else:
        values = image.double().nan_to_num(0.0, 0.0, 0.0)
        low, high = values.min(), values.max()
        if low < 0 or high > 1:
            values = (values - low) / (high - low).clamp_min(torch.finfo(values.dtype).tiny)
    longest = max(values.shape[:2])
    if longest > LARGEST:
        height, width = (max(1, round(side * LARGEST / longest)) for side in values.shape[:2])
        values = torch.nn.functional.adaptive_avg_pool2d(values.movedim(-1, 0), (height, width)).movedim(0, -1)
    return (values * 255).round().clamp(0, 255).to(torch.uint8).contiguous()


def _png(image: Tensor) -> bytes:
    """The file: signature, header, the filtered rows in one compressed chunk, end (W3C, Portable Network Graphics)."""
    height, width, channels = image.shape
    header = struct.pack(">IIBBBBB", width, height, 8, COLOR_TYPES[channels], 0, 0, 0)
    # Each row begins with the number of its filter: 0, none.
    rows = np.zeros((height, 1 + width * channels), dtype=np.uint8)
    rows[:, 1:] = image.reshape(height, -1).numpy()
    return (
        b"\x89PNG\r\n\x1a\n"
        + _chunk(b"IHDR", header)
        + _chunk(b"IDAT", zlib.compress(rows.tobytes(), 9))
        + _chunk(b"IEND", b"")
    )


def _chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
