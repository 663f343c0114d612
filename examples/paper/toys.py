"""The paper's toys: two data and two parameters, so that an update is an arrow in the plane.

Figure 1 is least squares on (0, 0) and (1, 0); figure 4 is logistic regression on x = 0 and 2, here with the labels 0
and 1: a hard label each, so that one example can be fit while the other is not. Owns fields, paths and the numbers
quoted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

import fisherkit as fk
from examples.paper.pictures import draw_toy
from examples.paper.task import METHODS, Task
from examples.shared.results import Figures, markdown
from fisherkit.evaluation import approximation_quality

SHOWN = ("SGD", "EF", "iEF", "NGD")
Point = tuple[float, float]


@dataclass(frozen=True)
class Toy:
    """A regression of two data on a line.

    Args:
        name: of its files and figures.
        title: of its picture.
        inputs: x of the two.
        targets: y of the two.
        likelihood: "gaussian" or "bernoulli".
        window: of the picture: θ₀ from, to, θ₁ from, to.
        points: θ at which numbers are quoted.
        starts: of paths, or of those that are drawn.
        length: of a path in the plane.
    """

    name: str
    title: str
    inputs: Point
    targets: Point
    likelihood: str
    window: tuple[float, float, float, float]
    points: tuple[Point, ...]
    starts: tuple[Point, ...]
    length: float

    def at(self, theta: Sequence[float]) -> Task:
        """The task at θ = (θ₀, θ₁)."""
        model = nn.Linear(1, 1).double()
        with torch.no_grad():
            model.bias.fill_(theta[0])
            model.weight.fill_(theta[1])
        x, y = (torch.tensor(pair, dtype=torch.float64).unsqueeze(1) for pair in (self.inputs, self.targets))
        return Task(model, x, y, self.likelihood)


LEAST_SQUARES = Toy(
    "least-squares", "Least squares", (0.0, 1.0), (0.0, 0.0), "gaussian",
    window=(-1.5, 1.5, -2.0, 2.0), points=((1.0, -0.9), (0.5, 1.0)),
    starts=((1.0, -0.9), (0.5, 1.0), (-1.3, 0.5)), length=6.0,
)  # fmt: skip
LOGISTIC = Toy(
    "logistic", "Logistic regression", (0.0, 2.0), (0.0, 1.0), "bernoulli",
    window=(-5.0, 2.0, -2.0, 4.0), points=((-2.0, 0.0), (-1.0, 2.0), (1.0, 1.0)),
    starts=((-2.0, 0.0), (1.0, 1.0), (-4.0, 1.0)), length=4.0,
)  # fmt: skip


@dataclass(frozen=True)
class Drawing:
    """What a picture shows of one method.

    Args:
        places: θ of the arrows.
        arrows: unit vectors, the way the method goes.
        paths: θ along each path.
        ends: whether the path came to where the loss cannot fall along its direction any more.
    """

    places: list[Point]
    arrows: list[Point]
    paths: list[list[Point]]
    ends: list[bool]


def run(out: Path, tiny: bool = False) -> Figures:
    """Measure both toys and draw ``toy-least-squares.png`` and ``toy-logistic.png``.

    Args:
        out: folder of the pictures.
        tiny: a coarse grid and long steps.

    Returns:
        For each toy, its numbers at the quoted points, over the grid and at the ends of paths.
    """
    cells, step = (3, 0.25) if tiny else (12, 0.01)
    found: Figures = {}
    for toy in (LEAST_SQUARES, LOGISTIC):
        drawings, ends = {}, []
        for method in SHOWN:
            paths = [follow(toy, method, start, step) for start in toy.starts]
            places = grid(toy, cells)
            arrows = [_unit(way(toy, method, place)) for place in places]
            drawings[method] = Drawing(places, arrows, [p for p, _ in paths], [ended for _, ended in paths])
            ends += [_path_end(toy, method, path, ended) for path, ended in paths]
        draw_toy(toy, drawings, out / f"toy-{toy.name}.png")
        found[toy.name] = {"points": [at_point(toy, p) for p in toy.points], "grid": on_grid(toy, cells), "paths": ends}
    return found


def way(toy: Toy, method: str, theta: Sequence[float]) -> Point:
    """The way a method goes from θ, as (θ₀, θ₁); its length is that of a step with learning rate 1."""
    slope, intercept = (-toy.at(theta).direction(method)).tolist()
    return intercept, slope


def grid(toy: Toy, cells: int) -> list[Point]:
    """Centres of cells × cells rectangles of the window."""
    left, right, low, high = toy.window
    at = [(i + 0.5) / cells for i in range(cells)]
    return [(left + (right - left) * i, low + (high - low) * j) for i in at for j in at]


def follow(toy: Toy, method: str, start: Point, step: float) -> tuple[list[Point], bool]:
    """The curve through start along which the method goes, by short steps of equal length.

    Returns:
        θ along it, until the curve has the toy's length or a step no longer reduces the loss, and whether the latter.
    """
    path = [start]
    loss = total_loss(toy, start)
    while (len(path) - 1) * step < toy.length:
        ahead = _unit(way(toy, method, path[-1]))
        place = (path[-1][0] + step * ahead[0], path[-1][1] + step * ahead[1])
        new = total_loss(toy, place)
        if not new < loss:
            return path, True
        path.append(place)
        loss = new
    return path, False


def total_loss(toy: Toy, theta: Sequence[float]) -> float:
    """L at θ."""
    return float(toy.at(theta).losses().detach().sum())


def at_point(toy: Toy, theta: Point) -> Figures:
    """γ/γ_SGD of every method at θ, and the share of the loss reduction that falls to the first example."""
    task = toy.at(theta)
    exact, gradient = task.fisher(fk.ExactFisher), task.gradient()
    updates = {method: task.direction(method) for method in METHODS}
    quality = approximation_quality(torch.stack(list(updates.values()), 1), exact, gradient)
    slopes = torch.stack([task.weighted_gradient(row) for row in torch.eye(2, dtype=torch.float64)])
    shares = {method: _share(slopes @ update) for method, update in updates.items()}
    return {
        "theta": theta,
        "losses": task.losses().tolist(),
        "quality": dict(zip(METHODS, (quality / quality[0]).tolist(), strict=True)),
        "share of the first": shares,
    }


def on_grid(toy: Toy, cells: int) -> Figures:
    """Largest distance of iEF's update from Gauss-Newton's and from NGD's, relative to the latter, over the grid."""
    worst = {"GN": 0.0, "NGD": 0.0}
    for place in grid(toy, cells):
        task = toy.at(place)
        ief = task.direction("iEF")
        for other in worst:
            expected = task.direction(other)
            worst[other] = max(worst[other], float((ief - expected).norm() / expected.norm()))
    return {"places": cells**2, "iEF from": worst}


def report(found: Figures) -> str:
    """The quoted numbers as Markdown."""
    parts = []
    for toy in (LEAST_SQUARES, LOGISTIC):
        at, paths = found[toy.name]["points"], found[toy.name]["paths"]
        quality = [
            [_named(p["theta"]), *(_named(p["losses"], 3).split(", ")), *(f"{p['quality'][m]:.3g}" for m in METHODS)]
            for p in at
        ]
        share = [[_named(p["theta"]), *(f"{p['share of the first'][m]:.3f}" for m in METHODS)] for p in at]
        left = [
            [_named(start), *(_left(p) for m in SHOWN for p in paths if p["method"] == m and p["start"] == list(start))]
            for start in toy.starts
        ]
        worst = found[toy.name]["grid"]
        parts += [
            f"**{toy.title}.** γ/γ_SGD; the two losses in front:",
            markdown(("θ₀, θ₁", "ℓ₁", "ℓ₂", *METHODS), quality),
            "Share of the loss reduction that an update asks of the first example:",
            markdown(("θ₀, θ₁", *METHODS), share),
            f"Loss left after a path of length {toy.length:g}; a star where it cannot go on before that:",
            markdown(("from θ₀, θ₁", *SHOWN), left),
            f"Over {worst['places']} places of the window, iEF's update differs from Gauss-Newton's by "
            f"{worst['iEF from']['GN']:.1e} of its norm at most, and from NGD's by {worst['iEF from']['NGD']:.1e}.",
        ]
    return "\n\n".join(parts)


def _path_end(toy: Toy, method: str, path: list[Point], ended: bool) -> Figures:
    """Where a path is at its end, with θ and the losses in proportion to the loss at its start."""
    whole = total_loss(toy, path[0])
    left = (toy.at(path[-1]).losses() / whole).tolist()
    return {"method": method, "start": list(path[0]), "end": list(path[-1]), "left": left, "stopped": ended}


def _left(path: Figures) -> str:
    return f"{sum(path['left']):.2%}" + ("*" if path["stopped"] else "")


def _named(numbers: Sequence[float], digits: int = 2) -> str:
    return ", ".join(f"{x:.{digits}g}" for x in numbers)


def _unit(vector: Point) -> Point:
    norm = (vector[0] ** 2 + vector[1] ** 2) ** 0.5
    return (vector[0] / norm, vector[1] / norm) if norm > 0 else (0.0, 0.0)


def _share(change: Tensor) -> float:
    return float(change[0] / change.sum())
