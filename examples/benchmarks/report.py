"""Results as text and as Markdown. Reads the results file alone; measures nothing."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from examples.benchmarks.influence import peer_of
from examples.benchmarks.language import STEP
from examples.benchmarks.measure import Record
from examples.benchmarks.operations import OPERATIONS, PEERS
from examples.benchmarks.ours import NAME

Table = tuple[Sequence[str], Sequence[Sequence[str]]]
ABSENT = "Not measured yet."
MET = {True: "yes", False: "**no**", None: ""}


def number(x: float) -> str:
    """Three digits or so."""
    if x >= 100:
        return f"{x:,.0f}"
    return f"{x:.1f}" if x >= 10 else f"{x:.2f}"


def markdown(table: Table) -> str:
    """A Markdown table, numbers to the right."""
    header, rows = table
    if not rows:
        return ABSENT
    rule = [":--", *["--:"] * (len(header) - 1)]
    return "\n".join("| " + " | ".join(row) + " |" for row in (header, rule, *rows))


def plain(table: Table) -> str:
    """The same for a terminal."""
    header, rows = table
    cells = [[cell.replace("**", "") for cell in row] for row in (header, *rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    lines = []
    for row in cells:
        first, *others = (
            cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        lines.append("  ".join([first, *others]).rstrip())
    return "\n".join(lines)


def title(record: Record) -> str:
    """Of an operation, with the scope where it is not everything."""
    name = OPERATIONS[record["operation"]].title
    return name if record.get("scope", "all") == "all" else f"{name}: linear layers alone"


class Notes:
    """Numbered notes under a table."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def mark(self, text: str) -> str:
        """The number of a note, the same for the same text."""
        if text not in self.texts:
            self.texts.append(text)
        return f"({self.texts.index(text) + 1})"

    def lines(self) -> str:
        """All of them."""
        return "\n".join(f"- ({i}) {text}" for i, text in enumerate(self.texts, 1))


def workload_table(results: Record, workload: str) -> tuple[Table, Notes]:
    """Medians in units of one gradient, ours and every peer's."""
    notes = Notes()
    rows = []
    order = list(OPERATIONS)
    records = [r for r in results["cells"] if r["workload"] == workload]
    for record in sorted(records, key=lambda r: (order.index(r["operation"]), r["scope"])):
        peers = {peer["name"]: peer for peer in record["peers"]}
        entries = [_entry(peers.get(name), name, notes) for name in PEERS]
        ratio = f"{number(record['ratio'])}×" if "ratio" in record else ""
        rows.append((
            title(record), _entry(record, NAME, notes), *entries, ratio, record.get("target", ""),
            MET[record.get("met")],
        ))  # fmt: skip
    return ((f"{workload}, in u", NAME, *PEERS, "best peer / ours", "target", "met"), rows), notes


def _entry(record: Record | None, name: str, notes: Notes) -> str:
    if record is None:
        return ""
    if "units" not in record:
        return f"– {notes.mark(f'{name}: {_code(record)}')}" if "error" in record else ""
    mark = ""
    if record.get("why"):
        bound = ", ".join(f"{value} {error:.1e}" for value, error in record["errors"].items())
        mark = " " + notes.mark(f"{name}: compared loosely ({bound}): {record['why']}")
    if record.get("rounds") == 1:
        mark += " " + notes.mark("timed once: slow")
    return number(record["units"]) + mark


def _code(record: Record) -> str:
    text = record["error"].replace("|", "/").replace("`", "'").replace("<", "‹").replace(">", "›")
    return re.sub(r"'?examples\.benchmarks\.workloads\.", "'", text)


def memory_table(results: Record) -> Table:
    """Peaks of rows and solve against one training step."""
    rows = [
        (r["workload"], f"{r['train_bytes'] / 1e6:,.0f} MB", f"{r['solve_bytes'] / 1e6:,.0f} MB", f"{r['ratio']:.2f}×",
         r.get("target", ""), MET[r.get("met")])
        for r in results["memory"]
    ]  # fmt: skip
    return ("workload", "training step", "rows and iEF solve", "ratio", "target", "met"), rows


def roofline_table(results: Record, workload: str) -> Table:
    """What our operations did, and how close to the machine's rates."""
    rows = []
    for r in results["roofline"]:
        if r["workload"] == workload:
            bound = max(r["arithmetic_seconds"], r["transfer_seconds"])
            rows.append((
                OPERATIONS[r["operation"]].title, f"{r['float32_operations'] / 1e9:,.2f}",
                f"{r['float64_operations'] / 1e9:,.2f}", f"{r['bytes'] / 1e6:,.0f}", f"{1e3 * bound:,.1f}", r["bound"],
                f"{1e3 * r['seconds']:,.1f}", f"{100 * r['fraction']:.0f}%",
            ))  # fmt: skip
    header = (f"{workload}", "float32 Gflop", "float64 Gflop", "MB", "bound, ms", "by", "measured, ms", "reached")
    return header, rows


def choice_table(results: Record) -> Table:
    """The cost model against both forced choices."""
    rows = []
    for r in results["choice"]:
        seconds = [f"{1e3 * r['seconds'][n]:,.0f} ms" if n in r["seconds"] else "does not fit"
                   for n in ("chosen", "factored", "written out")]  # fmt: skip
        rows.append((f"{r['workload']}, {r['kind']}", *seconds, f"{r['ratio']:.2f}", r["target"], MET[r["met"]]))
    return ("", "chosen", "all factored", "all written out", "chosen / best", "target", "met"), rows


def steps_table(results: Record) -> Table:
    """Training steps in steps of SGD."""
    records = sorted(results["steps"], key=lambda r: r["workload"])
    rows = []
    for name in dict.fromkeys(name for r in records for name in [*r["units"], *r["errors"]]):
        entries = []
        for r in records:
            target = r["targets"].get(name)
            judged = "" if target is None else f" (≤ {target:g}: {'yes' if r['met'][name] else '**no**'})"
            failed = f"– {r['errors'].get(name, '')}"
            entries.append(number(r["units"][name]) + judged if name in r["units"] else failed)
        rows.append((name, *entries))
    return ("one step, in steps of SGD", *(r["workload"] for r in records)), rows


def fixed_table(results: Record) -> Table:
    """Builds and steps of a small network, in milliseconds."""
    names = list(dict.fromkeys(name for r in results["fixed"] for name in r["seconds"]))
    rows = [
        (r["what"], *(f"{1e3 * r['seconds'][n]:.2f}" if n in r["seconds"] else "" for n in names), number(r["ratio"]))
        for r in results["fixed"]
    ]
    return ("small network, ms", *names, "ours / best peer"), rows


def fixed_section(results: Record) -> str:
    """The table and where it was measured."""
    if not results["fixed"]:
        return ABSENT
    return f"{markdown(fixed_table(results))}\n\n- {_own_environment(results['fixed'][0])}"


def _own_environment(record: Record) -> str:
    """Where a record's figures come from, in a line."""
    e = record["environment"]
    return (
        f"{e['processor']}, {e['cores']} cores, {e['threads']} thread{'s' * (e['threads'] > 1)}; torch "
        f"{e['versions']['torch']}; {e['date']}, median of {record['rounds']} rounds."
    )


def influence_table(results: Record) -> tuple[Table, Notes]:
    """Fit and scores of everybody in seconds, beside the peer's."""
    notes, rows = Notes(), []
    for r in sorted(results["influence"], key=lambda r: r["workload"]):
        for name in [*r["seconds"], *r["errors"]]:
            full = f"{r['workload']}, " + (name if name.startswith("kronfluence") else f"{NAME} {name}")
            if name in r["errors"]:
                rows.append((full, f"– {notes.mark(r['errors'][name])}", *[""] * 7))
                continue
            s, target = r["seconds"][name], r["targets"].get(name)
            once = " " + notes.mark("timed once: slow") if s["rounds"] == 1 else ""
            rows.append((
                full, number(s["fit"]), number(s["score"]), number(s["total"]) + once, f"{s['peak'] / 1e6:,.0f} MB",
                f"{number(r['ratios'][name])}×" if name in r["ratios"] else "",
                "" if target is None else f"≥ {target:g}×",
                MET[r["met"].get(name)],
                f"{r['correlations'][name]:.3f}" if name in r["correlations"] else "",
            ))  # fmt: skip
    header = (
        "", "fit, s", "scores, s", "together, s", "peak memory", "kronfluence EKFAC / ours", "target", "met",
        "correlation with it",
    )  # fmt: skip
    return (header, rows), notes


def influence_section(results: Record) -> str:
    """The table, what it is of, and how far both sides were compared."""
    if not results["influence"]:
        return ABSENT
    table, notes = influence_table(results)
    said = []
    for r in sorted(results["influence"], key=lambda r: r["workload"]):
        text = f"{r['workload']}: {r['examples']:,} training examples, {r['queries']} queries"
        if "difference" in r:
            text += f"; from observed labels, the EKFAC scores of {r['peer']} and ours differ by {r['difference']:.0e}"
        said.append(f"- {text}.\n- {_own_environment(r)}")
    return "\n\n".join(filter(None, [markdown(table), notes.lines(), "\n".join(said)]))


def language_table(results: Record) -> tuple[Table, Notes]:
    """Fits to the language model: tokens a second and peak memory, beside the peers' and a training step's."""
    notes, rows = Notes(), []
    for r in results["language"]:
        for name in [*r["figures"], *r["errors"]]:
            full = f"{r['size']}, " + (name if peer_of(name) or name == STEP else f"{NAME} {name}")
            if name in r["errors"]:
                rows.append((full, f"– {notes.mark(r['errors'][name])}", *[""] * 8))
                continue
            f = r["figures"][name]
            once = " " + notes.mark("timed once: slow") if f["rounds"] == 1 else ""
            both = " and 1×" if "bergson" in f else ""
            target = "" if "met" not in f else f"≥ {f['target']:g}×{both}, ≤ {f['most_steps']:g} steps"
            rows.append((
                full, number(f["fit"]) + once, number(f["tokens"]), f"{f['peak'] / 1e6:,.0f} MB",
                *(f"{f[key]:.2f}×" if key in f else "" for key in ("speed", "bergson", "steps", "memory")), target,
                MET[f.get("met")],
            ))  # fmt: skip
    header = (
        "", "fit, s", "tokens a second", "peak memory", "speed over kronfluence", "over bergson",
        "peak over a training step", "peak over kronfluence", "target", "met",
    )  # fmt: skip
    return (header, rows), notes


def language_section(results: Record) -> str:
    """The table, what it is of, and how far both sides were compared."""
    if not results["language"]:
        return ABSENT
    table, notes = language_table(results)
    said = []
    for r in results["language"]:
        text = (
            f"{r['size']}: {r['layers']} blocks, width {r['width']}, vocabulary {r['vocabulary']:,}, {r['sequences']} "
            f"sequences of {r['positions']} tokens, {r['batch']} in a batch"
        )
        for peer in r["peers"]:
            if "difference" in peer:
                text += f"; products of {peer['peer']} and ours differ by at most {peer['difference']:.0e}"
        said.append(f"- {text}.\n- {_own_environment(r)}")
    return "\n\n".join(filter(None, [markdown(table), notes.lines(), "\n".join(said)]))


def accuracy_table(results: Record) -> Table:
    """Relative errors against float64."""
    names = next((list(r["errors"]) for r in results["accuracy"] if "errors" in r), [])
    rows = []
    for r in results["accuracy"]:
        errors = [f"{r['errors'][n]:.0e}" if "errors" in r else "–" for n in names]
        rows.append((f"{r['workload']}, {r['precision']}, {r['device']}", *errors))
    return ("", *names), rows


def environment_lines(results: Record) -> str:
    """Where the figures come from."""
    e, s = results["environment"], results["settings"]
    versions = ", ".join(f"{name} {version}" for name, version in e["versions"].items())
    rates = results["machine"]
    lines = [
        f"{e['processor']}, {e['cores']} cores, {e['threads']} threads; {e.get('accelerator', 'no accelerator')}.",
        f"{e['system']}, Python {e['python']}, {versions}.",
        f"{e['date']}, median of {s['rounds']} rounds.",
    ]
    if s.get("remark"):
        lines.append(s["remark"])
    if rates:
        lines.append(
            f"Measured rates: matmul {rates['float32_flops'] / 1e9:,.0f} Gflop/s in float32 and "
            f"{rates['float64_flops'] / 1e9:,.0f} in float64, copy {rates['bytes_per_second'] / 1e9:,.1f} GB/s."
        )
    return "\n".join(f"- {line}" for line in lines)


def workloads(results: Record) -> list[str]:
    """Names of those that were measured."""
    return sorted({record["workload"] for record in results["cells"]})


def sections(results: Record, *, pictures: str | None = None, growth: bool = False) -> dict[str, str]:
    """Markdown by name of section.

    Args:
        results: of a results file.
        pictures: the folder that pictures are in, relative to the page; None for no pictures.
        growth: whether the page on growth exists.
    """
    titles, found = results["settings"]["titles"], {"environment": environment_lines(results)}
    parts = []
    for name in workloads(results):
        table, notes = workload_table(results, name)
        unit = next(
            (r["unit_seconds"] for r in results["cells"] if r["workload"] == name and "unit_seconds" in r), None
        )
        head = f"### {name}: {titles[name]}\n\nOne unit is {1e3 * unit:.0f} ms here." if unit else f"### {name}"
        picture = f"\n\n![{name} in units of one gradient]({pictures}/bars-{name}.png)" if pictures else ""
        parts.append("\n\n".join(filter(None, [head + picture, markdown(table), notes.lines()])))
    found["workloads"] = "\n\n".join(parts)
    found["memory"] = markdown(memory_table(results))
    rooflines = [roofline_table(results, name) for name in workloads(results)]
    found["roofline"] = "\n\n".join(markdown(table) for table in rooflines if table[1]) or ABSENT
    found["choice"] = markdown(choice_table(results))
    found["accuracy"] = markdown(accuracy_table(results))
    found["steps"] = markdown(steps_table(results))
    found["influence"] = influence_section(results)
    found["fixed"] = fixed_section(results)
    found["language"] = language_section(results)
    link = "See [growth](growth.md)." if growth else ABSENT
    found["growth"] = link
    return found


def text(results: Record) -> str:
    """Everything for a terminal."""
    parts = [environment_lines(results)]
    for name in workloads(results):
        table, notes = workload_table(results, name)
        parts += [plain(table), notes.lines()]
    tables = [roofline_table(results, name) for name in workloads(results)]
    tables += [table(results) for table in (memory_table, choice_table, accuracy_table, steps_table, fixed_table)]
    parts += [plain(table) for table in tables if table[1]]
    for table, notes in (influence_table(results), language_table(results)):
        parts += [plain(table), notes.lines()] if table[1] else []
    return "\n\n".join(filter(None, parts))


def markers(name: str) -> tuple[str, str]:
    """What a section of the page stands between."""
    return f"<!-- {name}: written by run.py -->", f"<!-- end of {name} -->"


def fill(page: Path, found: dict[str, str]) -> None:
    """Write sections into a page, between their markers.

    Raises:
        ValueError: the page lacks a marker.
    """
    content = page.read_text("utf-8")
    for name, body in found.items():
        first, last = markers(name)
        if first not in content or last not in content:
            raise ValueError(f"{page.name} should have the lines {first!r} and {last!r}")
        before, _, rest = content.partition(first)
        content = f"{before}{first}\n\n{body}\n\n{last}{rest.partition(last)[2]}"
    page.write_text(content, "utf-8")
