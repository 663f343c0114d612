"""What keeping factors and diagonals in a coarser dtype changes: errors against float64, and bytes.

    python -m examples.rounding

A network on 64 inputs, trained for a while, and its exact Fisher: sums in float64 or float32, kept in float64, float32
or bfloat16. Everything is compared with float64 sums in float64. Prints a table in Markdown.
"""

from __future__ import annotations

import copy
import itertools

import torch
from torch import Tensor, nn

import fisherkit as fk

WIDTHS = (64, 96, 48, 10)
EXAMPLES, QUERIES = 500, 20
DAMPINGS = (1e-2, 1e-4)
"""Times the mean eigenvalue."""


def trained() -> tuple[nn.Module, Tensor, Tensor]:
    """A network in float64 and the data that it was trained on, which have something to be learnt."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(EXAMPLES, WIDTHS[0], generator=generator, dtype=torch.float64)
    x = x * torch.linspace(2, 0.1, WIDTHS[0], dtype=torch.float64)
    y = (x @ torch.randn(WIDTHS[0], WIDTHS[-1], generator=generator, dtype=torch.float64)).argmax(1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layers = [part for i, o in itertools.pairwise(WIDTHS) for part in (nn.Linear(i, o), nn.Tanh())]
        model = nn.Sequential(*layers[:-1]).double()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(100):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    return model, x, y


def errors(structure: str, sums: torch.dtype, kept: torch.dtype | None) -> tuple[float, list[float]]:
    """Bytes relative to float64, and relative errors of F, of solves, and of influence scores."""
    model, x, y = trained()
    whole = fk.ExactFisher(model, (x, y), structure=structure)
    narrow, data = copy.deepcopy(model).to(sums), (x.to(sums), y)
    fisher = fk.ExactFisher(narrow, data, structure=structure, dtype=kept)
    v = torch.randn(whole.size, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found = [_relative(fisher @ v.to(sums), whole @ v)]
    for scale in DAMPINGS:
        damping = fk.RelativeDamping(scale)
        found.append(_relative(fisher.solve(v.to(sums), damping=damping), whole.solve(v, damping=damping)))
    scores = [
        fk.influence.InfluenceScores(f, m, damping=fk.RelativeDamping(DAMPINGS[0])).scores(
            (d[0][:QUERIES], d[1][:QUERIES]), d
        )
        for f, m, d in ((fisher, narrow, data), (whole, model, (x, y)))
    ]
    return fisher.nbytes / whole.nbytes, [*found, _relative(*scores)]


def _relative(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm())


def main() -> None:
    """Print the table."""
    solves = (f"solve, λ = {scale:g} mean eigenvalues" for scale in DAMPINGS)
    titles = ("structure", "sums", "kept", "bytes", "F", *solves, "scores")
    print("| " + " | ".join(titles) + " |")
    print("|" + "---|" * len(titles))
    for structure in ("diagonal", "kfac", "ekfac"):
        for sums in (torch.float64, torch.float32):
            for kept in (None, torch.float32, torch.bfloat16):
                if kept is sums or (kept is None and sums is torch.float64):
                    continue
                share, found = errors(structure, sums, kept)
                names = [str(dtype).removeprefix("torch.") for dtype in (sums, kept or sums)]
                print(f"| {structure} | {' | '.join(names)} | {share:.2f} | {' | '.join(f'{e:.0e}' for e in found)} |")


if __name__ == "__main__":
    main()
