"""A forward pass that was watched: its outputs, the uses of chosen parameters on the way, and whose their entries are.

The pass itself shows whose they are where all functions on the way keep the batch's axis apart (`rows.batch_axis`);
that costs no arithmetic. Elsewhere one more backward pass shows it (`rows.ownership`), which output vectors that go
through the graph together share. Knows rules by their entries alone, and no rows.

A custom ``autograd.Function`` that calls layers inside, as checkpoints and reversible blocks of other libraries do,
shows none of their parameters: they would count as unused, and their rows as zeros. Owns telling the two apart, and
telling from a graph that nothing else reaches a parameter.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge

from fisherkit.data import Batch
from fisherkit.errors import ModelError, listed
from fisherkit.rows.batch_axis import Axis
from fisherkit.rows.differentiable import kept_whole, pulled_back, version_of, with_values
from fisherkit.rows.ownership import Arrangement, Regular, arrangement, codes, owners
from fisherkit.rows.record import Recorder
from fisherkit.rows.rules import Use

T = TypeVar("T")

UNBATCHED = "x.unsqueeze(0), if that is one example; optimizer.paused() or no_grad() around calls that lead to no step"
"""What to try where outputs have no batch axis."""


@dataclass(frozen=True, eq=False)
class Watched:
    """A forward pass of ``batch`` examples to outputs ``z``, and the uses of chosen parameters under a rule.

    Args:
        outside_rules: chosen parameters that functions without a rule used.
        coarsest: the floating dtype that rounds most, of all that is differentiated.
        proven: whether the pass shows whose the entries of uses with an axis are.
        by_owner: whether it is looked at which entries outputs depend on, whatever the pass shows.
        random, casts, packed: as of a `Recorder`.
        hooked: whether a hook was put on a tensor or a node of the graph, which may change gradients.
        exchanging: whether hooks may hand gradients to other examples; not if the probe's were seen not to.
        met, drawn, read, decided, placed: as of a `Tracker`; ``numbers`` likewise, as one.
        positions: how many positions of the inputs the outputs keep apart; 0 if that is not shown, or not looked at.
    """

    batch: int
    z: Tensor
    uses: Sequence[Use]
    outside_rules: frozenset[str] = frozenset()
    coarsest: torch.dtype = torch.float64
    proven: bool = False
    by_owner: bool = False
    random: bool = False
    casts: bool = False
    hooked: bool = False
    exchanging: bool = False
    met: bool = False
    drawn: bool = False
    read: tuple[int, ...] = ()
    decided: bool = False
    numbers: int = 0
    placed: bool = False
    packed: bool = False
    positions: int = 0

    @classmethod
    def of(cls, model: Callable[..., Any], recorder: Recorder, batch: Batch) -> Watched:
        """By a forward pass of a batch that the model may write to, as `Batch.fresh` makes it."""
        with recorder:
            z = batch.handed(model)
        return cls.seen(recorder, z)

    @classmethod
    def seen(cls, recorder: Recorder, z: Tensor) -> Watched:
        """What a recorder saw until the outputs.

        Raises:
            ModelError: they do not have the examples along axis 0.
        """
        if z.ndim == 0 or z.shape[0] != recorder.batch:
            raise ModelError(
                "the model's forward pass", f"outputs of shape {list(z.shape)} for {recorder.batch} examples",
                f"[{recorder.batch}, ...]", why="examples lie along axis 0 of inputs and outputs", try_=UNBATCHED,
            )  # fmt: skip
        decided = recorder.ended(z)
        proven = recorder.proves(z)
        outside_rules = frozenset(recorder.outside_rules)
        seen = recorder.tracker
        found = cls(
            recorder.batch, z, recorder.uses, outside_rules, recorder.coarsest, proven, random=recorder.random,
            casts=recorder.casts, hooked=recorder.hooked, exchanging=recorder.hooked, packed=recorder.packed,
            positions=recorder.positions(z), met=seen.met, drawn=seen.drawn, read=tuple(seen.read),
            decided=seen.decided or (seen.reduced and not proven),
            numbers=hash(tuple(seen.numbers)), placed=seen.placed,
        )  # fmt: skip
        if decided is not None:
            vars(found)["decided_before"] = decided
        return found

    @cached_property
    def decided_before(self) -> dict[Any, Any]:
        """What has been decided of passes that did the same; of a new one, nothing."""
        return {}

    def once(self, question: Hashable, answer: Callable[[], T]) -> T:
        """An answer that comes of what passes do and not of numbers, for all of them that do the same."""
        known: dict[Any, T] = self.decided_before
        if question not in known:
            known[question] = answer()
        return known[question]

    def replaced(self, **changes: Any) -> Watched:
        """With other outputs, or uses of the same functions: what is known of the graph stays known."""
        found = object.__new__(Watched)
        found.__dict__.update(self.__dict__, **changes)
        return found

    @property
    def edges(self) -> list[GradientEdge]:
        """Where gradients are asked for: the outputs of all uses."""
        return [use.edge for use in self.uses]

    @cached_property
    def shown(self) -> list[Regular | None]:
        """Whose the entries of each use are, by the pass itself; None where it does not show it."""
        if self.by_owner or (self.exchanging and self.batch > 1):
            return [None] * len(self.uses)
        if self.batch == 1:
            return [Regular(1, use.lead.numel()) for use in self.uses]
        return self.once("shown", lambda: [self._by_axis(use) for use in self.uses])

    @property
    def regular(self) -> bool:
        """Whether the pass itself shows whose all entries are."""
        return None not in self.shown

    @property
    def followed(self) -> bool:
        """Whether functions keep the batch's axis apart on the way to and from all uses, be it of one example."""
        return self.proven and all(self._by_axis(use) is not None for use in self.uses)

    @property
    def bare(self) -> bool:
        """Whether a backward pass runs torch's own code alone, which draws nothing and writes to no module."""
        return not (self.hooked or self.packed or self.custom)

    @cached_property
    def custom(self) -> frozenset[str]:
        """Names of the autograd functions written in Python in the graph."""
        return custom_functions(self.graph)

    @property
    def users(self) -> bool:
        """Whether functions or hooks of users may change gradients, in one batch and not in another."""
        return self.hooked or bool(self.custom)

    @cached_property
    def graph(self) -> dict[Node, Sequence[Node]]:
        """The nodes of the outputs' graph, each with those that follow it."""
        return graph_of(self.z.grad_fn)

    @property
    def by_content(self) -> bool:
        """Whether it may be the numbers of a batch that decide how its examples meet, in one batch and not in another.

        Where gradients alone lead from one to another, owners tell; and what Python does when it is told something
        (``read``), it does for all batches of which it is told the same.
        """
        return self.met or self.drawn or self.decided or bool(self.custom)

    @property
    def own_gradients(self) -> bool:
        """Whether gradients may depend on places and company where outputs do not, as by hooks and users' functions."""
        met = self.placed or self.met or self.drawn or self.decided
        return met or not self.proven or self.hooked or bool(self.custom)

    def by_position(self) -> Watched | None:
        """The same with every position an example of its own; None where entries do not lie by example and position.

        Nor where a parameter is used several times: its Kronecker factors count other entries by example.
        """
        names = [name for use in self.uses for name in use.names]
        if not self.positions or not self.regular or self.exchanging or len(set(names)) < len(names):
            return None
        batch, found = self.batch, []
        for use in self.uses:
            axis = _merged(use.axis, use.position, batch, self.positions)
            if axis is None or axis.dim >= len(use.lead):
                return None
            found.append(replace(use, axis=axis))
        return replace(self, batch=batch * self.positions, z=self.z.flatten(0, 1), uses=found, positions=0)

    def backward(
        self, v: Float[Tensor, "k B ..."], *, batched: bool = False, keep: bool = True
    ) -> Sequence[Tensor | None]:  # fmt: skip
        """Gradients of Σ_n v_n · z_n at every use, ``[k, *output]``; None where nothing depends on an output.

        Not to ``keep`` the graph, which is then of no use any more, is for a single vector.
        """
        if len(v) > 1 and batched:
            return self._gradients(v, batched=True)
        passes = [self._gradients(one, keep=keep) for one in v]
        if len(passes) == 1:
            return [None if one is None else one.unsqueeze(0) for one in passes[0]]
        return [None if found[0] is None else torch.stack(found) for found in zip(*passes, strict=True)]

    def multiplied(self, v: Float[Tensor, "B ..."]) -> list[Sequence[Tensor | None]]:
        """Gradients at the uses for output vectors times each row of the examples' numbers; needs the graph."""
        if self.batch == 1:
            return []
        shape = (-1, *[1] * (v.ndim - 1))
        return [self._gradients(v * row.reshape(shape)) for row in codes(self.batch, v)]

    def arrangements(
        self, gradients: Sequence[Tensor | None], multiplied: Sequence[Sequence[Tensor | None]]
    ) -> list[Arrangement | None]:
        """How the entries of each use lie, by gradients there; None where one belongs to several examples.

        ``multiplied`` are those that `multiplied` makes for the same vectors; none where the pass itself shows whose
        all are.
        """
        return [
            shown or self._by_codes(use, gradient, [one[i] for one in multiplied])
            for i, (shown, use, gradient) in enumerate(zip(self.shown, self.uses, gradients, strict=True))
        ]

    def arrangements_by(
        self, v: Float[Tensor, "B ..."], gradients: Sequence[Tensor | None] | None = None
    ) -> list[Arrangement | None]:
        """The same by backward passes where they are needed: two, or one where the gradients are known."""
        if self.regular:
            return list(self.shown)
        return self.arrangements(self._gradients(v) if gradients is None else gradients, self.multiplied(v))

    def _gradients(self, v: Tensor, batched: bool = False, keep: bool = True) -> Sequence[Tensor | None]:
        edges = self.edges
        if not edges:
            return []
        if batched:
            return torch.autograd.grad(self.z, edges, v, retain_graph=True, allow_unused=True, is_grads_batched=True)
        return pulled_back(self.z, edges, v, keep=keep)

    def _by_axis(self, use: Use) -> Regular | None:
        lead = use.lead
        if not self.proven or use.axis is None or use.axis.dim >= len(lead):
            return None
        return Regular(self.batch, use.axis.inner * lead[use.axis.dim + 1 :].numel())

    def _by_codes(self, use: Use, gradient: Tensor | None, multiplied: Sequence[Tensor | None]) -> Arrangement | None:
        """By what the examples' numbers did to the gradient."""
        lead = use.lead
        entries = lead.numel()
        like = self.z if gradient is None else gradient
        if gradient is None or any(one is None for one in multiplied) or entries == 0:
            return arrangement(torch.full((entries,), -1, device=like.device), lead, self.batch)
        if self.batch == 1:
            return Regular(1, entries, gradient.reshape(entries, -1).ne(0).any(1))
        rest = [one.reshape(entries, -1) for one in multiplied if one is not None]
        numbers = codes(self.batch, self.z).to(gradient.device)
        owner = owners(gradient.reshape(entries, -1), rest, numbers, self.coarsest)
        if owner is None:
            return None
        found, expected = arrangement(owner, lead, self.batch), self._by_axis(use) if self.exchanging else None
        if expected is None:
            return found
        if bool(((owner >= 0) & (owner != expected.owners(entries).to(owner.device))).any()):
            return None  # gradients go elsewhere than the outputs come from
        return found if self.by_owner else expected


def _merged(example: Axis | None, position: Axis | None, batch: int, positions: int) -> Axis | None:
    """The axis of examples and their positions, where these come first, one behind the other or merged."""
    if example is None or position is None:
        return None
    if example == Axis(0) and position == Axis(1):
        return Axis(1, outer=batch)
    merged = example == Axis(0, inner=positions) and position == Axis(0, outer=batch)
    return Axis(0) if merged else None


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
        again = batch.call(with_values(model, moved)).detach()
    if again.shape == z.shape and bool((again - z).norm() <= 1e-6 * z.norm()):
        return
    raise ModelError(
        "the Fisher of this model",
        f"outputs that depend on parameters which autograd does not see: {listed(map(repr, unused), 4)}",
        "a graph that leads to every parameter that the outputs depend on",
        why="a custom autograd function hides the layers that it calls, as reentrant checkpoints do",
        try_="checkpoints with use_reentrant=False, or params= without these parameters",
    )  # fmt: skip


def custom_functions(nodes: Iterable[Node]) -> frozenset[str]:
    """Names of the autograd functions written in Python among nodes."""
    return frozenset(node.name() for node in nodes if _is_custom(node))


def _is_custom(node: object) -> bool:
    return isinstance(node, BackwardCFunction)


def refuse_reentrant(
    z: Tensor, nodes: Collection[Node], hidden: Sequence[str], call: str, *, cut: bool = False
) -> None:
    """Refuse checkpoints with use_reentrant=True that hide uses, or that a gradient on its way to one must pass.

    Between z and the ``nodes`` of the uses' outputs. Uses of ``hidden`` parameters were not seen; ``cut`` if these were
    used without a graph, of which nothing is left to look at.

    Raises:
        ModelError: there is one.
    """
    wanted = set(nodes)
    checkpoints = [node for node in graph_of(z.grad_fn) if "CheckpointFunction" in node.name()]
    if not cut and (
        not checkpoints or not (hidden or any(node in wanted for one in checkpoints for node in graph_of(one)))
    ):
        return
    what = f"around {listed(map(repr, hidden), 3)}" if hidden else "between the outputs and chosen parameters"
    raise ModelError(
        call, f"a checkpoint with use_reentrant=True {what}", "use_reentrant=False",
        why="its graph shows no layer, and brings gradients only to .backward()",
        try_="checkpoint(..., use_reentrant=False), or with transformers "
        'gradient_checkpointing_kwargs={"use_reentrant": False}',
    )  # fmt: skip


def uses_are_all(
    z: Tensor, graph: Mapping[Node, Sequence[Node]], uses: Sequence[Use], parameters: Mapping[str, Tensor]
) -> bool:
    """Whether the graph shows that outputs depend on parameters through these uses alone, whose inputs are unchanged.

    Cost: a look at the graph, which is z's `graph_of`.
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
    found: dict[Node, Sequence[Node]] = {} if start is None else {start: ()}
    pending = list(found)
    for node in pending:  # which grows
        found[node] = after = _following(node)
        for following in after:
            if following not in found:
                found[following] = ()
                pending.append(following)
    return found


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
