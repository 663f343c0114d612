"""Decide, on two examples of the user's data, how each parameter's rows will be made.

Rules are proposed by watching a forward pass and judged by automatic differentiation: a rule, with one of the layouts that
fit, is used only if its rows equal autograd's per-example gradients on this very model. What no rule reproduces (custom
arithmetic, parametrizations, parameters shared in ways the rules do not know) goes the generic way. So a tied weight or a
hidden functional use can make a run slower, never wrong.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor, nn

from fisherkit.data import Batch
from fisherkit.errors import ModelError
from fisherkit.rows.base import UnitRows
from fisherkit.rows.factored import FactoredRows
from fisherkit.rows.generic import gradient, looped_rows, vectorised_rows
from fisherkit.rows.layouts import fits
from fisherkit.rows.record import Recorder, refuse_train_mode
from fisherkit.rows.rules import Rule, Use
from fisherkit.rows.selection import RowSelection
from fisherkit.rows.sparse import SparseRows
from fisherkit.rows.stored import StoredRows
from fisherkit.space import ParameterSpace

Triple = tuple[Rule, str | None, str | None]


@dataclass
class Unit:
    """Parameters whose rows are made together.

    Args:
        names: weight then bias, or one parameter.
        rule: its layer rule; None for the generic way.
        layout: where the rule finds the batch.
        stored: write the rows out instead of keeping the rule's own representation.
        reason: why, for `coverage`.
        shape: positions, inputs and outputs ``(T, I, O)`` of a unit that can be kept factored; None for others.
        numbers: how many numbers one row takes where it is not kept factored.
    """

    names: tuple[str, ...]
    rule: Rule | None = None
    layout: str = ""
    stored: bool = False
    reason: str = ""
    shape: tuple[int, int, int] | None = None
    numbers: int = 0

    def choose(self, vectors: float) -> None:
        """The cost model: keep whichever of the two factors and their product has fewer numbers an example.

        Args:
            vectors: output vectors an example.
        """
        if self.shape is None:
            return
        t, i, o = self.shape
        pair, product = t * (i + vectors * o), vectors * i * o
        self.stored = pair > product
        sign = ">" if self.stored else "<="
        self.reason = f"{self.layout}; T(I + M·O) = {pair:,.0f} {sign} M·I·O = {product:,.0f}"

    def numbers_per_example(self, vectors: float) -> float:
        """Numbers that the rows of one example take as they are kept."""
        if self.shape is None or self.stored:
            return vectors * self.numbers
        t, i, o = self.shape
        return t * (i + vectors * o)

    def rows(self, use: Use, a: Tensor, g: Tensor, selection: RowSelection) -> UnitRows:
        """Rows from both sides of the rule."""
        assert self.rule is not None
        rows = self.rule.rows(use, a, g, selection.example)
        return StoredRows(rows.dense()) if self.stored and isinstance(rows, FactoredRows) else rows


@dataclass
class Plan:
    """How the rows of a model are made.

    Args:
        model: the model.
        space: the chosen parameters.
        parameters: the chosen parameters by name.
        units: a partition of the names.
        vectorised: whether ``torch.func`` reproduces the generic units' gradients.
        batched_backward: whether several output vectors can go through one vectorised backward pass.
    """

    model: nn.Module
    space: ParameterSpace
    parameters: dict[str, Tensor]
    units: list[Unit] = field(default_factory=list)
    vectorised: bool = True
    batched_backward: bool = True

    @property
    def modules(self) -> list[tuple[str, ...]]:
        """The space's blocks, joined where a unit spans two modules (a weight of one used with a bias of another)."""
        groups = [set(names) for names in self.space.blocks.values()]
        for unit in self.units:
            touched = [group for group in groups if group & set(unit.names)]
            if len(touched) > 1:
                groups = [group for group in groups if group not in touched] + [set().union(*touched)]
        order = {name: i for i, name in enumerate(self.space.names)}
        blocks = [tuple(sorted(group, key=order.__getitem__)) for group in groups]
        return sorted(blocks, key=lambda names: order[names[0]])

    @property
    def generic_way(self) -> str:
        """How the generic units are differentiated, for `coverage`."""
        return "torch.func" if self.vectorised else "loop"

    def factor_numbers(self) -> list[int]:
        """Entries of the Kronecker factors of each unit that has them."""
        return [unit.shape[1] ** 2 + unit.shape[2] ** 2 for unit in self.units if unit.shape is not None]

    @property
    def generic(self) -> list[str]:
        """Names that no rule covers."""
        return [name for unit in self.units if unit.rule is None for name in unit.names]

    def generic_rows(self, batch: Batch, v: Float[Tensor, "k B ..."]) -> Float[Tensor, "k B d"]:
        """Rows of the generic units, side by side in their order."""
        own = {name: self.parameters[name] for name in self.generic}
        if self.vectorised:
            return vectorised_rows(self.model, {name: p.detach() for name, p in own.items()}, batch, v)
        return looped_rows(self.model, own, batch, v)


@contextmanager
def differentiable(parameters: Sequence[Tensor]) -> Iterator[None]:
    """Gradients on, frozen parameters differentiable, the fused inference kernel of attention off; all put back after."""
    flags = [p.requires_grad for p in parameters]
    fast = torch.backends.mha.get_fastpath_enabled()
    try:
        torch.backends.mha.set_fastpath_enabled(False)
        for p in parameters:
            p.requires_grad_(True)
        with torch.inference_mode(False), torch.enable_grad():
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        for p, flag in zip(parameters, flags, strict=True):
            p.requires_grad_(flag)


def make_plan(model: nn.Module, space: ParameterSpace, batch: Batch) -> Plan:
    """Probe the model on two examples and verify every rule.

    Args:
        model: the model, in a deterministic mode.
        space: the chosen parameters.
        batch: a first batch on the model's device; its first two examples are used (one is used twice).

    Raises:
        ModelError: dropout or batch statistics in train mode, or examples of a batch that influence each other.
    """
    refuse_train_mode(model)
    own = dict(model.named_parameters(remove_duplicate=False))
    parameters: dict[str, Tensor] = {name: own[name] for name in space.names}
    plan = Plan(model, space, parameters)
    device = next(iter(parameters.values())).device
    probe = batch.take(torch.tensor([0, min(1, batch.size - 1)], device=device))
    with differentiable(list(parameters.values())):
        z, uses = forward(plan, probe)
        _refuse_interaction(model, batch, z)
        generator = torch.Generator().manual_seed(0)
        v = torch.randn(2, *z.shape, generator=generator, dtype=torch.float64).to(z)
        reference = _Reference(plan, z, v[0])
        for unit in _propose(space.names, uses):
            plan.units.extend(_verify(plan, unit, uses, z, v[0], reference))
        plan.units.sort(key=lambda unit: space.names.index(unit.names[0]))
        for unit in plan.units:
            if unit.rule is None:
                unit.numbers = sum(parameters[name].numel() for name in unit.names)
        _verify_generic(plan, probe, v[:1], reference)
        plan.batched_backward = _batched_agrees(z, uses, v)
    return plan


def forward(plan: Plan, batch: Batch) -> tuple[Tensor, list[Use]]:
    """Outputs of a batch, and the uses of the chosen parameters on the way."""
    recorder = Recorder({id(p): name for name, p in plan.parameters.items()})
    with recorder:
        z = batch.call(plan.model)
    if z.ndim == 0 or z.shape[0] != batch.size:
        raise ModelError(call="the model's forward pass", got=f"outputs of shape {list(z.shape)} for {batch.size} examples",
                         expected=f"[{batch.size}, ...]", why="examples lie along axis 0 of inputs and outputs")
    return z, recorder.uses


def unit_uses(unit: Unit, uses: Sequence[Use]) -> list[Use]:
    """The uses that belong to a unit, in the order of the forward pass."""
    return [use for use in uses if use.weight in unit.names or use.bias in unit.names]


class _Reference:
    """Autograd's own per-example gradients on the probe."""

    def __init__(self, plan: Plan, z: Tensor, v: Tensor) -> None:
        rows = torch.stack([gradient(z[n], list(plan.parameters.values()), v[n]) for n in range(z.shape[0])])
        self.rows = {name: rows[:, where] for name, where in plan.space.slices.items()}
        self.scale = rows.norm()
        self.tolerance = {torch.float64: 1e-8, torch.float32: 1e-3}.get(rows.dtype, 5e-2)

    def agrees(self, names: Sequence[str], rows: Tensor) -> bool:
        """Whether rows are right up to rounding; gradients that are pure rounding noise are compared on the whole's scale."""
        expected = torch.cat([self.rows[name] for name in names], 1)
        if rows.shape != expected.shape or not bool(torch.isfinite(rows).all()):
            return False
        scale = torch.maximum(expected.norm(), 1e-3 * self.scale)
        return bool((rows - expected).norm() <= self.tolerance * scale)


def _refuse_interaction(model: nn.Module, batch: Batch, z: Tensor) -> None:
    if batch.size < 2:
        return
    twice = batch.take(torch.tensor([0, 0], device=z.device)).call(model)
    tolerance = {torch.float64: 1e-8, torch.float32: 1e-3}.get(z.dtype, 5e-2)
    if twice.shape == z.shape and bool((twice[0] - z[0]).norm() <= tolerance * (z[0].norm() + z[1].norm())):
        return
    raise ModelError(
        call="the Fisher of this model",
        got="an output for the first example that changes with the rest of its batch",
        expected="examples that do not influence each other, and a deterministic forward pass",
        why="per-example gradients do not exist otherwise",
        try_="model.eval(); remove batch statistics, contrastive terms or noise from forward",
    )


def _propose(names: Sequence[str], uses: Sequence[Use]) -> list[Unit]:
    """Units by what was seen: a weight and a bias that only ever occur together, under one rule."""
    seen: dict[str, set[Triple]] = {name: set() for name in names}
    for use in uses:
        for name in (use.weight, use.bias):
            if name is not None:
                seen[name].add((use.rule, use.weight, use.bias))
    units, placed = [], set()
    for name in names:
        if name in placed:
            continue
        triples = set(seen[name])
        for _, weight, bias in list(triples):
            triples |= seen.get(weight or "", set()) | seen.get(bias or "", set())
        if len(triples) == 1:
            rule, weight, bias = triples.pop()
            members = tuple(n for n in (weight, bias) if n is not None)
            units.append(Unit(members, rule))
            placed.update(members)
        else:
            reason = "no layer rule saw it" if not triples else "shared between different uses"
            units.append(Unit((name,), reason=reason))
            placed.add(name)
    return units


def _verify(plan: Plan, unit: Unit, uses: Sequence[Use], z: Tensor, v: Tensor, reference: _Reference) -> list[Unit]:
    """The unit with the layout that autograd confirms, or its parameters as generic units."""
    if unit.rule is None:
        return [unit]
    own = unit_uses(unit, uses)
    batch = z.shape[0]
    gradients = torch.autograd.grad(z, [use.edge for use in own], v, retain_graph=True, allow_unused=True)
    for layout in unit.rule.layouts:
        if not all(_fits(use, layout, batch) for use in own):
            continue
        unit.layout = layout
        a, g = sides(unit, own, [None if x is None else x.unsqueeze(0) for x in gradients], batch)
        rows = unit.rows(own[0], a, g[0], RowSelection(1, batch, z.device))
        if reference.agrees(unit.names, rows.dense()):
            unit.reason = layout
            unit.numbers = rows.size
            if isinstance(rows, FactoredRows):
                unit.shape = rows.positions, rows.inputs + rows.bias, rows.outputs
            elif isinstance(rows, SparseRows):
                unit.numbers = g.shape[2] * (g.shape[3] + 2)
            return [unit]
    reason = f"autograd does not confirm the {unit.rule.name} rule here"
    return [Unit((name,), reason=reason) for name in unit.names]


def _fits(use: Use, layout: str, batch: int) -> bool:
    rule = use.rule
    shape = tuple(use.arguments[rule.input_name].shape)
    return fits(shape, rule.input_features(use), layout, batch) and fits(
        use.output_shape, rule.output_features(use), layout, batch
    )


def sides(
    unit: Unit, uses: Sequence[Use], gradients: Sequence[Tensor | None], batch: int, activations: Tensor | None = None
) -> tuple[Tensor, Float[Tensor, "k B T o"]]:
    """Both sides of a unit's rows; several uses of one weight are positions of one use."""
    rule, layout = unit.rule, unit.layout
    assert rule is not None
    if activations is None:
        activations = torch.cat([rule.activations(use, layout, batch) for use in uses], 1)
    count = next((g.shape[0] for g in gradients if g is not None), 1)
    parts = []
    for use, found in zip(uses, gradients, strict=True):
        # An output that nothing depends on has no gradient; its positions stay, with zeros.
        whole = torch.zeros(count, *use.output_shape, dtype=uses[0].arguments[rule.weight_name].dtype,
                            device=activations.device) if found is None else found  # fmt: skip
        parts.append(rule.gradients(use, whole, layout, batch))
    return activations, torch.cat(parts, 2) if len(parts) > 1 else parts[0]


def _verify_generic(plan: Plan, probe: Batch, v: Tensor, reference: _Reference) -> None:
    names = plan.generic
    if not names:
        return
    try:
        plan.vectorised = reference.agrees(names, plan.generic_rows(probe, v)[0])
    except (RuntimeError, NotImplementedError, ValueError, TypeError):
        # torch.func refuses some kernels and any data-dependent Python; the loop over examples needs neither.
        plan.vectorised = False


def _batched_agrees(z: Tensor, uses: Sequence[Use], v: Float[Tensor, "2 B ..."]) -> bool:
    edges = [use.edge for use in uses]
    if not edges:
        return True
    try:
        both = torch.autograd.grad(z, edges, v, retain_graph=True, allow_unused=True, is_grads_batched=True)
    except RuntimeError:  # an operation without a batching rule
        return False
    last = torch.autograd.grad(z, edges, v[1], retain_graph=True, allow_unused=True)
    tolerance = {torch.float64: 1e-8, torch.float32: 1e-3}.get(z.dtype, 5e-2)
    return all(
        (a is None) == (b is None) and (a is None or b is None or bool((a[1] - b).norm() <= tolerance * (b.norm() + 1e-30)))
        for a, b in zip(both, last, strict=True)
    )
