"""The paper's convergence theorems, checked on networks with more parameters than examples.

Along iEF's flow dθ/dt = −Jᵀ(JJᵀ)⁻¹s every loss falls by dℓ_n/dt = −‖∂ℓ_n/∂z_n‖², whatever the other examples do. For
a softmax with C classes and p the label's probability this lies between −(1 − p)² C/(C − 1) and −2(1 − p)², and so with
g(p) = 1/(1 − p) + log(p/(1 − p)) the growth g(p(t)) − g(p(0)) between t C/(C − 1) and 2t. Theorem 5.3 follows: p(t) > 1
− 2/(t + C₀ + 1), C₀ = g(p(0)). For one logit with a label g(p(t)) − C₀ is t; for ½‖z − y‖², the case m = 1 of theorem
5.4, ℓ_n(t) is e^(−2t) ℓ_n(0). Steps of a learning rate follow the flow only in the limit: every check is made at
several, and t is steps × rate.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from examples.demo.digits import Digits
from examples.paper.pictures_theorem import draw_theorem
from examples.paper.task import DAMPING, Task
from examples.shared.results import Figures, markdown
from fisherkit.randomness import untouched_rng

METHODS = ("iEF", "EF", "SGD")
SEED = 0
LIKELIHOODS = {"softmax": "categorical", "logit": "bernoulli", "one output": "gaussian", "ten outputs": "gaussian"}
"""The losses: of the ten classes; of one logit, the digit is odd; ½‖z − y‖² on indicators of either."""


@dataclass(frozen=True)
class Settings:
    """Sizes.

    Args:
        examples: N, all in every step.
        hidden: units of the one hidden layer.
        time: t at the end, for the softmax and the logit ...
        short_time: ... and for least squares, where e^(−2t) is soon nothing.
        early: an earlier t at which least squares is looked at too.
        rates: learning rates, halved from one to the next.
    """

    examples: int = 24
    hidden: int = 64
    time: float = 20.0
    short_time: float = 4.0
    early: float = 1.0
    rates: tuple[float, ...] = (0.1, 0.05, 0.025, 0.0125)

    def end(self, name: str) -> float:
        """t at the end for one of the `LIKELIHOODS`."""
        return self.short_time if LIKELIHOODS[name] == "gaussian" else self.time


TINY = Settings(examples=6, hidden=16, time=2.0, short_time=1.0, early=0.5, rates=(0.1, 0.05))


@dataclass(frozen=True)
class Run:
    """One method's way down.

    Args:
        time: t before each step and after the last ...
        losses: ... and ℓ_n there.
        asked: what iEF's steps asked of each example up to there, Σ rate · s_n.
        condition: of the Gram matrix with its diagonal scaled to 1, at the start and at the end.
        stopped: the loss was ten times the first one's, or no number, before t came to its end.
    """

    time: Float[Tensor, " K"]
    losses: Float[Tensor, "K N"]
    asked: Float[Tensor, "K N"]
    condition: tuple[float, float]
    stopped: bool


def run(out: Path, tiny: bool = False) -> Figures:
    """Follow every method on the three losses and draw ``theorem.png``.

    Args:
        out: folder of the picture.
        tiny: few examples and steps.

    Returns:
        The checks at every learning rate, and how the methods end at the smallest.
    """
    settings = TINY if tiny else Settings()
    ways = {
        name: [follow(task(name, settings), "iEF", rate, settings.end(name)) for rate in settings.rates]
        for name in LIKELIHOODS
    }
    finest, rate = {}, settings.rates[-1]
    for name in ("softmax", "ten outputs"):
        others = {m: follow(task(name, settings), m, rate, settings.end(name)) for m in ("EF", "SGD")}
        finest[name] = {"iEF": ways[name][-1], **others}
    draw_theorem(finest, out / "theorem.png")
    checks: dict[str, Callable[[Run], Figures]] = {
        "softmax": softmax_check,
        "logit": logit_check,
        "one output": partial(least_squares_check, early=settings.early),
        "ten outputs": partial(least_squares_check, early=settings.early),
    }
    return {
        "settings": {**vars(settings), "seed": SEED, "damping": DAMPING},
        "parameters": sum(p.numel() for p in task("softmax", settings).model.parameters()),
        "classes": 10,
        "iEF": {
            name: [{"rate": rate, **checks[name](way)} for rate, way in zip(settings.rates, ways[name], strict=True)]
            for name in LIKELIHOODS
        },
        "methods": {name: {m: ending(way, name) for m, way in found.items()} for name, found in finest.items()},
    }


def task(name: str, settings: Settings) -> Task:
    """Digits, and a fresh network with more parameters than examples, in float64.

    Args:
        name: one of the `LIKELIHOODS`.
        settings: sizes.
    """
    generator = torch.Generator().manual_seed(SEED)
    x, y = Digits.load(generator).batch(settings.examples, generator)
    odd, classes = (y % 2).double().unsqueeze(1), F.one_hot(y, 10).double()
    targets = {"softmax": y, "logit": odd, "one output": odd, "ten outputs": classes}
    outputs = 1 if name in {"logit", "one output"} else 10
    with untouched_rng([]):
        torch.manual_seed(SEED)
        layers = nn.Linear(64, settings.hidden), nn.Tanh(), nn.Linear(settings.hidden, outputs)
        model = nn.Sequential(*layers).double()
    return Task(model, x.double(), targets[name], LIKELIHOODS[name])


def follow(of: Task, method: str, rate: float, time: float) -> Run:
    """Full-batch steps θ ← θ − rate · direction until t = time.

    EF's and SGD's directions are scaled once, at the start, so that the total loss begins to fall as fast as iEF's; t
    then means the same for all three.

    Args:
        of: what to train, in place.
        method: "iEF", "EF" or "SGD".
        rate: t of a step.
        time: t at the end.
    """
    begin = condition(of)
    requested = float(of.asked().sum())
    scale = {"iEF": 1.0, "EF": requested / len(of.inputs), "SGD": requested / float(of.gradient().square().sum())}
    losses, asked, stopped = [of.losses().detach()], [torch.zeros(len(of.inputs), dtype=torch.float64)], False
    for _ in range(round(time / rate)):
        asked.append(asked[-1] + rate * of.asked())
        of.step(of.direction(method), rate * scale[method])
        losses.append(of.losses().detach())
        total = float(losses[-1].sum())
        if not math.isfinite(total) or total > 10 * float(losses[0].sum()):
            stopped = True
            break
    return Run(
        rate * torch.arange(len(losses), dtype=torch.float64),
        torch.stack(losses),
        torch.stack(asked),
        (begin, math.nan if stopped else condition(of)),
        stopped,
    )


def condition(of: Task) -> float:
    """Condition number of JJᵀ with its diagonal scaled to 1: finite means that its rank is full."""
    gram = of.gram()
    scale = gram.diagonal().rsqrt()
    return float(torch.linalg.cond(scale.unsqueeze(1) * gram * scale))


# -- checks ------------------------------------------------------------------------------------------------------------


def transformed(losses: Tensor) -> Tensor:
    """g(p) = 1/(1 − p) + log(p/(1 − p)) of p = e^(−ℓ)."""
    rest = -torch.expm1(-losses)
    return 1 / rest - losses - rest.log()


def margins(way: Run) -> Float[Tensor, "K N"]:
    """p(t) − (1 − 2/(t + C₀ + 1)); NaN where t + C₀ + 1 ≤ 0, where the theorem says nothing."""
    x = way.time.unsqueeze(1) + transformed(way.losses[0]) + 1
    margin = (-way.losses).exp() - (1 - 2 / x)
    return margin.masked_fill(x <= 0, math.nan)


def softmax_check(way: Run) -> Figures:
    """Theorem 5.3, the two-sided estimate behind it, and what the steps' curvature did to the losses."""
    margin = margins(way)
    known = margin[~margin.isnan()]
    return {
        "steps": len(way.time) - 1,
        "smallest margin": float(known.min()),
        "violations": int((known <= 0).sum()),
        "checked": known.numel(),
        "gap to what was asked": float((way.losses[0] - way.losses - way.asked).abs().max()),
        **logit_check(way),
    }


def logit_check(way: Run) -> Figures:
    """(g(p(t)) − C₀)/t, least and largest."""
    speed = (transformed(way.losses[1:]) - transformed(way.losses[0])) / way.time[1:].unsqueeze(1)
    return {"speed of g": [float(speed.min()), float(speed.max())], "condition": list(way.condition)}


def least_squares_check(way: Run, early: float) -> Figures:
    """ℓ_n(t) over e^(−2t) ℓ_n(0), its bound by theorem 5.4 and its value in continuous time, least and largest."""
    ratio = way.losses / ((-2 * way.time).exp().unsqueeze(1) * way.losses[0])
    first = ratio[way.time <= early + 1e-9]
    return {
        "early ratio": [float(first.min()), float(first.max())],
        "ratio": [float(ratio.min()), float(ratio.max())],
        "condition": list(way.condition),
    }


def ending(way: Run, name: str) -> Figures:
    """Where a method's way ends."""
    last = way.losses[-1]
    found = {"stopped": way.stopped, "time": float(way.time[-1]), "loss left": float(last.sum() / way.losses[0].sum())}
    found["largest share left"] = float((last / way.losses[0]).max())
    if name == "softmax":
        p, margin = (-last).exp(), margins(way)
        found |= {"p, worst": float(p.min()), "p, median": float(p.median())}
        found["below the bound"] = int((margin <= 0).any(0).sum())
    return found


# -- report ------------------------------------------------------------------------------------------------------------


def report(found: Figures) -> str:
    """The checks and endings as Markdown."""
    s, ief = found["settings"], found["iEF"]
    low, high = found["classes"] / (found["classes"] - 1), 2
    softmax = [
        [
            f"{c['rate']:g}", f"{c['steps']:,}", f"{c['violations']} of {c['checked']:,}",
            f"{c['smallest margin']:.3f}",            _range(c["speed of g"]), f"{c['gap to what was asked']:.2g}",
        ]
        for c in ief["softmax"]
    ]  # fmt: skip
    others = [
        [f"{a['rate']:g}", _range(a["speed of g"]), _range(b["ratio"]), _range(c["early ratio"]), _range(c["ratio"])]
        for a, b, c in zip(ief["logit"], ief["one output"], ief["ten outputs"], strict=True)
    ]
    return "\n\n".join(
        [
            f"{s['examples']} digits, {found['parameters']:,} parameters, float64, λ = {s['damping']:g}. Softmax to "
            f"t = {s['time']:g}; in continuous time (g(p(t)) − C₀)/t lies between {low:.3f} and {high}.",
            markdown(("rate", "steps", "violations of 5.3", "least margin", "(g(p(t)) − C₀)/t", "curvature"), softmax),
            f"One logit to t = {s['time']:g}, least squares to t = {s['short_time']:g}. In continuous time all are 1.",
            markdown(
                (
                    "rate", "logit: (g(p(t)) − C₀)/t", "one output: ℓ(t)/e^(−2t)ℓ(0)",
                    f"ten outputs, to t = {s['early']:g}", f"ten outputs, to t = {s['short_time']:g}",
                ),
                others,
            ),
            f"Side by side at rate {s['rates'][-1]:g}; the total loss begins to fall equally fast.",
            markdown(
                (
                    "softmax", "ends at t", "p, worst example", "p, median", "examples ever below 5.3",
                    "loss left", "most left of one",
                ),
                [_ending(m, found["methods"]["softmax"][m], s["examples"]) for m in METHODS],
            ),
            markdown(
                ("ten outputs", "ends at t", "loss left", "most left of one"),
                [_ending(m, found["methods"]["ten outputs"][m], s["examples"]) for m in METHODS],
            ),
        ]
    )  # fmt: skip


def _range(pair: tuple[float, float]) -> str:
    return f"{pair[0]:#.4g} to {pair[1]:#.4g}"


def _ending(method: str, found: Figures, examples: int) -> list[str]:
    cells = [method, f"{found['time']:.3g}" + (", diverged" if found["stopped"] else "")]
    if "p, worst" in found:
        cells += [f"{found['p, worst']:.3f}", f"{found['p, median']:.3f}", f"{found['below the bound']} of {examples}"]
    return [*cells, f"{found['loss left']:.3g}", f"{found['largest share left']:.3g}"]
