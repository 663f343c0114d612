"""``fisherkit info``: what is installed, what the machine offers, and which kinds and structures there are."""

from __future__ import annotations

import importlib.metadata
import inspect
import json
import platform
from dataclasses import dataclass
from typing import Any

import torch
import typer

from fisherkit._version import __version__
from fisherkit.cli.options import AsJson
from fisherkit.cli.text import pairs, table
from fisherkit.kinds import KINDS
from fisherkit.memory import available_memory
from fisherkit.structures import structures
from fisherkit.words import readable

EXTRAS = {
    "demo": ("matplotlib", "scikit-learn"),
    "hf": ("transformers",),
    "lightning": ("lightning",),
    "avalanche": ("avalanche-lib",),
}


@dataclass(frozen=True)
class Info:
    """Show versions, devices, memory, kinds and structures.

    Examples:
        fisherkit info
        fisherkit info --json > info.json
    """

    as_json: AsJson = False

    def run(self) -> None:
        """Collect and print."""
        found = collect()
        typer.echo(json.dumps(found, indent=2, ensure_ascii=False) if self.as_json else as_text(found))


def environment() -> dict[str, Any]:
    """Versions and what they run on, for JSON."""
    return {
        "fisherkit": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "platform": platform.platform(terse=True),
        "threads": torch.get_num_threads(),
    }


def collect() -> dict[str, Any]:
    """All that the command shows, ready for JSON."""
    devices = {"cpu": f"{torch.get_num_threads()} threads"}
    devices |= {f"cuda:{i}": torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())}
    return environment() | {
        "devices": [
            {"name": name, "description": text, "available_bytes": available_memory(torch.device(name))}
            for name, text in devices.items()
        ],
        "extras": {extra: {name: _version(name) for name in names} for extra, names in EXTRAS.items()},
        "kinds": {
            name: {"class": kind.__name__, "meaning": (inspect.getdoc(kind) or "").partition("\n")[0]}
            for name, kind in KINDS.items()
        },
        "structures": {name: structure.meaning for name, structure in structures().items()},
    }


def as_text(found: dict[str, Any]) -> str:
    """What was collected, for people."""
    lines = {key: found[key] for key in ("fisherkit", "python", "torch", "platform")}
    for device in found["devices"]:
        lines[device["name"]] = f"{device['description']}, {readable(device['available_bytes'])} available"
    for extra, names in found["extras"].items():
        lines[f"[{extra}]"] = ", ".join(f"{name} {version or 'not installed'}" for name, version in names.items())
    rows = [(name, kind["class"], kind["meaning"]) for name, kind in found["kinds"].items()]
    kinds = table(("kind", "class", "meaning"), rows, left=3)
    meanings = table(("structure", "meaning"), list(found["structures"].items()), left=2)
    return f"{pairs(lines.items())}\n\n{kinds}\n\n{meanings}"


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None
