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
from fisherkit.cli.command import Command
from fisherkit.cli.options import AsJson
from fisherkit.cli.text import pairs, table
from fisherkit.kinds import KINDS
from fisherkit.memory import available_memory
from fisherkit.structures import structures

EXTRAS = {
    "demo": ("matplotlib", "scikit-learn"),
    "hf": ("transformers",),
    "lightning": ("lightning",),
    "avalanche": ("avalanche-lib",),
}


@dataclass(frozen=True)
class Info:
    """Show versions, devices, memory, and which kinds and structures there are."""

    as_json: AsJson = False

    def run(self) -> None:
        """Collect and print."""
        found = collect()
        typer.echo(json.dumps(found, indent=2, ensure_ascii=False) if self.as_json else as_text(found))


INFO = Command(
    Info,
    "Versions, devices, memory, kinds and structures.",
    ("fisherkit info", "fisherkit info --json > info.json"),
)


def collect() -> dict[str, Any]:
    """All that the command shows, ready for JSON."""
    gpus = [torch.device("cuda", i) for i in range(torch.cuda.device_count())]
    devices = [{"name": "cpu", "description": f"{torch.get_num_threads()} threads"}]
    devices += [{"name": str(gpu), "description": torch.cuda.get_device_name(gpu)} for gpu in gpus]
    return {
        "fisherkit": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "platform": platform.platform(terse=True),
        "threads": torch.get_num_threads(),
        "devices": [
            {**device, "available_bytes": available_memory(torch.device(device["name"]))} for device in devices
        ],
        "extras": {extra: {name: _version(name) for name in names} for extra, names in EXTRAS.items()},
        "kinds": {name: {"class": kind.__name__, "meaning": _first_line(kind)} for name, kind in KINDS.items()},
        "structures": {name: structure.meaning for name, structure in structures().items()},
    }


def as_text(found: dict[str, Any]) -> str:
    """What was collected, for people."""
    versions = [(key, found[key]) for key in ("fisherkit", "python", "torch", "platform")]
    versions += [
        (device["name"], f"{device['description']}, {device['available_bytes'] / 1e9:.1f} GB available")
        for device in found["devices"]
    ]
    versions += [
        (f"[{extra}]", ", ".join(_state(*item) for item in names.items())) for extra, names in found["extras"].items()
    ]
    kinds = [(name, kind["class"], kind["meaning"]) for name, kind in found["kinds"].items()]
    return "\n\n".join(
        [
            pairs(versions),
            table(("kind", "class", "meaning"), kinds, left=3),
            table(("structure", "meaning"), list(found["structures"].items()), left=2),
        ]
    )


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _state(name: str, version: str | None) -> str:
    return f"{name} {version}" if version else f"{name} not installed"


def _first_line(kind: type) -> str:
    return (inspect.getdoc(kind) or "").partition("\n")[0]
