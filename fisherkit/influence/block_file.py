"""A block of rows in a safetensors file, with a checksum of all that it holds, which is compared whenever it is read.

Owns the file's layout; knows neither folders nor scores. Pickle is never used.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fisherkit import io
from fisherkit.data import Batch
from fisherkit.errors import FileFormatError
from fisherkit.influence.blocks import RowBlock
from fisherkit.model_state import tensors_hash
from fisherkit.rows import restore_rows
from fisherkit.space import ParameterSpace

KEY = "fisherkit-rows"
"""The only key of the file's metadata: the order of several would change from run to run."""

CALL = "prepare(folder)"


@dataclass(frozen=True)
class StoredBlock:
    """A block's file, read and found to be what was written.

    Args:
        path: the file.
        checksum: of header and tensors.
        header: what the block says of itself: digest and number of its examples, and its units.
        tensors: on the device that they are for.
    """

    path: Path
    checksum: str
    header: dict[str, Any]
    tensors: dict[str, Tensor]

    def rows(self, space: ParameterSpace) -> RowBlock:
        """The block.

        Raises:
            FileFormatError: it is none of this package's.
        """
        tensors = self.tensors
        try:
            states = [
                io.State(
                    unit["kind"],
                    tuple(unit["names"]),
                    {name: tensors[f"{number}.{name}"] for name in unit["tensors"]},
                    unit["options"],
                )
                for number, unit in enumerate(self.header["units"])
            ]
            return RowBlock(restore_rows(space, states), tensors["owner"], tensors["mask"])
        except (LookupError, ValueError, TypeError) as error:
            raise FileFormatError(**damaged(self.path, str(error))) from error


def write_block(path: Path, block: RowBlock, batch: Batch) -> str:
    """Write the rows of a batch; the file is there when it is whole.

    Returns:
        The checksum.
    """
    tensors: dict[str, Tensor] = {"owner": block.owner, "mask": block.mask}
    units = []
    for number, slot in enumerate(block.rows.slots):
        own = slot.rows.tensors()
        units.append({"kind": slot.rows.kind, "names": slot.names, "options": slot.rows.options(), "tensors": [*own]})
        tensors.update({f"{number}.{name}": tensor for name, tensor in own.items()})
    whole = {n: t.detach().clone(memory_format=torch.contiguous_format) for n, t in tensors.items()}
    header = json.dumps({"data": data_digest(batch), "examples": batch.size, "units": units})
    checksum = _checksum(header, whole)
    io.replace_file(path, whole, {KEY: f"{checksum} {header}"})
    return checksum


def read_block(path: Path, device: torch.device) -> StoredBlock:
    """Read a block and compare its checksum, which is the same on every device.

    Raises:
        FileFormatError: it is missing, cut, or not what was written.
    """
    try:
        metadata, tensors = io.read_tensors(path, device, CALL, "prepare")
    except FileFormatError as error:
        raise FileFormatError(**damaged(path, error.got)) from error
    checksum, _, header = metadata.get(KEY, "").partition(" ")
    if checksum != _checksum(header, tensors):
        raise FileFormatError(**damaged(path, "its checksum is another"))
    return StoredBlock(path, checksum, dict(json.loads(header)), tensors)


def damaged(path: Path, reason: str) -> dict[str, str]:
    """What a FileFormatError says of a block."""
    return {
        "call": CALL,
        "got": f"{path.name}, which is missing or damaged ({reason})",
        "expected": "a block as it was written",
        "try_": f"prepare(train, folder={str(path.parent)!r}) again, which makes such blocks anew",
    }


def data_digest(batch: Batch) -> str:
    """SHA-256 of a batch's tensors."""
    digest = hashlib.sha256()
    tensors, _ = batch.leaves()
    for tensor in [*tensors, *([] if batch.targets is None else [batch.targets])]:
        digest.update(f"{tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _checksum(header: str, tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of the header and `tensors_hash`, which reads every value twice: against accidents, not forgery."""
    return hashlib.sha256(f"{tensors_hash(tensors)} {header}".encode()).hexdigest()
