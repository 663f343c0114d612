"""Where figures come from: hardware, versions, date, commit. Never a host's or a user's name."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path

import torch

from examples.benchmarks.measure import Record

PACKAGES = ("torch", "curvlinops-for-pytorch", "nngeometry", "backpack-for-pytorch", "numpy")


def environment(device: torch.device) -> Record:
    """Of this process on a device."""
    found: Record = {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": device.type,
        "system": platform.system(),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in PACKAGES},
        "date": datetime.datetime.now(tz=datetime.timezone.utc).date().isoformat(),
        "commit": _commit(),
    }
    if device.type == "cuda":
        found["accelerator"] = torch.cuda.get_device_name(device)
        found["cuda"] = torch.version.cuda
    return found


def _processor() -> str:
    """The model's name where the system tells, and the widest vector instructions that torch uses."""
    name = platform.processor() or platform.machine()
    report = Path("/proc/cpuinfo")
    if report.exists():
        for line in report.read_text().splitlines():
            if line.startswith("model name"):
                name = line.partition(":")[2].strip()
                break
    return f"{name}, {torch.backends.cpu.get_cpu_capability()}"


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _commit() -> str | None:
    """The short hash, with a plus if tracked files differ from it; None outside a git checkout."""
    root = Path(__file__).parent
    try:
        short = _git(root, "rev-parse", "--short", "HEAD")
        return short + ("+" if _git(root, "status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def _git(root: Path, *arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, check=True).stdout.strip()
