"""Parameters that act on the outputs behind autograd's back.

A custom ``autograd.Function`` that calls layers inside, as checkpoints and reversible blocks of other libraries do,
shows none of their parameters: they would count as unused, and their rows as zeros. Owns telling the two apart, and
telling from a graph that nothing else reaches a parameter.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import Node, get_gradient_edge

from fisherkit.data import Batch
from fisherkit.errors import ModelError, listed
from fisherkit.rows.differentiable import functional_call, kept_whole, version_of
from fisherkit.rows.rules import Use


def refuse_hidden(model: nn.Module, unused: Mapping[str, Tensor], batch: Batch, z: Tensor) -> None:
    """Refuse parameters without a gradient that a custom function's outputs change with."""
    if not custom_functions(graph_of(z.grad_fn)):
        return
    generator = torch.Generator().manual_seed(0)
    moved = {
        name: p.detach() + (0.1 + p.detach().abs()) * torch.randn(p.shape, generator=generator).to(p)
        for name, p in unused.items()
    }
    with kept_whole(model):
        again = batch.call(lambda *args, **kwargs: functional_call(model, moved, args, kwargs)).detach()
    if again.shape == z.shape and bool((again - z).norm() <= 1e-6 * z.norm()):
        return
    raise ModelError(
        call="the Fisher of this model",
        got=f"outputs that depend on parameters which autograd does not see: {listed(map(repr, unused), 4)}",
        expected="a graph that leads to every parameter that the outputs depend on",
        why="a custom autograd function hides the layers that it calls, as reentrant checkpoints do",
        try_="checkpoints with use_reentrant=False, or params= without these parameters",
    )


def custom_functions(nodes: Iterable[Node]) -> frozenset[str]:
    """Names of the autograd functions written in Python among nodes."""
    return frozenset(node.name() for node in nodes if _is_custom(node))


def _is_custom(node: object) -> bool:
    return isinstance(node, BackwardCFunction)


def refuse_reentrant(
    z: Tensor, nodes: Collection[Node], hidden: Sequence[str], call: str, *, cut: bool = False
) -> None:
    """Refuse checkpoints with use_reentrant=True that hide uses, or that a gradient on its way to one must pass.

    Args:
        z: outputs, with their graph.
        nodes: of the uses' outputs.
        hidden: parameters whose uses were not seen.
        call: for errors.
        cut: whether the parameters that were not seen were used without a graph, of which nothing is left to look at.

    Raises:
        ModelError: there is one.

    Cost: a look at the graph.
    """
    wanted = set(nodes)
    checkpoints = [node for node in graph_of(z.grad_fn) if "CheckpointFunction" in node.name()]
    if not cut and (
        not checkpoints or not (hidden or any(node in wanted for one in checkpoints for node in graph_of(one)))
    ):
        return
    what = f"around {listed(map(repr, hidden), 3)}" if hidden else "between the outputs and chosen parameters"
    raise ModelError(
        call=call,
        got=f"a checkpoint with use_reentrant=True {what}",
        expected="use_reentrant=False",
        why="its graph shows no layer, and brings gradients only to .backward()",
        try_="checkpoint(..., use_reentrant=False), or with transformers "
        'gradient_checkpointing_kwargs={"use_reentrant": False}',
    )


def uses_are_all(
    z: Tensor, graph: Mapping[Node, Sequence[Node]], uses: Sequence[Use], parameters: Mapping[str, Tensor]
) -> bool:
    """Whether the graph shows that outputs depend on parameters through these uses alone, whose inputs are unchanged.

    Args:
        z: outputs, with their graph.
        graph: their `graph_of`.
        uses: that a recorder saw on the way to them.
        parameters: the chosen ones, by name.

    Cost: a look at the graph.
    """
    names = {id(p): name for name, p in parameters.items()}
    own: dict[Node, set[str]] = {}
    inputs: dict[Node, list[Node]] = {}
    for use in uses:
        x = use.input
        if version_of(x) != use.version:
            return False
        own.setdefault(use.edge.node, set()).update(use.names)
        inputs.setdefault(use.edge.node, []).extend([get_gradient_edge(x).node] if x.requires_grad else [])

    if missing := [node for node in (*own, *itertools.chain(*inputs.values())) if node not in graph]:
        graph = {**graph, **_followed(missing, graph, _following)}  # of what the outputs do not depend on
    # Of the parameters' own nodes, which nothing follows.
    leaves = {node: names.get(id(getattr(node, "variable", None))) for node, after in graph.items() if not after}

    def before(starts: Iterable[Node | None], stops: Collection[Node]) -> Iterable[Node]:
        return _followed(starts, stops, graph.__getitem__)

    between = before((z.grad_fn, *(node for read in inputs.values() for node in read)), own)
    if any(leaves.get(node) is not None for node in between):
        return False
    for output, chosen in own.items():
        for node in before(graph[output], inputs[output]):
            name = leaves.get(node)
            if node in own or _is_custom(node) or not (name is None or name in chosen):
                return False
    return True


def graph_of(start: Node | None) -> dict[Node, Sequence[Node]]:
    """The nodes of a graph from one on, each with those that follow it on the way to the leaves."""
    return _followed((start,), (), _following)


def _following(node: Node) -> list[Node]:
    return [following for following, _ in node.next_functions if following is not None]


def _followed(
    starts: Iterable[Node | None], stops: Collection[Node], follow: Callable[[Node], Sequence[Node]]
) -> dict[Node, Sequence[Node]]:
    seen = set(stops)
    pending = [node for node in dict.fromkeys(starts) if node is not None and node not in seen]
    seen.update(pending)
    found: dict[Node, Sequence[Node]] = {}
    for node in pending:  # which grows
        found[node] = follow(node)
        for following in found[node]:
            if following not in seen:
                seen.add(following)
                pending.append(following)
    return found
