"""The file in which a long solve keeps where it stands, so that an interrupted one can go on.

Owns the file: its format, when it is written, and whether it belongs to the problem at hand. Knows named tensors and
numbers; what they mean is the solver's business.
"""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from fisherkit import io
from fisherkit.errors import FileFormatError, InvalidArgumentError

FORMAT = "fisherkit-solve"
VERSION = 1

_SUMS = 4
_CHUNK = 1 << 20
_MARK = "mark."


class Checkpoint:
    """One solve's file. What it is compared with is remembered and written with every later `save`.

    Problems are recognised up to rounding: a gradient or a product that is computed again, perhaps with other threads
    or on another device, is the same only up to rounding.

    Args:
        path: the file; need not exist.
        every: seconds from one `save` to the next time that `due` says yes.
        device: where its tensors go.
        dtype: the solve's; the square root of its machine epsilon is the relative difference that counts as rounding.

    Attributes:
        found: whether there is a file to go on from.

    Raises:
        InvalidTypeError: path is not a path.
        InvalidArgumentError: ``every`` is not a number of seconds, or no file can be at the path.
        FileFormatError: there is a file, and it is damaged or not one of these.
    """

    def __init__(self, path: str | Path, *, every: float, device: torch.device, dtype: torch.dtype) -> None:
        if not every >= 0:
            raise InvalidArgumentError(
                call=f"solve(checkpoint_every={every})", got=str(every), expected="seconds, 0 or more"
            )
        self.call, self.every = f"solve(checkpoint={str(path)!r})", every
        self.path = io.as_path(path, "solve(checkpoint)")
        self.rounding = torch.finfo(dtype).eps ** 0.5
        self.settings: dict[str, Any] = {}
        self.marks: dict[str, Tensor] = {}
        self._header: dict[str, Any] = {}
        self._tensors: dict[str, Tensor] = {}
        io.check_folder(self.path, self.call)
        self.found = self.path.exists()
        if self.found:
            self._read(device)
        self._last = time.monotonic()

    def match(self, name: str, value: Any) -> None:
        """A setting that must be the file's; floats up to rounding.

        Raises:
            InvalidArgumentError: it is not.
        """
        self.settings[name] = value
        if not self.found:
            return
        kept = self._header["settings"].get(name)
        close = isinstance(value, float) and isinstance(kept, float)
        if not (math.isclose(value, kept, rel_tol=self.rounding) if close else value == kept):
            raise self._other(f"with {name} = {kept}", f"{name} = {value}")

    def match_columns(self, name: str, columns: Float[Tensor, "D K"]) -> None:
        """Columns that must be the file's up to rounding; the file has a few sums of each.

        Raises:
            InvalidArgumentError: they are not.
        """
        mark = self.marks[name] = _mark(columns)
        if not self.found:
            return
        kept = self._tensors.get(_MARK + name)
        # Sums with random signs of two vectors differ by about the norm of the vectors' difference.
        bound = self.rounding * torch.cat([mark[:1], mark[1:2].expand(_SUMS + 1, -1)])
        if kept is None or kept.shape != mark.shape or not bool(((mark - kept).abs() <= bound).all()):
            raise self._other(f"with another {name}", f"the {name} of this call")

    def load(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The tensors and numbers of the file's last `save`."""
        tensors = {name: t for name, t in self._tensors.items() if not name.startswith(_MARK)}
        return tensors, dict(self._header["numbers"])

    def due(self) -> bool:
        """Whether it is time to save."""
        return time.monotonic() - self._last >= self.every

    def save(self, tensors: dict[str, Tensor], numbers: dict[str, Any]) -> None:
        """Write where the solve stands; an interruption meanwhile leaves the file before it."""
        header = {
            "format": FORMAT,
            "version": str(VERSION),
            "settings": json.dumps(self.settings),
            "numbers": json.dumps(numbers),
        }
        everything = tensors | {_MARK + name: mark for name, mark in self.marks.items()}
        io.replace_checked_file(self.path, everything, header)
        self._last = time.monotonic()

    def damaged(self, error: Exception) -> FileFormatError:
        """The error for a file whose contents make no sense."""
        return FileFormatError(
            call=self.call,
            got=f"a file that cannot be read ({error})",
            expected="one written by a solve",
            try_="another path, or delete the file",
        )

    def _read(self, device: torch.device) -> None:
        header, self._tensors = io.read_tensors(self.path, device, self.call, "a solve")
        if header.get("format") != FORMAT:
            raise FileFormatError(
                call=self.call,
                got="a file of another kind, which has been left as it is",
                expected="no file yet, or one written by a solve",
                try_="another path",
            )
        try:
            version = int(header["version"])
            self._header = {key: dict(io.parse(header[key])) for key in ("settings", "numbers")}
        except (LookupError, ValueError, TypeError) as error:
            raise self.damaged(error) from error
        if version > VERSION:
            raise FileFormatError(
                call=self.call, got=f"format version {version}", expected=f"at most {VERSION}", try_="a newer fisherkit"
            )

    def _other(self, got: str, expected: str) -> InvalidArgumentError:
        return InvalidArgumentError(
            call=self.call,
            got=f"the file of another solve, {got}",
            expected=f"no file yet, or that of a solve with {expected}",
            why="going on from there would mix two problems; the file has been left as it is",
            try_="another path, or delete the file if that solve is no longer wanted",
        )


def _mark(columns: Float[Tensor, "D K"]) -> Float[Tensor, "m K"]:
    """Each column's largest magnitude and, divided by it, its norm and sums with random signs; float64."""
    largest = columns.abs().amax(0)
    unit = columns / torch.where(largest > 0, largest, 1)
    sums = torch.zeros(_SUMS, columns.shape[1], dtype=torch.float64, device=columns.device)
    generator = torch.Generator().manual_seed(0)
    for part in unit.split(_CHUNK):  # or the signs would take more memory than the columns
        signs = torch.randint(0, 2, (part.shape[0], _SUMS), generator=generator).to(part.device, torch.float64)
        sums += (2 * signs - 1).mT @ part.double()
    norm = torch.linalg.vector_norm(unit, dim=0, dtype=torch.float64)
    return torch.cat([largest.double().unsqueeze(0), norm.unsqueeze(0), sums])
