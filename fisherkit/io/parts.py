"""A Fisher file in the making: shards that are written one part after the other, by a run that may be killed and go on.

A shard appears under its name when it is whole, and the index, without which they are no Fisher file, when all parts
are there. Until then a record beside them says what has been finished, and of what: a run of anything else is refused.
The same run gives the same bytes, whether it was interrupted or not.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from fisherkit.errors import FileFormatError, InvalidArgumentError, listed
from fisherkit.io.atomic import delete, replace_text
from fisherkit.io.checksums import Checksums, Written, written
from fisherkit.io.fisher_file import (
    SHARD_FORMAT,
    SHARDED_VERSION,
    Node,
    State,
    delete_replaced,
    described,
    header_at,
    index_of,
    index_text,
    pack,
    refuse_others,
)
from fisherkit.io.record import differing, read_record, write_record
from fisherkit.io.tensors import FORMAT, SUFFIX, UNREADABLE, cut, forms_of, new_files
from fisherkit.space import ParameterSpace

PARTS_FORMAT = f"{FORMAT}-parts-2"


def record_of(path: Path) -> Path:
    """What says which parts of a Fisher file in the making are finished."""
    return path.with_name(f"{path.name}.parts.json")


def parts_finished(path: Path) -> tuple[int, int]:
    """How many parts a Fisher file in the making has, and how many of them are finished."""
    found = json.loads(record_of(path).read_text("utf-8"))
    return len(found["parts"]), len(found["finished"])


def is_closed(path: Path) -> bool:
    """Whether a Fisher file is finished whose record was not removed any more."""
    with contextlib.suppress(OSError, ValueError, LookupError):
        saved: str = json.loads(record_of(path).read_text("utf-8"))["save"]
        return saved == (header_at(index_of(path)) or {}).get("save")
    return False


class PartsFile:
    """The parts of a Fisher file, of which some may be there from a run that was interrupted.

    ``settings``, and ``data`` once a part has been made, tell this run from others, whose parts are not gone on with;
    ``overwrite`` discards those. ``largest`` is as in `cut`. ``known`` is what an interrupted run left, with what it
    depended on beside the settings, "budget" and "data"; empty if there is none.

    Raises:
        InvalidArgumentError: parts of another run are there.
        FileFormatError: their record is damaged.
    """

    def __init__(
        self, path: Path, settings: Mapping[str, str], data: Callable[[], list[str]], *, largest: int | None,
        overwrite: bool, call: str,
    ) -> None:  # fmt: skip
        self.path, self._data, self._largest, self._call = path, data, largest, call
        self._settings = {**settings, "max_shard_size": str(largest)}
        self.known: dict[str, Any] = {}
        try:
            self.known = self._read()
        except (InvalidArgumentError, FileFormatError):
            if not overwrite:
                raise
        self._record = self.known

    def _read(self) -> dict[str, Any]:
        """The record of an interrupted run; empty if there is none."""
        file = record_of(self.path)
        if not file.exists():
            return {}
        advice = f"overwrite=True, which makes all parts again, another name, or rm {file}"
        found = read_record(file, {"format": PARTS_FORMAT}, self._call, "a record of finished parts", advice)
        if changed := differing(found["settings"], self._settings):
            raise InvalidArgumentError(
                self._call, f"{file.name} of an interrupted run with different {listed(changed)}",
                "no such file, or the same run again, which goes on from there",
                why="its finished parts belong to another result", try_=advice,
            )  # fmt: skip
        return found

    def begin(self, parts: Sequence[tuple[str, ...]], plan: str, budget: int) -> list[tuple[str, ...]]:
        """The parts to make, those of the interrupted run if it made rows in the same way."""
        if len(parts) > 1:
            refuse_others(self.path, self._call, sharded=True)
        if self.known.get("plan") == plan:
            self._record = self.known
        else:
            # The record on the disk stays until a part is finished: a later batch may yet show what that run knew.
            self._record = {
                "format": PARTS_FORMAT, "settings": self._settings, "plan": plan, "budget": budget,
                "parts": [list(names) for names in parts], "finished": {},
            }  # fmt: skip
        return [tuple(names) for names in self._record["parts"]]

    def finished(self, number: int) -> bool:
        """Whether a part is there, as it was written; one that is damaged is to be made again."""
        entry = self._record["finished"].get(str(number))
        if entry is None:
            return False
        checksums = Checksums({key: Written.from_json(one) for key, one in entry["tensors"].items()})
        try:
            for name in set(entry["files"].values()):
                with safe_open(self.path.with_name(name), framework="pt") as file:
                    if (file.metadata() or {}).get("save") != self._record["save"]:
                        raise ValueError("of another save")
                    for key in file.keys():  # noqa: SIM118  the handle is no mapping
                        checksums.check(key, file.get_tensor(key))
        except UNREADABLE:
            del self._record["finished"][str(number)]
            return False
        return True

    def put(self, number: int, blocks: Sequence[State], record: Mapping[str, Any]) -> None:
        """Write a finished part: its blocks, and what is to be known of it at the end."""
        if "save" not in self._record:
            self._record["data"] = self._data()
            own = {key: self._record[key] for key in ("settings", "plan", "budget", "parts", "data")}
            self._record["save"] = hashlib.sha256(json.dumps(own, sort_keys=True).encode()).hexdigest()[:32]
            # A finished file of the same run keeps its shards until this one is whole.
            there = (header_at(index_of(self.path)) or {}).get("save") == self._record["save"]
            self._record["names"] = "again" if there else ""
        nodes: list[dict[str, Any]] = []
        tensors: dict[str, Tensor] = {}
        for place, state in enumerate(blocks):
            node, own_tensors = pack(state, self._largest, f"{number}.{place}.")
            nodes.append(node.to_json())
            tensors |= own_tensors
        tag = hashlib.sha256(f"{self._record['save']} {number} {self._record['names']}".encode()).hexdigest()[:8]
        shards = cut(forms_of(tensors), self._largest)
        stem = f"{self.path.name.removesuffix(SUFFIX)}-{tag}"
        files = {
            self.path.with_name(f"{stem}-{i:05}-of-{len(shards):05}{SUFFIX}"): forms
            for i, forms in enumerate(shards, 1)
        }
        with new_files(files, {"format": SHARD_FORMAT, "save": self._record["save"]}, self._call) as write:
            for name, tensor in tensors.items():
                write(name, tensor)
        self._record["finished"][str(number)] = {
            "files": {key: file.name for file, forms in files.items() for key in forms}, "nodes": nodes,
            "tensors": {name: one._asdict() for name, one in written(tensors).items()}, "record": dict(record),
        }  # fmt: skip
        write_record(record_of(self.path), self._record)

    @property
    def records(self) -> list[dict[str, Any]]:
        """What `put` was given to be known of each part."""
        return [entry["record"] for entry in self._entries()]

    def _entries(self) -> list[dict[str, Any]]:
        return [self._record["finished"][str(number)] for number in range(len(self._record["parts"]))]

    def close(self, kind: str, space: ParameterSpace, metadata: Mapping[str, str]) -> None:
        """Write the index, an operator of this kind whose children are all parts' blocks, and remove the record."""
        entries = self._entries()
        place = {name: i for i, name in enumerate(space.names)}
        children = [Node.from_json(node) for entry in entries for node in entry["nodes"]]
        root = Node(kind, space.names, {}, {}, tuple(sorted(children, key=lambda node: place[node.names[0]])))
        files = {key: name for entry in entries for key, name in entry["files"].items()}
        tensors = {key: Written.from_json(one) for entry in entries for key, one in entry["tensors"].items()}
        header = described(root, space, metadata, SHARDED_VERSION) | {"save": self._record["save"]}
        replace_text(index_of(self.path), index_text(header, tensors, files))
        delete_replaced(self.path, [self.path.with_name(name) for name in files.values()], sharded=True)
        delete([record_of(self.path)])
