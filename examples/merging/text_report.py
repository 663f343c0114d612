"""The table of `examples.merging.text` in Markdown. Reads a summary alone."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import fmean
from typing import Any

from examples.merging.small_summary import Spread
from examples.shared.results import markdown


def report(found: Mapping[str, Any]) -> str:
    """Everything, for a page.

    Args:
        found: what `text.figures` returned.
    """
    return "\n\n".join((_what(found), _table(found), _residual(found)))


def _what(found: Mapping[str, Any]) -> str:
    tasks = "; ".join(f"{name}: {', '.join(labels)}" for name, labels in found["tasks"].items())
    trained = [record for seed in found["trained"] for name, record in seed.items() if name != "all"]
    counts = [record["examples"] for record in trained[: len(found["tasks"])]]
    e = found["environment"]
    return (
        f"MiniLM with a head of 10 classes, its last two layers, pooler and head fine-tuned on "
        f"{' / '.join(map(str, counts))} docstrings ({tasks}) to a training loss of "
        f"at most {max(r['loss'] for r in trained):.2g}; {len(found['trained'])} seeds. "
        f"{e['processor']}, {e['threads']} thread, torch {e['versions']['torch']}; {e['date']}."
    )


def _table(found: Mapping[str, Any]) -> str:
    """Held-out accuracy of every merged folder, by task and their mean; training accuracy beside it."""
    tasks = list(found["tasks"])
    own = [[seed[name]["accuracy"]["test"][place] for seed in found["trained"]] for place, name in enumerate(tasks)]
    rows = [("each model on its own task", *(str(Spread.of(one)) for one in own), _mean(own), "")]
    for name, cells in found["methods"].items():
        rows.append((name, *_row(cells)))
    rows.append(("trained on all tasks at once", *_row([seed["all"] for seed in found["trained"]])))
    return markdown(("held-out accuracy, %", *tasks, "mean", "training"), rows)


def _row(cells: list[Mapping[str, Any]]) -> list[str]:
    tests = [list(values) for values in zip(*(cell["accuracy"]["test"] for cell in cells), strict=True)]
    train = Spread.of([fmean(cell["accuracy"]["train"]) for cell in cells])
    return [*(str(Spread.of(values)) for values in tests), _mean(tests), str(train)]


def _mean(by_task: list[list[float]]) -> str:
    return str(Spread.of([fmean(values) for values in zip(*by_task, strict=True)]))


def _residual(found: Mapping[str, Any]) -> str:
    residuals = [c["residual"] for cells in found["methods"].values() for c in cells if c["residual"] is not None]
    return f"The largest relative residual of any block is {max(residuals, default=0.0):.1e}."
