"""The results file: sections of records, each record with a key, so that a later run replaces what it measured anew."""

from __future__ import annotations

import json
from pathlib import Path

from examples.benchmarks.measure import Record

KEYS = {
    "cells": ("workload", "operation", "scope"),
    "memory": ("workload",),
    "roofline": ("workload", "operation"),
    "choice": ("workload", "kind"),
    "accuracy": ("workload", "precision", "device"),
    "steps": ("workload",),
    "influence": ("workload",),
    "fixed": ("what",),
    "language": ("size",),
}
"""Sections and what identifies a record in them."""

OWN = ("influence", "fixed", "language")
"""Sections whose records say themselves where they were measured, so that they stand beside figures of elsewhere."""

FREE = ("date", "commit", "patience", "remark")
"""What may differ between runs that are shown in one table."""


def empty(environment: Record, settings: Record) -> Record:
    """No results yet."""
    return {"environment": environment, "settings": settings, "machine": {}, **{section: [] for section in KEYS}}


def put(results: Record, section: str, record: Record) -> None:
    """Add a record, or replace the one with its key."""
    keys = KEYS[section]
    same = [all(old.get(k) == record.get(k) for k in keys) for old in results[section]]
    if True in same:
        results[section][same.index(True)] = record
    else:
        results[section].append(record)


def drop(results: Record, section: str, record: Record) -> None:
    """Remove the record with its key, if there is one."""
    keys = KEYS[section]
    results[section] = [old for old in results[section] if any(old.get(k) != record.get(k) for k in keys)]


def read(path: Path) -> Record:
    """From a file."""
    found: Record = json.loads(path.read_text("utf-8"))
    return {**{section: [] for section in KEYS}, **found}  # a file may be older than a section


def write(path: Path, results: Record) -> None:
    """To a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n", "utf-8")


def continued(old: Record, environment: Record, settings: Record) -> Record:
    """Old results to add to.

    Raises:
        ValueError: they were measured elsewhere, or otherwise.
    """
    for name, now in (("environment", environment), ("settings", settings)):
        then = old[name]
        differing = [k for k in now if k not in FREE and then.get(k) != now[k]]
        if differing:
            raise ValueError(
                f"--keep: {name} of the results that are there differs in {differing}: "
                f"{[then.get(k) for k in differing]} then, {[now[k] for k in differing]} now. "
                "Figures of one table must come from one machine: measure all of them, or into another --out."
            )
    return {**old, "environment": environment, "settings": {**old["settings"], **settings}}
