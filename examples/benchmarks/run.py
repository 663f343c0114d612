"""The command: measure, print the tables, write results, pictures and, if asked, the docs page."""

from __future__ import annotations

import argparse
import gc
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import torch

import fisherkit as fk
from examples.benchmarks import report
from examples.benchmarks import results as results_file
from examples.benchmarks.accuracy import accuracy, tf32
from examples.benchmarks.choice import compare
from examples.benchmarks.contestants import Case, DisagreementError
from examples.benchmarks.environment import environment
from examples.benchmarks.fixed import measure_fixed
from examples.benchmarks.influence import SIZES, measure_influence
from examples.benchmarks.language import SIZES as LANGUAGE_SIZES
from examples.benchmarks.language import measure_language
from examples.benchmarks.measure import Record, Settings, judge, measure
from examples.benchmarks.memory import measure_memory
from examples.benchmarks.operations import OPERATIONS, Cell, cells
from examples.benchmarks.pictures import draw
from examples.benchmarks.roofline import machine_rates, roofline
from examples.benchmarks.steps import measure_steps
from examples.benchmarks.workloads import FULL, TINY, Workload, language
from fisherkit.memory import available_memory

ROOT = Path(__file__).parents[2]
PAGE, ASSETS = ROOT / "docs" / "results" / "benchmarks.md", ROOT / "docs" / "assets" / "benchmarks"
PARTS = ("operations", "memory", "roofline", "choice", "accuracy", "steps", "influence", "fixed", "language")
CHOICES = {"W1": (fk.EmpiricalFisher, fk.ExactFisher), "W2": (fk.EmpiricalFisher,), "W3": (fk.EmpiricalFisher,)}
"""Kinds that the cost model is tried on."""


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Options."""
    parser = argparse.ArgumentParser(prog="python -m examples.benchmarks", description=__doc__)
    add = parser.add_argument
    add("--workload", nargs="+", choices=list(FULL), default=list(FULL), help="which (default: all)")
    add("--operation", nargs="+", choices=list(OPERATIONS), default=None, help="which (default: all)")
    add("--part", nargs="+", choices=PARTS, default=list(PARTS), help="which (default: all)")
    add("--rounds", type=int, default=5, help="how often everybody is timed (default: 5; at least 3)")
    add("--slow", type=float, default=5.0, help="seconds; who takes longer is timed once (default: 5)")
    add("--patience", type=float, default=90.0, help="seconds; who takes longer is not waited for (default: 90)")
    add("--device", choices=("cpu", "cuda"), default="cpu")
    add("--threads", type=int, default=None, help="of torch (default: as torch has it, one a core)")
    add("--size", choices=list(LANGUAGE_SIZES), default="full", help="of the language model (default: full)")
    add("--vocabulary", type=int, default=8192, help="of W4 (default: 8192)")
    add("--out", type=Path, default=Path("benchmarks"), help="folder for results and pictures (default: benchmarks)")
    add("--keep", action="store_true", help="add to the results that are there, measured on the same machine")
    add("--tiny", action="store_true", help="tiny sizes: does everything work? The figures mean nothing.")
    add("--docs", action="store_true", help="also update docs/results/benchmarks.md from the results")
    add("--remark", default="", help="a sentence shown with the results, such as what else the machine did")
    add("--report", action="store_true", help="measure nothing: print, draw and, with --docs, write what is there")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: this torch sees no CUDA device; leave the option out to measure on the CPU")
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the suite."""
    options = parse(arguments)
    torch.set_num_threads(options.threads or torch.get_num_threads())
    device = torch.device(options.device)
    path = options.out / "results.json"
    if options.report:
        found = results_file.read(path)
        found["settings"] |= {"remark": options.remark} if options.remark else {}
        finish(found, options)
        return
    settings = Settings(device, max(3, options.rounds), options.slow, options.patience)
    workloads = {name: _workload(name, options).to(device) for name in options.workload}
    now, how = environment(device), _described(settings, options)
    results = results_file.empty(now, how)
    if options.keep and path.exists():
        old = results_file.read(path)
        if set(options.part) <= set(results_file.OWN):
            results, how = old, old["settings"]
        else:
            try:
                results = results_file.continued(old, now, how)
            except ValueError as error:
                sys.exit(str(error))
    how["titles"] = results["settings"].get("titles", {}) | {n: w.title for n, w in workloads.items()}
    results["settings"] = how
    gc.collect()
    gc.freeze()  # everything imported by now: collections between runs then take no time
    try:
        with _limited_memory(device), tf32(False):
            for name, workload in workloads.items():
                for part in (p for p in PARTS_RUN if p in options.part):
                    PARTS_RUN[part](name, workload, settings, options, results)
                    results_file.write(path, results)
            for record in measure_fixed(settings) if "fixed" in options.part else ():
                results_file.put(results, "fixed", {**record, "environment": now, "rounds": settings.rounds})
                results_file.write(path, results)
                _say(f"{record['what']}: {report.number(record['ratio'])} × the best peer")
            if "language" in options.part:
                _language(settings, options, results, now)
                results_file.write(path, results)
    except DisagreementError as error:
        sys.exit(f"stopped, because a result is wrong: {error}")
    finally:
        gc.unfreeze()
    finish(results, options)


def finish(results: Record, options: argparse.Namespace) -> None:
    """Judge, print, draw, write."""
    for record in results["cells"]:
        judge(record)  # anew: the targets may have changed since a kept cell was measured
    results_file.write(options.out / "results.json", results)
    for name in report.workloads(results):
        draw(results, name, options.out / f"bars-{name}.png")
    growth = (PAGE.parent / "growth.md").exists()
    body = report.sections(results, pictures=".", growth=growth)
    (options.out / "table.md").write_text("\n\n".join(body.values()) + "\n", "utf-8")
    print("\n" + report.text(results))
    if options.docs:
        ASSETS.mkdir(parents=True, exist_ok=True)
        for file in (options.out / "results.json", *options.out.glob("bars-W*.png")):
            shutil.copy(file, ASSETS)
        report.fill(PAGE, report.sections(results, pictures="../assets/benchmarks", growth=growth))
        print(f"\nupdated {PAGE.relative_to(ROOT)}")


def _workload(name: str, options: argparse.Namespace) -> Workload:
    if name == "W4" and not options.tiny:
        return language(vocabulary=options.vocabulary)
    return (TINY if options.tiny else FULL)[name]()


def _described(settings: Settings, options: argparse.Namespace) -> Record:
    return {**asdict(settings), "device": settings.device.type, "tiny": options.tiny, "remark": options.remark}


def _say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')}  {text}", flush=True)


# -- parts -------------------------------------------------------------------------------------------------------------


def _operations(
    name: str, workload: Workload, settings: Settings, options: argparse.Namespace, results: Record
) -> None:
    wanted = None if options.operation is None else frozenset(options.operation)
    failures: dict[str, list[Record]] = {}
    if workload.layered != workload.names:
        for cell in cells(Case(workload, "linear"), wanted):
            record = _cell(cell, settings)
            if "unit_seconds" in record:
                results_file.put(results, "cells", record)
                results_file.write(options.out / "results.json", results)
            else:  # nobody else can do part of it: say so beside the whole
                results_file.drop(results, "cells", record)
                failures[cell.name] = record["peers"]
    for cell in cells(Case(workload), wanted):
        record = _cell(cell, settings)
        record["peers"] += failures.get(cell.name, [])
        results_file.put(results, "cells", record)
        results_file.write(options.out / "results.json", results)  # what is measured is kept, whatever comes next


def _cell(cell: Cell, settings: Settings) -> Record:
    record = measure(cell, settings)
    done = [f"{p['name']} {report.number(p['units'])}" if "units" in p else f"{p['name']} –" for p in record["peers"]]
    ours = f"{report.number(record['units'])} u" if "units" in record else record.get("error", "–")
    _say(f"{cell.case.workload.name}  {report.title(record)}: {ours}" + (f"  ({', '.join(done)})" if done else ""))
    return record


def _memory(name: str, _w: Workload, settings: Settings, options: argparse.Namespace, results: Record) -> None:
    record = measure_memory(name, device=settings.device.type, tiny=options.tiny)
    results_file.put(results, "memory", record)
    _say(f"{name}  peak memory of rows and solve over a training step: {record['ratio']:.2f}")


def _roofline(name: str, workload: Workload, settings: Settings, options: argparse.Namespace, results: Record) -> None:
    if not results["machine"]:
        results["machine"] = machine_rates(settings.device, tiny=options.tiny)
    seconds = {
        r["operation"]: r["seconds"]
        for r in results["cells"]
        if r["workload"] == name and r["scope"] == "all" and "seconds" in r
    }
    for record in roofline(Case(workload), seconds, results["machine"]):
        results_file.put(results, "roofline", record)
    _say(f"{name}  roofline of {len(seconds)} operations")


def _choice(name: str, workload: Workload, settings: Settings, options: argparse.Namespace, results: Record) -> None:
    for kind in CHOICES.get(name, ()):
        record = compare(Case(workload), kind, settings.device, rounds=settings.rounds)
        results_file.put(results, "choice", record)
        _say(f"{name}  cost model, {record['kind']}: chosen over best {record['ratio']:.2f}")


def _accuracy(name: str, workload: Workload, settings: Settings, options: argparse.Namespace, results: Record) -> None:
    if name == "W4":
        return
    for record in accuracy(workload):
        results_file.put(results, "accuracy", record)
    _say(f"{name}  accuracy by precision")


def _steps(name: str, workload: Workload, settings: Settings, options: argparse.Namespace, results: Record) -> None:
    if name == "W4":
        return
    record = measure_steps(
        workload, settings.device, rounds=settings.rounds, slow=settings.slow, patience=settings.patience
    )
    results_file.put(results, "steps", record)
    _say(f"{name}  training steps: " + ", ".join(f"{n} {report.number(u)}" for n, u in record["units"].items()))


def _influence(name: str, _w: Workload, settings: Settings, options: argparse.Namespace, results: Record) -> None:
    if name not in SIZES:
        return
    record = measure_influence(
        name, device=settings.device.type, tiny=options.tiny, rounds=settings.rounds, slow=settings.slow,
        patience=settings.patience,
    )  # fmt: skip
    now = environment(settings.device)
    results_file.put(results, "influence", {**record, "environment": now, "rounds": settings.rounds})
    done = {n: f"{report.number(s['total'])} s" for n, s in record["seconds"].items()}
    _say(f"{name}  influence scores: " + ", ".join(f"{n} {s}" for n, s in {**record["errors"], **done}.items()))


def _language(settings: Settings, options: argparse.Namespace, results: Record, now: Record) -> None:
    record = measure_language(
        "tiny" if options.tiny else options.size, device=settings.device.type, rounds=settings.rounds,
        slow=settings.slow, patience=settings.patience,
    )  # fmt: skip
    results_file.put(results, "language", {**record, "environment": now, "rounds": settings.rounds})
    done = {n: f"{report.number(f['tokens'])} tokens a second" for n, f in record["figures"].items()}
    _say("language model: " + ", ".join(f"{n} {s}" for n, s in {**record["errors"], **done}.items()))


PARTS_RUN: dict[str, Callable[[str, Workload, Settings, argparse.Namespace, Record], None]] = {
    "operations": _operations, "memory": _memory, "roofline": _roofline, "choice": _choice, "accuracy": _accuracy,
    "steps": _steps, "influence": _influence,
}  # fmt: skip


@contextmanager
def _limited_memory(device: torch.device) -> Iterator[None]:
    """On the CPU, who asks for more memory than there is gets an error instead of ending the process."""
    if device.type != "cpu" or sys.platform != "linux":
        yield
        return
    import resource  # not on Windows

    before = resource.getrlimit(resource.RLIMIT_DATA)
    limit = int(0.9 * available_memory(device))
    limit = limit if before[1] == resource.RLIM_INFINITY else min(limit, before[1])
    resource.setrlimit(resource.RLIMIT_DATA, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, before)
