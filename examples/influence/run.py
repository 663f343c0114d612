"""The command: retrain, score, compare. Owns options, files and the table; measures with `fisherkit`'s own tools."""

from __future__ import annotations

import argparse
import json
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from examples.influence.methods import FISHERS, methods
from examples.influence.outcomes import SCORED, accuracy, outcomes, scored_models
from examples.influence.settings import SETTINGS, Setting, tiny
from examples.paper.results import environment, markdown, read, write
from fisherkit import io
from fisherkit.influence.evaluation import average_scores, linear_datamodeling_score, noise_ceiling
from fisherkit.influence.evaluation.runs_file import fingerprint

MEASUREMENT = "loss"


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Options."""
    parser = argparse.ArgumentParser(prog="python -m examples.influence", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--setting", nargs="+", choices=list(SETTINGS), default=["digits-0", "digits-0.001"], help="which")
    add("--subsets", type=int, default=200, help="random halves (default: 200)")
    add("--seeds", type=int, default=10, help="trainings of each half (default: 10)")
    add("--method", nargs="+", choices=list(methods(1.0)), help="which scores (default: all)")
    add("--damping", nargs="+", type=float, default=[1.0], help="multiples of the mean eigenvalue (default: 1)")
    add("--out", type=Path, default=Path("influence"), help="folder for files (default: influence)")
    add("--threads", type=int, default=1, help="of torch (default: 1)")
    add("--only-retrain", action="store_true", help="no scores")
    add("--tiny", action="store_true", help="tiny sizes: does everything work? The figures mean nothing.")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run; what files already have is not computed again.

    Args:
        arguments: of the command line; None: the process's own.
    """
    options = parse(arguments)
    torch.set_num_threads(options.threads)
    options.out.mkdir(parents=True, exist_ok=True)
    for name in options.setting:
        setting = tiny(SETTINGS[name]()) if options.tiny else SETTINGS[name]()
        begin = time.perf_counter()
        runs = outcomes(setting, options.out, subsets=options.subsets, seeds=options.seeds, progress=True)
        ceiling = noise_ceiling(runs.outputs[MEASUREMENT])
        print(f"{setting.title}: retraining {time.perf_counter() - begin:.0f} s, noise ceiling {ceiling}", flush=True)
        if options.only_retrain:
            continue
        models = scored_models(setting)
        found: dict[str, Any] = {
            "title": setting.title, "environment": environment(), "tiny": options.tiny,
            "subsets": options.subsets, "seeds": options.seeds, "models": SCORED,
            "accuracy": accuracy(setting, models), "ceiling": [ceiling.mean, *ceiling.interval], "rows": [],
        }  # fmt: skip
        for method, damping in _chosen(options.method, options.damping):
            scores, seconds = _scores(setting, models, method, damping, options.out)
            lds = linear_datamodeling_score(scores, runs.masks, runs.outputs[MEASUREMENT])
            row = {
                "method": method, "damping": damping, "mean": lds.mean, "interval": lds.interval,
                "over_queries": lds.over_queries, "over_subsets": lds.over_cases, "seconds": seconds,
            }  # fmt: skip
            found["rows"].append(row)
            print(f"  {method}, damping {damping}: {lds}, {seconds:.1f} s a model", flush=True)
        path = options.out / f"{setting.name}.json"
        write(path, found)
        print(report(read(path)), flush=True)


def report(found: dict[str, Any]) -> str:
    """A setting's figures in Markdown."""
    rows = [
        [
            row["method"], "–" if row["damping"] is None else f"{row['damping']:g}", f"{row['mean']:.3f}",
            "{:.3f} to {:.3f}".format(*row["interval"]), f"{row['seconds']:.1f}",
        ]
        for row in found["rows"]
    ]  # fmt: skip
    ceiling = "{:.3f} ({:.3f} to {:.3f})".format(*found["ceiling"])
    return (
        f"{found['title']}: {found['subsets']} halves × {found['seeds']} seeds, scores of {found['models']} models, "
        f"query accuracy {found['accuracy']:.3f}, noise ceiling {ceiling}\n\n"
        + markdown(["method", "damping", "LDS", "95 % interval", "seconds a model"], rows)
    )


def _chosen(names: Sequence[str] | None, dampings: Sequence[float]) -> list[tuple[str, float | None]]:
    """Methods with their dampings; None for those that have none."""
    found: list[tuple[str, float | None]] = []
    for name in names or methods(1.0):
        found += [(name, damping) for damping in dampings] if name in FISHERS else [(name, None)]
    return found


def _scores(
    setting: Setting, models: Sequence[nn.Module], method: str, damping: float | None, folder: Path
) -> tuple[Tensor, float]:
    """Mean scores of the models and seconds a model, from their file if it is there and of the same models."""
    slug = re.sub(r"\W+", "-", method if damping is None else f"{method}-{damping:g}")
    path = folder / f"{setting.name}-{slug}.scores.safetensors"
    checksum = fingerprint([p for model in models for p in model.parameters()])
    if path.exists():
        header, tensors = io.read_tensors(path, "cpu", "scores", "examples.influence")
        if header.get("models") == checksum:
            return tensors["scores"], json.loads(header["seconds"])
    begin = time.perf_counter()
    function = methods(1.0 if damping is None else damping)[method]
    scores = average_scores([function(model, setting.train, setting.queries) for model in models])
    seconds = (time.perf_counter() - begin) / len(models)
    io.replace_file(path, {"scores": scores.contiguous()}, {"models": checksum, "seconds": json.dumps(seconds)})
    return scores, seconds
