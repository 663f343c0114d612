"""Pictures in the page of ``fisherkit scores``: PNG files that a reader of our own takes apart again."""

from __future__ import annotations

import base64
import struct
import zlib
from typing import Any

import numpy as np
import pytest
import torch

import fisherkit as fk
from fisherkit.cli.scores_report import LARGEST, data_uri


def pixels(uri: str) -> np.ndarray[Any, Any]:
    """A PNG without filters, read back."""
    data = base64.b64decode(uri.removeprefix("data:image/png;base64,"))
    assert data.startswith(b"\x89PNG\r\n\x1a\n")
    chunks, place = {}, 8
    while place < len(data):
        (size,) = struct.unpack_from(">I", data, place)
        name, body = data[place + 4 : place + 8], data[place + 8 : place + 8 + size]
        assert struct.unpack_from(">I", data, place + 8 + size)[0] == zlib.crc32(name + body)
        chunks[name], place = body, place + 12 + size
    width, height, depth, color, *_ = struct.unpack(">IIBBBBB", chunks[b"IHDR"])
    assert depth == 8
    rows = np.frombuffer(zlib.decompress(chunks[b"IDAT"]), np.uint8).reshape(height, -1)
    assert not rows[:, 0].any()
    return rows[:, 1:].reshape(height, width, {0: 1, 2: 3, 6: 4}[color])


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        (torch.tensor([[0, 0.5], [1, 0.2]]), [[[0], [128]], [[255], [51]]]),
        (torch.tensor([[-1.0, 1.0], [3.0, float("nan")]]), [[[0], [128]], [[255], [64]]]),
        (np.array([[0, 7], [255, 1]], dtype=np.uint8), [[[0], [7]], [[255], [1]]]),
        (torch.tensor([[True, False]]), [[[255], [0]]]),
        (torch.eye(3)[:, :1, None].expand(3, 1, 2), [[[255, 0, 0], [255, 0, 0]]]),
        (torch.eye(3).reshape(1, 3, 3)[:, :2].expand(2, 2, 3), [[[255, 0, 0], [0, 255, 0]]] * 2),
    ],
    ids=["unit", "range", "bytes", "bool", "channels first", "channels last"],
)
def test_data_uri__is_a_png_of_the_pixels(image: Any, expected: list[Any]) -> None:
    assert pixels(data_uri(image, "test")).tolist() == expected


def test_data_uri__averages_large_pictures_down() -> None:
    assert pixels(data_uri(torch.ones(640, 1280), "test")).shape == (160, LARGEST, 1)


@pytest.mark.parametrize("image", [torch.zeros(5, 4, 2), torch.zeros(4), torch.zeros(0, 3), torch.zeros(2, 2) * 1j])
def test_data_uri__refuses_what_is_no_picture(image: torch.Tensor) -> None:
    with pytest.raises(fk.errors.InvalidArgumentError, match="C = 1, 3 or 4"):
        data_uri(image, "test")
